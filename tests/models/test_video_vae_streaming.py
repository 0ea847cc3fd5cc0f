"""Streaming gives what a decode or encode at once gives, whatever the pieces, and keeps no more than it says."""

import itertools
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from video_vae_cases import THREE_TIMES, CountedNoise, error, filled, normal, small_config, together

from mlx_ltx.memory import video_vae as video_vae_memory
from mlx_ltx.memory.networks import module_bytes
from mlx_ltx.memory.video_vae import band_cost, decoding_work, encoding_work, tiled_decoding_work, working_bytes
from mlx_ltx.models import streaming, video_vae_blocks
from mlx_ltx.models.streaming import Rows, chain, feed, reach, run
from mlx_ltx.models.video_tiling import BySize, Tiling, decode_tiled
from mlx_ltx.models.video_vae import VideoDecoder, VideoEncoder, VideoVaeConfig
from mlx_ltx.models.video_vae_blocks import Conditions, ConvStage, Downsample, PaddedConv, ResnetBlock

GOLDEN = Path(__file__).parents[1] / "golden"
REAL = json.loads((GOLDEN / "real_configs.json").read_text())
PADDINGS = ["zeros", "reflect", "replicate"]
SPLITS = [1, 40, 300, 4000]  # elements of a piece: single rows, some rows, some frames, all


def padded(x: mx.array, causal: bool, padding: str) -> mx.array:
    """The clip with copies of frames around it in time, and what the padding mode says in space; made by NumPy."""
    array = np.array(x)
    array = np.concatenate([array[:, :1]] * (2 if causal else 1) + [array] + ([] if causal else [array[:, -1:]]), 1)
    mode = {"zeros": "constant", "reflect": "reflect", "replicate": "edge"}[padding]
    return mx.array(np.pad(array, [(0, 0), (0, 0), (1, 1), (1, 1), (0, 0)], mode=mode))


# --- one convolution ---


