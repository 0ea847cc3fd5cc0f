"""The picture's tokens in tiles: what each holds, that their weights add up, and what a prediction becomes."""

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import parity.token_tiles  # noqa: F401  (registers the runner)
from mlx_ltx.checkpoints.components import load_transformer
from mlx_ltx.sampling.conditioning import AttentionStrength, Keyframe, Reference
from mlx_ltx.sampling.denoise import Denoiser, TextContext
from mlx_ltx.sampling.geometry import AudioGrid, VideoGrid
from mlx_ltx.sampling.guidance import Guidance, GuidanceParams
from mlx_ltx.sampling.noise import Noise
from mlx_ltx.sampling.state import States, add_noise, audio_state, video_state
from mlx_ltx.sampling.token_tiles import blend, largest_tile, tile_spans, token_tiles
from parity import GoldenSet

GOLDEN = Path(__file__).parents[1] / "golden"
GRID = VideoGrid(2, 12, 14, 128, 8, 32, 24.0)
REFERENCE = Reference(mx.random.normal((1, 2, 6, 7, 128), key=mx.random.key(3)), downscale=2)


def test_parity(compare_golden):
    """Measured: at most 1.1e-7, in blending; tokens and positions are equal."""
    results = compare_golden("token_tiles")
    assert {result.case for result in results} == {"one", "columns", "both"}
    assert "blended" in {result.tensor for result in results}
    for result in results:
        assert result.error < 1e-6, f"{result.case} {result.tensor}"


@given(length=st.integers(1, 80), count=st.integers(1, 5))
def test_weights_of_an_axis_add_up_to_one(length, count):
    if count > length:
        with pytest.raises(ValueError, match="cannot be split"):
            tile_spans(length, count)
        return
    total = np.zeros(length)
    for place, weights in tile_spans(length, count):
        total[place] += weights
        assert (weights > 0).all()
    assert len(tile_spans(length, count)) == count
    assert np.allclose(total, 1, atol=1e-6)


def test_large_pictures_overlap_as_in_the_reference():
    """34 latents, of 1088 pixels, in two tiles that share 5: 20 and 19."""
    (first, rising), (second, falling) = tile_spans(34, 2)
    assert (first, second) == (slice(0, 20), slice(15, 34))
    assert np.allclose(rising[-5:], np.arange(5, 0, -1) / 6)
    assert np.allclose(falling[:5], np.arange(1, 6) / 6)


@given(rows=st.integers(1, 3), columns=st.integers(1, 4))
def test_blending_gives_back_what_was_split(rows, columns):
    state = video_state(GRID, [Keyframe(mx.zeros((1, 1, 12, 14, 128)), 8), AttentionStrength(REFERENCE, 0.5)])
    state = add_noise(state, Noise(0))
    tiles = token_tiles(state, GRID, rows, columns)
    assert len(tiles) == rows * columns
    assert max((tile.tokens < GRID.tokens).sum() for tile in tiles) == GRID.frames * largest_tile(12, 14, rows, columns)
    total = np.zeros(state.tokens)
    for tile in tiles:
        np.add.at(total, tile.tokens, tile.weights)
    assert np.allclose(total, 1, atol=1e-6)
    parts = [tile.of(state) for tile in tiles]
    assert mx.allclose(blend(tiles, [part.latent for part in parts], state.tokens), state.latent, atol=1e-5)
    for part, tile in zip(parts, tiles, strict=True):
        own = tile.tokens < GRID.tokens
        assert part.positions[0, :, own].min() == 0
        assert part.groups.group.shape == part.mask.shape == part.keyframes.shape == tile.tokens.shape


def test_appended_tokens_go_where_they_are():
    """A reference lies in the tiles that it covers; what comes before the clip is in all of them."""
    state = video_state(GRID, [REFERENCE])
    left, right = token_tiles(state, GRID, 1, 2)
    columns = np.arange(2 * 6 * 7) % 7
    kept = [columns[tile.tokens[tile.tokens >= GRID.tokens] - GRID.tokens] for tile in (left, right)]
    assert set(kept[0]) == {0, 1, 2, 3, 4}
    assert set(kept[1]) == {2, 3, 4, 5, 6}
    early = replace(state, positions=state.positions.copy())
    early.positions[:, 0, GRID.tokens :] -= 10
    assert all((tile.tokens >= GRID.tokens).sum() == 84 for tile in token_tiles(early, GRID, 1, 2))


@pytest.fixture(scope="module")
def setting():
    golden = GoldenSet(GOLDEN, "transformer_23")
    model = load_transformer(golden.checkpoint(), mx.float32)
    sound = AudioGrid(9, 16, 8)
    states = States(add_noise(video_state(GRID, [REFERENCE]), Noise(0)), add_noise(audio_state(sound), Noise(1)))
    texts = [
        TextContext(*(mx.random.normal((1, 5, dim), key=mx.random.key(key + dim)) for dim in (64, 32)))
        for key in (1, 2)
    ]
    return model, states, texts


def predict(setting, tiles):
    model, states, (positive, negative) = setting
    params = GuidanceParams(cfg_scale=2, stg_scale=1, stg_blocks=(1,), modality_scale=2)
    denoiser = Denoiser(model, states, positive, Guidance(params, params), negative, tiles=tiles)
    work = denoiser.predict(states, 0.9, 0)
    fractions = []
    while True:
        try:
            fractions.append(next(work))
        except StopIteration as end:
            return fractions, end.value


def test_one_tile_is_the_whole(setting):
    whole_fractions, (whole, negative) = predict(setting, None)
    fractions, (tiled, tiled_negative) = predict(setting, token_tiles(setting[1].video, GRID, 1, 1))
    assert fractions == whole_fractions
    for ours, expected in ((tiled, whole), (tiled_negative, negative)):
        assert mx.allclose(ours.video, expected.video, atol=1e-6)
        assert mx.allclose(ours.audio, expected.audio, atol=1e-6)


def test_tiles_are_predicted_alone_and_blended(setting):
    model, states, _ = setting
    tiles = token_tiles(states.video, GRID, 1, 2)
    fractions, (tiled, _) = predict(setting, tiles)
    assert fractions[-1] == 1
    assert sorted(fractions) == fractions
    alone = [predict((model, states._replace(video=tile.of(states.video)), setting[2]), None)[1].x0 for tile in tiles]
    assert mx.allclose(tiled.video, blend(tiles, [x0.video for x0 in alone], states.video.tokens), atol=1e-5)
    assert mx.allclose(tiled.audio, (alone[0].audio + alone[1].audio) / 2, atol=1e-5)
    assert not mx.allclose(tiled.video, predict(setting, None)[1].x0.video, atol=1e-3)
