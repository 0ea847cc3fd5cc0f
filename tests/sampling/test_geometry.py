"""Sizes, tokens and positions."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_ltx.sampling.geometry import (
    AudioGrid,
    ClipShape,
    VideoGrid,
    frames_for_duration,
    nearest_frame_counts,
    nearest_multiples,
)

SIZES = st.integers(1, 5)


@given(frames=SIZES, height=SIZES, width=SIZES, fps=st.sampled_from([8.0, 23.976, 24.0, 60.0]))
def test_positions_tile_the_clip(frames, height, width, fps):
    clip = ClipShape((frames - 1) * 8 + 1, height * 32, width * 32, fps)
    grid = VideoGrid.of_clip(clip, 128)
    positions = grid.positions()
    assert positions.shape == (1, 3, grid.tokens, 2)
    assert positions.dtype == np.float32
    assert positions.min() == 0
    assert np.allclose(positions.max(axis=(0, 2, 3)), [clip.duration, clip.height, clip.width], rtol=1e-6)
    volume = np.prod(positions[0, :, :, 1] - positions[0, :, :, 0], axis=0, dtype=np.float64)
    assert volume.sum() == pytest.approx(clip.duration * clip.height * clip.width, rel=1e-5)
    first = positions[0, 0, : grid.tokens_per_frame]
    assert np.allclose(first, [0, 1 / fps])


@given(frames=SIZES, height=SIZES, width=SIZES, extra=st.integers(0, 3))
def test_video_tokens_come_back_without_the_appended_ones(frames, height, width, extra):
    grid = VideoGrid(frames, height, width, 2, 8, 32, 24.0)
    latent = mx.arange(grid.tokens * 2, dtype=mx.float32).reshape(1, frames, height, width, 2)
    tokens = mx.concatenate([grid.patchify(latent), mx.zeros((1, extra, 2))], axis=1)
    assert mx.array_equal(grid.unpatchify(tokens), latent)


@given(frames=st.integers(1, 9), bins=st.integers(1, 4), channels=st.integers(1, 3))
def test_audio_tokens_are_channel_major_and_come_back(frames, bins, channels):
    grid = AudioGrid(frames, bins, channels)
    latent = mx.random.normal((1, frames, bins, channels))
    tokens = grid.patchify(latent)
    assert tokens.shape == (1, frames, channels * bins)
    assert tokens[0, 0, bins - 1].item() == latent[0, 0, bins - 1, 0].item()
    assert mx.array_equal(grid.unpatchify(tokens), latent)


@given(frames=st.integers(1, 200))
def test_audio_positions_follow_each_other(frames):
    positions = AudioGrid(frames, 16, 8).positions()[0, 0]
    assert positions[0, 0] == 0
    assert (positions[1:, 0] == positions[:-1, 1]).all()
    assert positions[-1, 1] == pytest.approx(frames / 25 - 0.03, abs=1e-5)


@given(value=st.integers(1, 5000), step=st.sampled_from([32, 64]))
def test_nearest_multiples_surround_the_value(value, step):
    nearest = nearest_multiples(value, step)
    assert all(v % step == 0 and v > 0 and abs(v - value) < step for v in nearest)
    assert (nearest == (value,)) == (value % step == 0)


@given(value=st.integers(1, 5000))
def test_nearest_frame_counts_surround_the_value(value):
    nearest = nearest_frame_counts(value)
    assert all(v % 8 == 1 and abs(v - value) < 8 for v in nearest)
    assert (nearest == (value,)) == (value % 8 == 1)


@given(seconds=st.floats(0.01, 30), fps=st.sampled_from([12.0, 24.0, 25.0, 50.0]))
def test_durations_become_frame_counts(seconds, fps):
    frames = frames_for_duration(seconds, fps)
    assert frames % 8 == 1
    assert frames >= 9
    assert frames == 9 or abs(frames / fps - seconds) <= 4.5 / fps


@pytest.mark.parametrize("shape", [(10, 64, 64), (9, 65, 64), (9, 64, 33), (0, 64, 64)])
def test_a_clip_off_the_grid_is_an_error(shape):
    with pytest.raises(ValueError, match="not on a grid"):
        VideoGrid.of_clip(ClipShape(*shape, 24.0), 128)
