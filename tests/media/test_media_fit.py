"""The ways of fitting a picture into a frame. (Cropping is tested with the images, parity in test_media_images.)"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_ltx.media.fit import FIT_MODES, aligned_size, fit_image, fit_pixels, resize

sizes = st.integers(1, 40)


def picture(height, width, low=50, high=200):
    return np.random.default_rng(0).integers(low, high, (height, width, 3)).astype(np.uint8)


@given(sizes, sizes, sizes, sizes, st.sampled_from(FIT_MODES))
def test_every_mode_fills_the_frame_with_values_of_the_picture(source_height, source_width, height, width, mode):
    fitted = fit_pixels(picture(source_height, source_width), height, width, mode)
    assert (fitted.shape, fitted.dtype) == ((height, width, 3), np.float32)
    inside = fitted[fitted > 0] if mode == "contain" else fitted
    assert 49.9 <= inside.min() <= inside.max() <= 199.1


def test_contain_keeps_all_of_it_between_black_bars():
    white = np.full((20, 40, 3), 255, np.uint8)
    fitted = fit_pixels(white, 33, 32, "contain")  # 16 rows of picture, 17 of bars
    rows = fitted[:, 0, 0]
    assert rows.tolist() == [0] * 8 + [255] * 16 + [0] * 9
    assert np.array_equal(fitted, np.broadcast_to(rows[:, None, None], fitted.shape))
    columns = fit_pixels(white.transpose(1, 0, 2), 32, 33, "contain")[0, :, 0]
    assert columns.tolist() == [0] * 8 + [255] * 16 + [0] * 9
    assert fit_image(white, 33, 32, "contain").min() == -1  # black for the network too
    image = picture(20, 40)
    assert np.array_equal(fit_pixels(image, 40, 80, "contain"), resize(image, 40, 80))  # it enlarges


def test_stretch_ignores_proportions():
    ramp = np.repeat(np.arange(8.0)[None, :, None], 3, 2) * np.ones((4, 1, 1))
    fitted = fit_pixels(ramp, 16, 4, "stretch")
    assert np.allclose(fitted[:, :, 0], [0.5, 2.5, 4.5, 6.5])


def test_reflect_never_enlarges_and_mirrors_at_the_bottom_right():
    image = picture(6, 5)
    fitted = fit_pixels(image, 8, 7, "reflect")
    assert np.array_equal(fitted[:6, :5], image)
    assert np.array_equal(fitted[6:, :5], image[[4, 3]])
    assert np.array_equal(fitted[:6, 5:], image[:, [3, 2]])
    assert np.array_equal(fit_pixels(image, 12, 5, "reflect")[6:], np.repeat(image[5:], 6, 0))  # not enough to mirror
    assert np.array_equal(fit_pixels(image, 6, 5, "reflect"), image)
    shrunk = fit_pixels(image, 3, 7, "reflect")
    assert np.array_equal(shrunk[:, :2], resize(image, 3, 2))


def test_frames_are_fitted_alike():
    clip = np.stack([picture(6, 9), picture(6, 9)[::-1]])
    for mode in FIT_MODES:
        fitted = fit_pixels(clip, 8, 8, mode)
        assert np.array_equal(fitted[1], fit_pixels(clip[1], 8, 8, mode))


def test_aligned_sizes():
    assert aligned_size(1920, 1080, "crop") == (1920, 1024)
    assert aligned_size(1920, 1080, "reflect") == (1920, 1088)
    assert aligned_size(1, 64, "reflect", 32) == (32, 64)
    with pytest.raises(ValueError, match="smaller than 64"):
        aligned_size(100, 63, "crop")


def test_wrong_arguments():
    with pytest.raises(ValueError, match="cannot fit"):
        fit_pixels(picture(4, 4), 0, 4, "contain")
    with pytest.raises(ValueError, match="crop, contain, stretch, reflect"):
        fit_pixels(picture(4, 4), 4, 4, "cover")
