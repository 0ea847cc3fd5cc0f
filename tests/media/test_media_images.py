"""Images as conditioning. The golden tensors are the reference's; see scripts/parity/media.py.

tests/golden/media.io.safetensors is the reference's set without its largest cases, its pixels stored as uint8.
"""

import dataclasses
import io
import math
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

import parity.media
from mlx_ltx.errors import UserError
from mlx_ltx.media.fit import fit_geometry, fit_image, resize_and_crop
from mlx_ltx.media.images import load_image, prepare_image, recompress
from parity import Comparison, GoldenSet, NotCovered, runner_for

GOLDEN = Path(__file__).parents[1] / "golden"


def smooth(height=40, width=60):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 4 % 256, y * 6 % 256, 128 + 0 * x], -1).astype(np.uint8)


def test_equals_the_reference():
    golden = GoldenSet(GOLDEN, "media")
    results = list(runner_for("media")(golden))
    compared = {result.tensor: result.error for result in results if isinstance(result, Comparison)}
    assert {"aspect_48", "center_crop_32x32", "center_crop_64x96", "center_crop_96x64", "crf0_u8"} <= set(compared)
    assert max(compared.values()) <= 1e-6  # measured: 1.2e-7, and the round trip exact
    covered = {result.case.split(" ")[0] for result in results if isinstance(result, NotCovered)} | set(compared)
    aligned = set(golden.cases["align"])
    assert aligned
    assert covered == set(golden.names) - {"image_u8", "hdr.linear", "hdr.video"} | aligned
    assert not [result for result in results if isinstance(result, NotCovered) and "FFmpeg" not in result.case]


def test_the_runner_notices_a_difference():
    golden = GoldenSet(GOLDEN, "media")
    for name in ("image_u8", "hdr.linear", "hdr.video"):
        golden.tensors[name] = golden.tensors[name] // 2
    for recorded in golden.cases["align"].values():
        recorded[0] += 64
    compared = [result for result in runner_for("media")(golden) if isinstance(result, Comparison)]
    assert {result.tensor for result in compared if result.error < 1e-2} <= {
        "hdr.logc3.decompress",
        "hdr.acescct.decompress",
    }


@pytest.mark.parametrize("crf", [18, 33])
def test_round_trip_under_any_build(crf):
    """Exact with the recorded libraries (above); with others the traces stay of the same strength."""
    golden = GoldenSet(GOLDEN, "media")
    image, expected = golden.tensors["image_u8"], golden.tensors[f"crf{crf}_u8"]
    actual = recompress(image, crf).astype(int)
    assert actual.shape == expected.shape
    lost = np.abs(expected.astype(int) - image).mean()
    assert np.abs(actual - expected).mean() <= (0 if parity.media.same_codecs(golden) else lost / 2)


def test_round_trip_cuts_to_even_and_skips_what_it_cannot_encode():
    assert recompress(smooth(41, 63), 20).shape == (40, 62, 3)
    assert recompress(smooth(3, 2), 20).shape == (2, 2, 3)
    for image, crf in ((smooth(41, 63), 0), (smooth(1, 63), 20)):
        assert recompress(image, crf) is image
    difference = [np.abs(recompress(smooth(), crf).astype(int) - smooth()).mean() for crf in (5, 25, 45)]
    assert difference == sorted(difference)
    for crf in (-1, 52):
        with pytest.raises(ValueError, match="crf"):
            recompress(smooth(), crf)


sizes = st.integers(1, 3000)


@given(sizes, sizes, sizes, sizes)
def test_geometry_always_covers_the_frame(source_height, source_width, height, width):
    fit = fit_geometry(source_height, source_width, height, width)
    assert 0 <= fit.top <= fit.height - height
    assert 0 <= fit.left <= fit.width - width
    assert abs((fit.height - height) - 2 * fit.top) <= 1  # in the middle
    assert abs((fit.width - width) - 2 * fit.left) <= 1
    assert fit.height - height <= 1 or fit.width - width <= 1  # and no larger than needed
    scale = max(height / source_height, width / source_width)
    assert math.isclose(fit.height, source_height * scale, abs_tol=1.01)


def bilinear(image, height, width):
    """The textbook formula, one output pixel at a time, in float64."""
    result = np.zeros((height, width, image.shape[2]))
    for row in range(height):
        for column in range(width):
            y = max((row + 0.5) * image.shape[0] / height - 0.5, 0)
            x = max((column + 0.5) * image.shape[1] / width - 0.5, 0)
            top, left = min(int(y), image.shape[0] - 1), min(int(x), image.shape[1] - 1)
            bottom, right = min(top + 1, image.shape[0] - 1), min(left + 1, image.shape[1] - 1)
            upper = image[top, left] * (1 - (x - left)) + image[top, right] * (x - left)
            lower = image[bottom, left] * (1 - (x - left)) + image[bottom, right] * (x - left)
            result[row, column] = upper * (1 - (y - top)) + lower * (y - top)
    return result


small = st.integers(1, 24)


@settings(deadline=None, max_examples=60)
@given(small, small, small, small, st.integers(0, 99))
def test_resizing_is_bilinear_and_then_cropped(source_height, source_width, height, width, seed):
    image = np.random.default_rng(seed).integers(0, 256, (source_height, source_width, 3)).astype(np.uint8)
    fit = fit_geometry(source_height, source_width, height, width)
    whole = bilinear(image.astype(float), fit.height, fit.width)
    expected = whole[fit.top : fit.top + height, fit.left : fit.left + width]
    actual = resize_and_crop(image, height, width)
    assert actual.dtype == np.float32
    assert np.abs(actual - expected).max() < 2e-2  # places are float32: up to 24 * 2^-24 times 255 levels
    fitted = fit_image(image, height, width)
    assert -1 <= fitted.min() <= fitted.max() <= 1


