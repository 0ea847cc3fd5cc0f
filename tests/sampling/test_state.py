"""Given content, masks and noise."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_ltx.sampling.conditioning import Keyframe, ReplacedLatent
from mlx_ltx.sampling.geometry import AudioGrid, VideoGrid
from mlx_ltx.sampling.noise import Noise
from mlx_ltx.sampling.state import add_noise, audio_state, video_state

GRID = VideoGrid(3, 2, 3, 4, 8, 32, 24.0)
IMAGE = mx.random.normal((1, 1, 2, 3, 4), key=mx.random.key(0))


@given(strength=st.floats(0, 1), frame=st.integers(0, 2))
def test_a_replaced_frame_keeps_its_share(strength, frame):
    state = video_state(GRID, [ReplacedLatent(IMAGE, frame, strength)])
    noise = mx.random.normal(state.latent.shape, key=mx.random.key(1))
    noised = GRID.unpatchify(state.noised(noise).latent)[:, frame]
    expected = strength * IMAGE[:, 0] + (1 - strength) * GRID.unpatchify(noise)[:, frame]
    assert mx.allclose(noised, expected, atol=1e-5)


def test_a_keyframe_adds_tokens_that_draw_noise_too():
    state = video_state(GRID, [Keyframe(IMAGE, 16, 0.5)])
    assert state.tokens == GRID.tokens + GRID.tokens_per_frame
    assert state.keyframes.sum() == GRID.tokens_per_frame  # only the clip's own first frame is marked
    assert state.positions[0, 0, -1].tolist() == pytest.approx([16 / 24, 17 / 24])
    assert add_noise(state, Noise(3)).latent.shape[1] == state.tokens


def test_levels_name_each_distinct_mask_value_once():
    assert video_state(GRID).levels()[1] is None
    values, index = video_state(GRID, [ReplacedLatent(IMAGE, 0, 0.75)]).levels()
    assert values.tolist() == [0.25, 1.0]
    assert index.tolist() == [0] * 6 + [1] * 12


def test_an_image_of_another_size_does_not_fit():
    with pytest.raises(ValueError, match="does not fit"):
        video_state(GRID, [ReplacedLatent(mx.zeros((1, 1, 2, 2, 4)))])
    with pytest.raises(ValueError, match="does not fit"):
        video_state(GRID, [ReplacedLatent(IMAGE, frame=3)])


def test_noise_is_one_stream_per_seed():
    first, again, other = Noise(5), Noise(5), Noise(6)
    draws = [np.array(first((2, 3))) for _ in range(2)]
    assert not np.array_equal(*draws)
    assert all(np.array_equal(draw, np.array(again((2, 3)))) for draw in draws)
    assert not np.array_equal(draws[0], np.array(other((2, 3))))


def test_given_content_survives_prediction():
    state = video_state(GRID, [ReplacedLatent(IMAGE)])
    kept = state.keep_given(mx.ones(state.latent.shape))
    assert mx.array_equal(GRID.unpatchify(kept)[:, 0], IMAGE[:, 0])
    assert (kept[:, GRID.tokens_per_frame :] == 1).all()


@given(scale=st.floats(0, 1))
def test_a_frozen_state_takes_no_noise(scale):
    grid = AudioGrid(5, 2, 3)
    sound = mx.random.normal((1, 5, 2, 3), key=mx.random.key(2))
    state = add_noise(audio_state(grid, initial=sound).freeze(), Noise(0), scale)
    assert state.frozen
    assert mx.array_equal(grid.unpatchify(state.latent), sound)
    assert state.levels()[0].tolist() == [0]