@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=4),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from(PADDINGS),
    st.sampled_from([(1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 2, 2)]),
    st.sampled_from([1, 12, 30, 1000, None]),
)
@settings(max_examples=80, deadline=None)
def test_a_convolution_in_pieces_is_that_of_the_padded_clip(sizes, half, causal, padding, stride, elements):
    conv = filled(PaddedConv(2, 3, padding, stride))
    height, total = 2 * half, sum(sizes)
    clip = normal((1, total, height, 4, 2), seed=7)
    expected = mx.conv3d(padded(clip, causal, padding), conv.conv.weight, stride=stride) + conv.conv.bias
    if stride[0] == 2 and not causal and total % 2 == 0:
        expected = expected[:, : total // 2]
    starts = np.cumsum([0, *sizes])
    pieces = [clip[:, a:b] for a, b in itertools.pairwise(starts)]
    assert error(together(run([ConvStage(conv, causal)], pieces, elements)), expected) < 1e-6


@given(st.integers(1, 3), st.integers(1, 4), st.sampled_from(PADDINGS), st.sampled_from([1, 12, 50, None]))
@settings(max_examples=40, deadline=None)
def test_downsampling_in_pieces_is_that_at_once(pairs, half, padding, elements):
    layer = filled(Downsample(2, 16, (2, 2, 2), padding))
    clip = normal((1, 2 * pairs + 1, 2 * half, 4, 2))
    whole = together(run(layer.stages(Conditions(True)), [clip], None))
    assert whole.shape == (1, pairs + 1, half, 2, 16)
    assert error(together(run(layer.stages(Conditions(True)), [clip], elements)), whole) < 1e-6


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2)])
def test_bands_within_a_convolution_are_exact_and_small(monkeypatch, padding, stride):
    conv = filled(PaddedConv(3, 5, padding, stride))
    x = normal((2, 7, 10, 6, 3))
    whole = conv(x)
    unfolded = []
    original = mx.conv_general

    def spy(part, weight, stride, padding):
        y = original(part, weight, stride=stride, padding=padding)
        unfolded.append(y.size // weight.shape[0] * weight[0].size)
        return y

    monkeypatch.setattr(mx, "conv_general", spy)
    assert mx.array_equal(conv(x), whole)
    assert len(unfolded) == 1
    line = unfolded[0] // (whole.shape[1] * whole.shape[2])  # of one row of one frame
    for limit in (1, 3 * line, 2 * whole.shape[2] * line):
        unfolded.clear()
        monkeypatch.setattr(video_vae_blocks, "UNFOLDED_ELEMENTS", limit)
        assert error(conv(x), whole) < 1e-6
        assert len(unfolded) > 1
        assert max(unfolded) <= max(limit, line)


def test_the_default_limits_keep_arrays_far_from_where_mlx_fails():
    assert max(streaming.ELEMENTS_PER_PIECE, video_vae_blocks.UNFOLDED_ELEMENTS) < video_vae_blocks.LARGEST_ARRAY
    assert video_vae_blocks.LARGEST_ARRAY <= 1 << 30


# --- the decoder ---


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padding", PADDINGS)
def test_streamed_frames_are_those_of_the_whole_decode(padding, causal, timed):
    config = small_config(spatial_padding_mode=padding, causal_decoder=causal, timestep_conditioning=timed)
    decoder = filled(VideoDecoder(config))
    for frames in (1, 2, 3, 6):
        latent = normal((2, frames, 3, 3, 4))
        timestep = mx.array([0.05, 0.3]) if timed else None
        noise = CountedNoise()
        whole = together(decoder.stream(latent, timestep, noise, elements=None))
        assert whole.shape == (2, 1 + 4 * (frames - 1), 12, 12, 3)
        for elements in SPLITS:
            again = CountedNoise()
            streamed = together(decoder.stream(latent, timestep, again, elements=elements))
            assert error(streamed, whole) < 1e-5
            assert again.shapes == noise.shapes
        assert error(decoder(latent, timestep, CountedNoise()), whole) < 1e-5
        assert noise.shapes == ([(2, frames, 3, 3, 4)] if timed else []) + [(3, 3), (3, 3), (6, 6), (6, 6)]
        if frames > 1:  # the noise and the timestep matter, so the comparison says something of them
            assert error(decoder(latent, timestep, normal), whole) > 1e-3
            assert not timed or error(decoder(latent, 0.9, CountedNoise()), whole) > 1e-3


def test_a_norm_over_the_whole_clip_waits_for_all_frames():
    blocks = [["res_x", 1], ["compress_all", {"multiplier": 2}], ["res_x_y", {}], ["compress_time", {}], ["res_x", 1]]
    decoder = filled(VideoDecoder(small_config(decoder_blocks=blocks, spatial_padding_mode="zeros")))
    latent = normal((1, 5, 4, 3, 4))
    whole = together(decoder.stream(latent, elements=None))
    assert error(together(decoder.stream(latent, elements=30)), whole) < 1e-5
    assert error(decoder(latent[:, :4]), whole[:, :13]) > 1e-3  # the last latent frame reaches the first frames
    with pytest.raises(ValueError, match="norm over the whole clip"):
        decoder.stream(latent, bands=2)


# --- picture bands ---


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padding", PADDINGS)
def test_a_picture_in_bands_is_the_whole_picture(padding, causal, timed):
    config = small_config(spatial_padding_mode=padding, causal_decoder=causal, timestep_conditioning=timed)
    decoder = filled(VideoDecoder(config))
    latent = normal((1, 3, 23, 2, 4))
    whole = together(decoder.stream(latent, None, CountedNoise(), elements=None))
    for bands, elements in ((2, 1000), (3, 100), (4, None)):
        noise = CountedNoise()
        pieces = list(decoder.stream(latent, None, noise, bands=bands, elements=elements))
        assert error(together(pieces), whole) < 1e-5
        assert {piece.shape[2:] for piece in pieces} == {whole.shape[2:]}
        assert pieces[0].shape[1] == 0  # a sign of life before the last band
        assert len(noise.shapes) == (5 if timed else 4)  # all bands share the draws


def test_the_halo_is_as_wide_as_it_must_be(monkeypatch):
    decoder = filled(VideoDecoder(small_config(spatial_padding_mode="zeros")))
    # Upwards from the pixels: output 1, residual block 2, convolution 1, two residual blocks 4; half of these 8 at half
    # the height; there convolution 1, residual block 2, input 1.
    assert decoder.halo == 8
    latent = normal((1, 1, 40, 2, 4))
    whole = together(decoder.stream(latent, None, CountedNoise(), elements=None))
    assert error(together(decoder.stream(latent, None, CountedNoise(), bands=2)), whole) < 1e-6
    read = [rows for _, rows in decoder.band_rows(40, 2)]
    assert read == [Rows(0, 28, 40), Rows(12, 40, 40)]
    # The first row of latents that the lower half's first pixels depend on, by changing one after the other.
    changed = [_with_row_changed(decoder, latent, row) for row in (11, 12)]
    differ = [float(mx.abs(video - whole)[:, :, 80].max()) > 0 for video in changed]
    assert differ == [False, True]
    monkeypatch.setattr(VideoDecoder, "halo", 7)
    with pytest.raises((AssertionError, IndexError)):
        assert error(together(decoder.stream(latent, None, CountedNoise(), bands=2)), whole) < 1e-6


def _with_row_changed(decoder: VideoDecoder, latent: mx.array, row: int) -> mx.array:
    change = mx.zeros(latent.shape)
    change[:, :, row] = 10.0
    return together(decoder.stream(latent + change, None, CountedNoise(), elements=None))


@pytest.mark.parametrize(
    ("version", "halo"),
    [
        ("2.3", 16),
        # 11 at the full size, 6 + 11 at a half, 9 + 11 at a quarter, 10 + 11 and the first convolution
        ("19b", 22),
    ],
)
def test_published_decoders_need_these_halos(version, halo):
    """What is not a number reaches all that depends on it, however weakly."""
    decoder = filled(VideoDecoder(narrow(version, 4)))
    assert decoder.halo == halo
    latent = normal((1, 1, 2 * halo + 6, 2, 16))
    latent[:, :, halo + 3] = float("nan")
    reached = np.array(mx.isnan(decoder(latent, noise=CountedNoise())).any(axis=(0, 1, 3, 4)))
    rows = np.flatnonzero(reached) // 32
    assert (rows[0], rows[-1]) == (3, 2 * halo + 3)


@pytest.mark.parametrize("version", ["2.3", "19b"])
def test_published_block_lists_give_the_same_in_any_pieces(version):
    decoder = filled(VideoDecoder(narrow(version, 4)))
    for frames in (1, 2, 4):
        latent = normal((1, frames, 2, 3, 16))
        whole = together(decoder.stream(latent, None, CountedNoise(), elements=None))
        assert whole.shape == (1, 8 * frames - 7, 64, 96, 3)
        for elements in (200, 5000):
            assert error(together(decoder.stream(latent, None, CountedNoise(), elements=elements)), whole) < 1e-5


def test_a_picture_of_too_few_rows_is_refused():
    decoder = VideoDecoder(small_config())
    for bands in (0, 4):
        with pytest.raises(ValueError, match=f"3 rows of latents cannot be split into {bands} bands"):
            decoder.stream(normal((1, 2, 3, 3, 4)), None, CountedNoise(), bands=bands)


def test_waiting_bands_go_to_the_queue_that_is_given():
    decoder = filled(VideoDecoder(small_config(spatial_padding_mode="zeros")))
    latent = normal((1, 3, 9, 2, 4))
    made = []

    class Queue(list):
        def __init__(self):
            super().__init__()
            made.append(self)
            self.shapes = []

        def append(self, frame):
            self.shapes.append(frame.shape)
            super().append(np.array(frame))

        def popleft(self):
            return mx.array(self.pop(0))

    whole = together(decoder.stream(latent, None, CountedNoise(), elements=None))
    assert error(together(decoder.stream(latent, None, CountedNoise(), bands=3, aside=Queue)), whole) < 1e-5
    assert [set(queue.shapes) for queue in made] == [{(1, 1, 12, 8, 3)}] * 2
    assert [len(queue.shapes) for queue in made] == [9, 9]
    assert made == [[], []]


# --- the encoder ---


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4), st.sampled_from(PADDINGS), st.sampled_from([1, 50, 400, None])
)
@settings(max_examples=25, deadline=None)
def test_an_encoder_takes_a_clip_in_any_pieces(sizes, padding, elements):
    blocks = [["res_x", 1], ["compress_all_res", {}], ["compress_time", {}], ["res_x_y", {}], ["compress_time_res", {}]]
    encoder = filled(
        VideoEncoder(small_config(encoder_blocks=blocks, decoder_blocks=THREE_TIMES, spatial_padding_mode=padding))
    )
    sizes = [*sizes, 1 + -sum(sizes) % 8]
    video = normal((1, sum(sizes), 8, 12, 3))
    starts = np.cumsum([0, *sizes])
    whole = together(encoder.stream([video], elements=None))
    assert whole.shape == (1, 1 + sum(sizes) // 8, 2, 3, 4)
    pieces = (video[:, a:b] for a, b in itertools.pairwise(starts))
    assert error(together(encoder.stream(pieces, elements=elements)), whole) < 1e-5
    assert error(encoder(video), whole) < 1e-5


def test_an_encoder_reads_no_further_than_it_must():
    encoder = filled(VideoEncoder(small_config()))
    read = []

    def clip():
        for index in range(41):
            read.append(index)
            yield normal((1, 1, 8, 8, 3), seed=index)

    latents = encoder.stream(clip())
    next(latents)
    assert len(read) < 10


def test_a_stream_of_frames_that_is_cut_short_is_refused():
    encoder = filled(VideoEncoder(small_config()))
    for frames in (4, 6):
        with pytest.raises(ValueError, match=f"{frames} frames cannot be encoded, only 1"):
            list(encoder.stream(normal((1, 1, 8, 8, 3)) for _ in range(frames)))
    with pytest.raises(ValueError, match="0 frames cannot be encoded"):
        list(encoder.stream([]))
    with pytest.raises(ValueError, match="frames of 10x8 cannot be encoded"):
        list(encoder.stream([mx.zeros((1, 1, 8, 10, 3))]))


# --- memory ---


@pytest.mark.parametrize(("elements", "extra"), [(4 * 6 * 4, 0), (4 * 6 * 4 // 3, 3)])
@pytest.mark.parametrize("causal", [False, True])
def test_a_residual_block_keeps_four_frames(causal, elements, extra):
    """Between pieces of whole frames; between pieces of rows, also a row or two whose output is not due yet."""
    (stage,) = filled(ResnetBlock(4, 4, "zeros")).stages(Conditions(causal))
    clip = (normal((1, 1, 4, 6, 4), seed=index) for index in range(9))
    rows = []
    for _ in chain([stage], feed(clip), elements):
        rows.append(sum(array.shape[1] * array.shape[2] for array in stage.kept()))
    steady = rows[len(rows) // 3 : -len(rows) // 3]
    assert steady
    assert max(steady) <= 4 * 4 + 2 * extra
    assert min(steady) >= 4 * 4
    assert stage.kept() == []


def peak(frames) -> int:
    """MLX's peak beside what there is before, while the frames come."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for piece in frames:
        del piece
    return mx.get_peak_memory() - before


def narrow(version: str, channels: int) -> VideoVaeConfig:
    """A real block list with fewer channels."""
    vae = {**REAL[version]["vae"], "decoder_base_channels": channels, "latent_channels": 16}
    return VideoVaeConfig.from_metadata({"vae": vae})


def test_peak_memory_does_not_depend_on_the_number_of_frames():
    decoder = filled(VideoDecoder(narrow("2.3", 4)))
    peaks = []
    for frames in (33, 121):
        latent = normal((1, 1 + frames // 8, 4, 4, 16))
        mx.eval(latent)
        peaks.append(peak(decoder.stream(latent, elements=1 << 13)))
    assert 0.97 < peaks[1] / peaks[0] < 1.03
    latent = normal((1, 5, 4, 4, 16))
    mx.eval(latent)
    assert peak(decoder.stream(latent, elements=None)) > 2 * peaks[0]


def test_peak_memory_of_encoding_does_not_depend_on_the_number_of_frames():
    encoder = filled(VideoEncoder(small_config(latent_channels=16)))
    peaks = []
    for frames in (33, 121):
        clip = (mx.zeros((1, 1, 32, 32, 3)) for _ in range(frames))
        peaks.append(peak(encoder.stream(clip, elements=1 << 13)))
    assert 0.97 < peaks[1] / peaks[0] < 1.03


def scale_limits(monkeypatch, elements: int) -> None:
    """Pieces and convolutions as much smaller than by default as the networks here are than real ones."""
    for module in (video_vae_blocks, video_vae_memory):
        monkeypatch.setattr(module, "UNFOLDED_ELEMENTS", 2 * elements)
    assert 2 * elements < video_vae_blocks.LARGEST_ARRAY


class Forget(list):
    """A queue that keeps no frames."""

    def append(self, frame):
        self.shape = frame.shape

    def popleft(self):
        return mx.zeros(self.shape)


@pytest.mark.parametrize(
    ("version", "channels", "height", "width", "frames", "bands", "elements"),
    [
        ("19b", 16, 4, 8, 2, 1, 1 << 14),
        ("2.3", 16, 8, 6, 2, 1, 1 << 14),
        ("2.3", 8, 24, 2, 2, 2, 1 << 13),
        ("2.3", 8, 32, 3, 2, 3, 1 << 13),
        ("2.3", 16, 9, 4, 2, 1, 1 << 15),
        ("2.3", 16, 3, 4, 4, 1, 1 << 16),
    ],
)
def test_the_predicted_peak_is_the_measured_one(monkeypatch, version, channels, height, width, frames, bands, elements):
    scale_limits(monkeypatch, elements)
    config = narrow(version, channels)
    decoder = filled(VideoDecoder(config))
    latent = normal((1, frames, height, width, 16))
    mx.eval(latent)
    held = module_bytes(decoder, mx.float32)
    measured = peak(decoder.stream(latent, bands=bands, aside=Forget, elements=elements))
    size = {"height": 32 * height, "width": 32 * width, "frames": 1 + 8 * (frames - 1)}
    predicted = decoding_work(config, **size, dtype=mx.float32, bands=bands, elements=elements)
    assert 0.85 < (held + predicted) / (held + measured) < 1.15
    if height * width > 20:  # also beside the weights, unless a piece is as large as all that is kept
        assert 0.85 < predicted / measured < 1.15
    half = decoding_work(config, **size, dtype=mx.bfloat16, bands=bands, elements=elements)
    assert 2 * half == pytest.approx(predicted, rel=1e-3)


@pytest.mark.parametrize(
    ("latents", "tiling"),
    [
        ((3, 8, 6), Tiling(None, BySize(160, 64), BySize(160, 64))),
        ((3, 8, 6), Tiling(BySize(16, 8))),
        ((8, 6, 6), Tiling(BySize(32, 8), BySize(128, 64), BySize(128, 64))),
    ],
)
def test_the_predicted_peak_of_blended_tiles_is_the_measured_one(latents, tiling):
    config = narrow("2.3", 8)
    decoder = filled(VideoDecoder(config))
    frames, height, width = latents
    latent = normal((1, frames, height, width, 16))
    mx.eval(latent)
    measured = peak(decode_tiled(decoder, latent, tiling))
    predicted = tiled_decoding_work(config, 32 * height, 32 * width, mx.float32, 1 + 8 * (frames - 1), tiling)
    assert 0.85 < predicted / measured < 1.15


def test_the_predicted_peak_of_encoding_is_the_measured_one(monkeypatch):
    scale_limits(monkeypatch, 1 << 13)
    blocks = [["compress_space_res", {}], ["res_x", 2], ["compress_all_res", {}], ["res_x", 4]]
    other = [["compress_all", {}], ["compress_space", {}]]
    config = small_config(latent_channels=16, encoder_blocks=blocks, decoder_blocks=other)
    encoder = filled(VideoEncoder(config))
    measured = peak(encoder.stream((mx.zeros((1, 1, 128, 96, 3)) for _ in range(9)), elements=1 << 13))
    weights = module_bytes(encoder, mx.float32)
    predicted = weights + encoding_work(config, 128, 96, mx.float32, elements=1 << 13)
    assert 0.85 < predicted / (measured + weights) < 1.15


GB = 1 << 30


def test_4k_fits_where_it_should():
    config = VideoVaeConfig.from_metadata(REAL["2.3"])
    weights = module_bytes(VideoDecoder(config), mx.bfloat16)
    peaks = {bands: weights + decoding_work(config, 2176, 3840, mx.bfloat16, bands=bands) for bands in (1, 2, 3, 4)}
    assert peaks[1] <= 8 * GB
    assert peaks[2] <= 5 * GB
    assert peaks[3] <= 4.2 * GB
    assert peaks[4] < peaks[3]
    assert band_cost(config, 2176, 1) == 1
    assert band_cost(config, 2176, 2) < 1.15
    assert band_cost(config, 2176, 3) < 1.3


def test_what_is_kept_at_4k_is_two_frames_per_convolution():
    """By hand, for LTX-2.3's decoder: channels, rows of 32 pixels' height, number of convolutions at that size."""
    config = VideoVaeConfig.from_metadata(REAL["2.3"])
    decoder = VideoDecoder(config)
    stages = [stage for chain in decoder.chains(decoder.no_conditions()) for stage in chain]
    latent = 68 * 120
    frames = 2 * latent * (128 * 1 + 1024 * 5 + 512 * 4 * 5 + 512 * 16 * 9 + 256 * 16 * 13 + 128 * 64 * 9)
    waiting = latent * (512 * 4 + 512 * 16 + 256 * 16)  # the second of two frames, after each layer that doubles time
    total = working_bytes(stages, 128, Rows(0, 68, 68), 120, float("inf"), mx.bfloat16) / 2
    assert frames + waiting < total < 1.04 * (frames + waiting)


def test_how_far_a_chain_reaches():
    conv = PaddedConv(2, 2, "zeros")
    assert reach([]) == 0
    assert reach([ConvStage(conv, True)] * 3) == 3
    assert reach([ConvStage(conv, True, factor=4), ConvStage(conv, True)]) == 2