def test_same_size_is_untouched_and_frames_are_fitted_alike():
    image = smooth()
    assert np.array_equal(resize_and_crop(image, 40, 60), image)
    clip = np.stack([image, image[::-1]])
    fitted = fit_image(clip, 32, 20)
    assert fitted.shape == (2, 32, 20, 3)
    assert np.array_equal(fitted[1], fit_image(clip[1], 32, 20))
    with pytest.raises(ValueError, match="cannot fit"):
        fit_image(image, 0, 10)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    upright = smooth(16, 24)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "photo.png", exif=exif)
    assert np.array_equal(load_image(tmp_path / "photo.png"), upright)


@pytest.mark.parametrize("suffix", ["png", "webp", "bmp", "tiff"])
def test_formats(tmp_path, suffix):
    Image.fromarray(smooth()).save(tmp_path / f"image.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    assert np.array_equal(load_image(tmp_path / f"image.{suffix}"), smooth())


def test_modes(tmp_path):
    path, image = tmp_path / "image.png", smooth()
    grey = image[:, :, 0]
    Image.fromarray(grey).save(path)
    assert np.array_equal(load_image(path), np.repeat(grey[:, :, None], 3, 2))
    Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    assert np.array_equal(load_image(path), np.repeat(grey[:, :, None], 3, 2))
    Image.fromarray(grey > 99).save(path)
    assert set(np.unique(load_image(path))) == {0, 255}
    Image.fromarray(image).quantize(64).save(path, transparency=3)
    assert np.abs(load_image(path).astype(int) - image).mean() < 10
    Image.fromarray(image).convert("CMYK").save(tmp_path / "print.tiff")
    assert np.abs(load_image(tmp_path / "print.tiff").astype(int) - image).max() <= 1


@pytest.mark.parametrize("opacity", [0, 100, 255])
def test_transparency_is_dropped_as_in_the_reference(tmp_path, opacity):
    image = smooth()
    Image.fromarray(np.dstack([image, np.full((40, 60), opacity, np.uint8)])).save(tmp_path / "image.png")
    assert np.array_equal(load_image(tmp_path / "image.png"), image)


def test_the_first_frame_of_an_animation(tmp_path):
    first, second = Image.fromarray(smooth()), Image.fromarray(255 - smooth())
    first.save(tmp_path / "moving.webp", save_all=True, append_images=[second], lossless=True)
    assert np.array_equal(load_image(tmp_path / "moving.webp"), smooth())


def linear_light_profile():
    """The sRGB profile with its transfer curves replaced by the identity: its pixels are linear light."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for entry in range(int.from_bytes(data[128:132], "big")):
        at = 132 + 12 * entry
        if data[at : at + 4] in (b"rTRC", b"gTRC", b"bTRC"):
            offset = int.from_bytes(data[at + 4 : at + 8], "big")
            data[offset : offset + 12] = b"curv" + bytes(8)  # a curve of no points is the identity
            data[at + 8 : at + 12] = (12).to_bytes(4, "big")
    return bytes(data)


def test_colour_profiles_are_applied(tmp_path):
    path, grey = tmp_path / "image.png", np.full((4, 4, 3), 55, np.uint8)
    Image.fromarray(grey).save(path, icc_profile=linear_light_profile())
    expected = 255 * (1.055 * (55 / 255) ** (1 / 2.4) - 0.055)
    assert np.abs(load_image(path) - expected).max() < 2
    Image.fromarray(grey).save(path, icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    assert np.abs(load_image(path).astype(int) - 55).max() <= 1
    Image.fromarray(grey).save(path, icc_profile=b"nonsense")
    assert np.array_equal(load_image(path), grey)


def test_what_is_no_image(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)).save(buffer, "PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:2000])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "plate.exr").write_bytes(b"\x76\x2f\x31\x01")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tiff")
    for name, message in {
        "cut.png": "not an image",
        "text.png": "unknown format",
        "empty.jpg": "unknown format",
        "photo.heic": "save it as PNG",
        "plate.exr": "--hdr",
        "float.tiff": "floating-point",
        "none.png": "no such file",
        ".": "is a folder",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            load_image(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_prepare_image(tmp_path):
    Image.fromarray(smooth(64, 96)).save(tmp_path / "image.png")
    prepared = prepare_image(tmp_path / "image.png", 32, 32, crf=0)
    assert (prepared.shape, prepared.dtype) == ((32, 32, 3), np.float32)
    assert np.array_equal(prepared, fit_image(smooth(64, 96), 32, 32))
    stretched = prepare_image(tmp_path / "image.png", 32, 32, 0, "stretch")
    assert np.array_equal(stretched, fit_image(smooth(64, 96), 32, 32, "stretch"))
    assert 0 < np.abs(prepare_image(tmp_path / "image.png", 32, 32, crf=33) - prepared).mean() < 0.1


def test_recorded_versions_decide_what_is_compared():
    golden = GoldenSet(GOLDEN, "media")
    golden.cases["crf"]["libs"]["libavcodec"] = [1, 2, 3]
    assert not parity.media.same_codecs(golden)
    results = list(runner_for("media")(golden))
    assert any(isinstance(result, NotCovered) and result.case.startswith("crf33_u8 (") for result in results)
    assert dataclasses.is_dataclass(results[0])
    assert av.library_versions
