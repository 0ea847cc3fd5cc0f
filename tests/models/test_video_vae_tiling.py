"""Tiles are the reference's: where they lie, how they fade into each other, and what they give."""

import itertools
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from video_vae_cases import CountedNoise, error, filled, normal, small_config, together

import parity.video_vae
from mlx_ltx.models.video_tiling import (
    ByCount,
    BySize,
    Span,
    Tiling,
    complementary,
    decode_tiled,
    decoding_tiles,
    encode_tiled,
    encoding_tiles,
    weights,
)
from mlx_ltx.models.video_vae import VideoDecoder, VideoEncoder
from parity import Comparison, GoldenSet, NotCovered, runner_for

GOLDEN = Path(__file__).parents[1] / "golden"
NAME = "video_vae_23_tiled"


def test_every_recorded_tile_weight_and_result_is_reproduced():
    golden = GoldenSet(GOLDEN, NAME)
    results = list(runner_for(NAME)(golden))
    assert all(isinstance(result, Comparison) for result in results)
    compared = {f"{result.case}.{result.tensor}" for result in results}
    inputs = {f"{case}.{'latent' if case.startswith('dec') else 'video'}" for case in golden.cases}
    assert len(golden.cases) == 6
    assert set(golden.names) - compared - inputs == {
        f"{case}.tile{index}.mask{axis}"  # of batch and channels, always a single 1
        for case, facts in golden.cases.items()
        for index in range(len(facts["tiles"]))
        for axis in (0, 1)
    }
    for result in results:
        assert result.error < (1e-5 if result.tensor in ("latent", "video") else 1e-6), (result.case, result.tensor)


def test_the_comparison_notices_other_tiles(monkeypatch):
    golden = GoldenSet(GOLDEN, NAME)
    original = parity.video_vae.read_tiling
    monkeypatch.setattr(parity.video_vae, "decode_tiled", _decode_with_less_overlap)
    monkeypatch.setattr(parity.video_vae, "read_tiling", original)
    errors = {f"{r.case}.{r.tensor}": r.error for r in runner_for(NAME)(golden)}
    assert errors["dec_all.video"] > 1e-3
    assert errors["dec_all.tiles"] == 0
    golden.cases["other"] = {}
    assert NotCovered("other") in list(runner_for(NAME)(golden))


def _decode_with_less_overlap(decoder, latent, tiling):
    less = BySize(64, 0) if isinstance(tiling.width, BySize) else tiling.width
    return decode_tiled(decoder, latent, Tiling(tiling.frames, tiling.height, less))


# --- where tiles lie ---


@given(st.integers(1, 40), st.integers(2, 9), st.integers(0, 8), st.sampled_from([1, 8, 32]))
def test_tiles_of_a_size_cover_the_axis_and_overlap_as_asked(length, size, overlap, scale):
    way = BySize(size * scale, overlap * scale)
    if overlap >= size:
        with pytest.raises(ValueError, match="an overlap of"):
            way.spans(length, scale)
        return
    spans = way.spans(length, scale)
    assert (spans[0].start, spans[-1].stop, spans[0].fade_in, spans[-1].fade_out) == (0, length, 0, 0)
    assert all(span.stop - span.start == size for span in spans[:-1])
    assert len(spans) == 1 or length > size
    for before, after in itertools.pairwise(spans):
        assert before.stop - after.start == before.fade_out == after.fade_in == overlap
        assert after.stop > before.stop


@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 4))
def test_as_many_tiles_as_asked(length, count, overlap):
    way = ByCount(count, overlap)
    try:
        spans = way.spans(length, 8)
    except ValueError:
        assert count > length or (count > 1 and (length + overlap * (count - 1)) // count <= overlap)
        return
    assert len(spans) == count
    assert (spans[0].start, spans[-1].stop) == (0, length)
    sizes = [span.stop - span.start for span in spans]
    assert max(sizes) - min(sizes) <= 1
    for before, after in itertools.pairwise(spans):
        assert before.stop - after.start == before.fade_out == after.fade_in == overlap


def test_later_tiles_begin_a_latent_frame_early():
    tiles = decoding_tiles(Tiling(frames=BySize(32, 16)), (8, 1, 1), 8, 32)
    cuts = [tile.frames for tile in tiles]
    assert [(c.latents.start, c.latents.stop) for c in cuts] == [(0, 4), (1, 6), (3, 8)]
    assert [(c.pixels.start, c.pixels.stop) for c in cuts] == [(0, 25), (8, 41), (24, 57)]


def test_weights_by_hand():
    np.testing.assert_allclose(weights(6, 2, 3, from_zero=True), [0, 0.5, 1, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(weights(5, 3, 0, from_zero=False), [0.25, 0.5, 0.75, 1, 1])
    np.testing.assert_allclose(weights(2, 5, 0, from_zero=False), [1 / 3, 2 / 3])  # a ramp is no longer than the tile
    assert weights(3, 0, -7, from_zero=True).tolist() == [1, 1, 1]
    assert weights(3, 0, 0, from_zero=True).dtype == np.float32


def test_the_default_and_the_automatic_tiling():
    assert Tiling.default() == Tiling(BySize(80, 24), BySize(768, 64), BySize(768, 64))
    # 1920x1088 is 60x34 latents: round(24 * 34 / 60) = 14 rows
    assert Tiling.automatic(1088, 1920, 32) == Tiling(BySize(80, 24), BySize(14 * 32, 64), BySize(768, 64))
    assert Tiling.automatic(64, 3200, 32).height == BySize(96, 64)
    spans = Tiling.automatic(1088, 1920, 32).height.spans(34, 32)
    assert spans == [Span(0, 14, 0, 2), Span(12, 26, 2, 2), Span(24, 34, 2, 0)]


def test_weights_that_add_up_are_recognised():
    def adds_up(tiling, shape):
        return complementary(decoding_tiles(tiling, shape, 8, 32), pixels=True)

    assert adds_up(Tiling(), (3, 3, 3))
    assert adds_up(Tiling(BySize(32, 16), None, BySize(96, 32)), (9, 3, 8))
    assert not adds_up(Tiling(None, None, BySize(96, 64)), (1, 1, 5))  # three tiles meet
    encoding = encoding_tiles(Tiling(BySize(24, 16)), (6, 1, 1), 8, 32)
    assert not complementary(encoding, pixels=False)


# --- what they give ---


def test_one_tile_is_the_exact_decode():
    decoder = filled(VideoDecoder(small_config()))
    latent = normal((1, 3, 3, 3, 4))
    exact = decoder(latent, None, CountedNoise())
    for tiling in (Tiling(), Tiling(BySize(400, 8), BySize(400, 8), ByCount(1))):
        assert error(together(decode_tiled(decoder, latent, tiling, None, CountedNoise())), exact) < 1e-6
    encoder = filled(VideoEncoder(small_config()))
    video = normal((1, 9, 8, 12, 3))
    assert error(encode_tiled(encoder, video, Tiling()), encoder(video)) < 1e-6


@pytest.mark.parametrize(
    "tiling",
    [
        Tiling(BySize(16, 8), BySize(16, 8), BySize(16, 8)),
        Tiling(BySize(8, 4), None, BySize(12, 8)),
        Tiling(None, ByCount(3, 1), None),
    ],
)
def test_tiles_give_about_the_exact_decode_in_chunks(tiling):
    decoder = filled(VideoDecoder(small_config(timestep_conditioning=True)))
    latent = normal((2, 7, 9, 8, 4))
    exact = decoder(latent, None, lambda shape: mx.zeros(shape))
    chunks = list(decode_tiled(decoder, latent, tiling, 0.05, lambda shape: mx.zeros(shape)))
    assert (len(chunks) == 1) == (tiling.frames is None)
    tiled = together(chunks)
    assert 1e-4 < error(tiled, exact) < 0.6
    assert bool(mx.isfinite(tiled).all())


def test_bfloat16_is_blended_in_float32():
    decoder = filled(VideoDecoder(small_config()), dtype=mx.bfloat16)
    latent = normal((1, 5, 4, 4, 4)).astype(mx.bfloat16)
    tiling = Tiling(BySize(8, 4), BySize(8, 4), BySize(8, 4))
    chunks = list(decode_tiled(decoder, latent, tiling, None, CountedNoise()))
    assert {chunk.dtype for chunk in chunks} == {mx.bfloat16}
    encoder = filled(VideoEncoder(small_config()), dtype=mx.bfloat16)
    assert encode_tiled(encoder, normal((1, 9, 16, 12, 3)), Tiling(None, ByCount(2, 1), None)).dtype == mx.bfloat16


@pytest.mark.parametrize(
    ("way", "message"),
    [
        (BySize(32, 0), "tiles of 32 are not supported, only multiples of 32 from 64 on"),
        (BySize(100, 0), "tiles of 100 are not supported"),
        (BySize(96, 96), "an overlap of 96 is not a multiple of 32 below 96"),
        (BySize(96, 40), "an overlap of 40"),
        (BySize(96, -32), "an overlap of -32"),
        (ByCount(0), "8 latents cannot be split into 0 tiles"),
        (ByCount(9), "8 latents cannot be split into 9 tiles"),
        (ByCount(4, 7), "4 tiles of 8 latents cannot overlap by 7"),
        (ByCount(2, -1), "cannot overlap by -1"),
    ],
)
def test_tiles_that_cannot_be_are_refused(way, message):
    with pytest.raises(ValueError, match=message):
        way.spans(8, 32)


def test_encoding_needs_wide_overlaps_and_whole_clips():
    for tiling, message in (
        (Tiling(BySize(32, 8)), "frames: an overlap of 8 is too small"),
        (Tiling(height=BySize(128, 32)), "height: an overlap of 32 is too small"),
        (Tiling(width=BySize(128, 32)), "width: an overlap of 32 is too small"),
    ):
        with pytest.raises(ValueError, match=message):
            encoding_tiles(tiling, (9, 8, 8), 8, 32)
    encoder = VideoEncoder(small_config())
    with pytest.raises(ValueError, match="8 frames cannot be encoded"):
        encode_tiled(encoder, mx.zeros((1, 8, 8, 8, 3)), Tiling())
    with pytest.raises(ValueError, match="frames of 10x8 cannot be encoded"):
        encode_tiled(encoder, mx.zeros((1, 5, 8, 10, 3)), Tiling())
