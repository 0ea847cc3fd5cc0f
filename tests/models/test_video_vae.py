import copy
import itertools
import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_unflatten

import parity.video_vae
from mlx_ltx.checkpoints.files import SafetensorsFile
from mlx_ltx.checkpoints.keymaps import VIDEO_DECODER, VIDEO_ENCODER
from mlx_ltx.checkpoints.loading import load_weights, published_shapes
from mlx_ltx.errors import UserError
from mlx_ltx.models.streaming import Stage, Window, run
from mlx_ltx.models.video_vae import VideoDecoder, VideoEncoder, VideoVaeConfig
from mlx_ltx.models.video_vae_blocks import (
    ChannelStatistics,
    Conditions,
    ResnetBlock,
    depth_to_space,
    patchify,
    space_to_depth,
    unpatchify,
)
from parity import Comparison, GoldenSet, NotCovered, runner_for

GOLDEN = Path(__file__).parents[1] / "golden"
REAL = json.loads((GOLDEN / "real_configs.json").read_text())
SETS = ["video_vae_19b", "video_vae_23", "video_vae_timestep_noise"]


def error(actual: mx.array, expected: mx.array) -> float:
    assert actual.shape == expected.shape
    return float(mx.linalg.norm((actual - expected).flatten()) / mx.linalg.norm(expected.flatten()))


def together(pieces) -> mx.array:
    return mx.concatenate(list(pieces), axis=1)


def filled(module, seed=0, dtype=mx.float32):
    """The module with every parameter random, tables and statistics too (they start as zeros and ones)."""
    mx.random.seed(seed)
    values = [
        (path, (0.3 * mx.random.normal(value.shape) + (1.0 if path.endswith("std") else 0.0)).astype(dtype))
        for path, value in tree_flatten(module.parameters())
        if not path.endswith("timestep_scale_multiplier")
    ]
    module.update(tree_unflatten(values))
    mx.eval(module.parameters())
    return module


def normal(shape, seed=1):
    return mx.random.normal(shape, key=mx.random.key(seed))


class CountedNoise:
    """Draws that depend only on how many were made before."""

    def __init__(self):
        self.shapes = []

    def __call__(self, shape):
        self.shapes.append(shape)
        return normal(shape, seed=100 + len(self.shapes))


def small_config(**changes) -> VideoVaeConfig:
    """All kinds of decoder block with a norm per pixel: twice as large, four times as long."""
    vae = {
        "latent_channels": 4,
        "encoder_blocks": [["compress_all_res", {}], ["compress_time_res", {}], ["res_x", 1]],
        "decoder_blocks": [
            ["res_x", {"num_layers": 1, "inject_noise": True}],
            ["compress_time", {"multiplier": 2}],
            ["res_x", {"num_layers": 2}],
            ["compress_all", {"residual": True, "multiplier": 2}],
            ["res_x", {"num_layers": 1, "inject_noise": True}],
        ],
        "decoder_base_channels": 4,
        "timestep_conditioning": False,
        "patch_size": 2,
    }
    return VideoVaeConfig.from_metadata({"vae": {**vae, **changes}})


@pytest.mark.parametrize("name", SETS)
def test_every_recorded_output_is_reproduced(name):
    golden = GoldenSet(GOLDEN, name)
    results = list(runner_for(name)(golden))
    assert all(isinstance(result, Comparison) for result in results)
    compared = {f"{result.case}.{result.tensor.split(',')[0]}" for result in results}
    inputs = {key for key in golden.names if ".noise." in key}
    inputs |= {key for key in golden.names if key.startswith("encode") and key.endswith("video")}
    inputs |= {key for key in golden.names if key.startswith("decode") and key.endswith("latent")}
    assert compared == set(golden.names) - inputs
    for result in results:
        assert result.error < 1e-5, (result.case, result.tensor, result.error)


def test_the_comparison_notices_another_padding(monkeypatch):
    golden = GoldenSet(GOLDEN, "video_vae_19b")
    original = VideoVaeConfig.from_metadata

    def with_zeros(config):
        return original({"vae": {**config["vae"], "spatial_padding_mode": "zeros"}})

    monkeypatch.setattr(VideoVaeConfig, "from_metadata", with_zeros)
    errors = {f"{r.case}.{r.tensor}": r.error for r in runner_for("video_vae_19b")(golden)}
    assert errors["decode.video, whole"] > 1e-2
    assert errors["encode.latent"] < 1e-5  # 19B's encoder pads with zeros as it is


def test_tiled_sets_and_unknown_cases_are_not_covered():
    assert runner_for("video_vae_23_tiled") is None
    assert runner_for("video_vae_27_tilted") is not None
    golden = GoldenSet(GOLDEN, "video_vae_timestep_noise")
    golden.tensors["dec_time.video"] = golden.tensors["decode.video"]
    assert NotCovered("dec_time") in list(runner_for(golden.name)(golden))


def test_files_of_one_component_have_bare_keys(tmp_path):
    source = SafetensorsFile(GOLDEN / "video_vae_23.ckpt.safetensors")
    arrays = {key.removeprefix("vae."): array for key, array in source.arrays.items()}
    arrays["per_channel_statistics.mean-of-stds"] = mx.zeros(8)  # 19B's file has such, and nothing reads them
    mx.save_safetensors(str(tmp_path / "bare.safetensors"), arrays, metadata=source.metadata)
    bare = SafetensorsFile(tmp_path / "bare.safetensors")
    config = VideoVaeConfig.from_metadata(bare.config)
    latent = normal((1, 2, 2, 2, 8))
    video = load_weights(VideoDecoder(config), bare, VIDEO_DECODER)(latent)
    assert mx.array_equal(video, load_weights(VideoDecoder(config), source, VIDEO_DECODER)(latent))
    load_weights(VideoEncoder(config), bare, VIDEO_ENCODER)
    del arrays["per_channel_statistics.std-of-means"]
    mx.save_safetensors(str(tmp_path / "less.safetensors"), arrays, metadata=source.metadata)
    with pytest.raises(UserError, match=r"missing \(statistics.std\)"):
        load_weights(VideoDecoder(config), SafetensorsFile(tmp_path / "less.safetensors"), VIDEO_DECODER)


@pytest.mark.parametrize("version", ["19b", "2.3"])
def test_real_config_gives_the_published_keys_and_shapes(version):
    published = {}
    for line in (GOLDEN / "keys" / f"{version}_video_vae.txt").read_text().splitlines():
        if not line.startswith("#"):
            key, shape = line.split("\t")
            published[key] = tuple(json.loads(shape))
    config = VideoVaeConfig.from_metadata(REAL[version])
    assert (config.time_scale, config.space_scale, config.latent_channels) == (8, 32, 128)
    used = set()
    for module, keymap in ((VideoEncoder(config), VIDEO_ENCODER), (VideoDecoder(config), VIDEO_DECODER)):
        selected = keymap.select(published)
        used |= set(selected.values())
        assert published_shapes(module) == {path: published[key] for path, key in selected.items()}
    assert used == set(published)


# --- streaming ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padding", ["zeros", "reflect", "replicate"])
def test_streamed_frames_are_those_of_the_whole_decode(padding, causal, timed):
    config = small_config(spatial_padding_mode=padding, causal_decoder=causal, timestep_conditioning=timed)
    decoder = filled(VideoDecoder(config))
    for frames in (1, 2, 3, 6):
        latent = normal((2, frames, 2, 3, 4))
        timestep = mx.array([0.05, 0.3]) if timed else None
        noise = CountedNoise()
        whole = together(decoder.stream(latent, timestep, noise, pixels=None))
        assert whole.shape == (2, 1 + 4 * (frames - 1), 8, 12, 3)
        for pixels in (1, 13):
            again = CountedNoise()
            streamed = together(decoder.stream(latent, timestep, again, pixels=pixels))
            assert error(streamed, whole) < 1e-5
            assert again.shapes == noise.shapes
        assert error(decoder(latent, timestep, CountedNoise()), whole) < 1e-5
        assert noise.shapes == ([(2, frames, 2, 3, 4)] if timed else []) + [(2, 3), (2, 3), (4, 6), (4, 6)]
        if frames > 1:  # the noise and the timestep matter, so the comparison says something of them
            assert error(decoder(latent, timestep, normal), whole) > 1e-3
            assert not timed or error(decoder(latent, 0.9, CountedNoise()), whole) > 1e-3


def test_a_norm_over_the_whole_clip_waits_for_all_frames():
    blocks = [["res_x", 1], ["compress_all", {"multiplier": 2}], ["res_x_y", {}], ["compress_time", {}], ["res_x", 1]]
    decoder = filled(VideoDecoder(small_config(decoder_blocks=blocks, spatial_padding_mode="zeros")))
    latent = normal((1, 5, 2, 3, 4))
    whole = together(decoder.stream(latent, pixels=None))
    assert error(together(decoder.stream(latent, pixels=1)), whole) < 1e-5
    assert error(decoder(latent[:, :4]), whole[:, :13]) > 1e-3  # the last latent frame reaches the first frames


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.booleans(), st.sampled_from([1, 2]))
@settings(max_examples=50, deadline=None)
def test_windows_are_those_of_the_padded_clip(sizes, causal, step):
    total = sum(sizes)
    clip = mx.arange(total)[None]
    padded = [0] * (2 if causal else 1) + list(range(total)) + ([] if causal else [total - 1])
    expected = [padded[start : start + 3] for start in range(0, len(padded) - 2, step)]
    window, seen, start = Window(causal, step), [], 0
    for number, size in enumerate(sizes):
        frames = window.push(clip[:, start : start + size], last=number == len(sizes) - 1)
        start += size
        if frames is not None:
            array = frames.array[0].tolist()
            seen += [array[i : i + 3] for i in range(0, len(array) - 2, step)]
            inside = max(0, frames.first)
            assert frames.at(inside, 1)[0].tolist() == [inside]
    assert seen == expected
    assert window.kept() == []


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.sampled_from(["zeros", "reflect", "replicate"]))
@settings(max_examples=20, deadline=None)
def test_encoder_stages_take_a_clip_in_any_pieces(sizes, padding):
    blocks = [["res_x", 1], ["compress_all_res", {}], ["compress_time", {}], ["res_x_y", {}], ["compress_time_res", {}]]
    encoder = VideoEncoder(
        small_config(encoder_blocks=blocks, decoder_blocks=THREE_TIMES, spatial_padding_mode=padding)
    )
    filled(encoder)
    sizes = [*sizes, 1 + -sum(sizes) % 8]
    assert sum(sizes) % 8 == 1
    video = normal((1, sum(sizes), 8, 12, 3))
    starts = np.cumsum([0, *sizes])
    pieces = [patchify(video[:, a:b], 2) for a, b in itertools.pairwise(starts)]
    stages = [stage for chain in encoder.chains() for stage in chain]
    assert error(together(run(stages, pieces)), encoder(video)) < 1e-5


THREE_TIMES = [["compress_time", {}], ["compress_time", {}], ["compress_all", {}]]


@pytest.mark.parametrize("causal", [False, True])
def test_a_residual_block_keeps_four_frames(causal):
    (stage,) = filled(ResnetBlock(4, 4, "zeros")).stages(Conditions(causal))
    for number in range(6):
        list(run([OnlyPush(stage)], [normal((1, 1, 2, 2, 4))], pixels=None))
        if number >= 3:
            assert sum(array.shape[1] for array in stage.kept()) == 4


class OnlyPush(Stage):
    """A stage that is never told of the last frame."""

    def __init__(self, stage):
        self.stage = stage

    def push(self, x, last):
        return self.stage.push(x, False)

    def kept(self):
        return self.stage.kept()


def test_memory_does_not_grow_with_the_clip_and_frames_come_early():
    config = small_config(decoder_base_channels=32, spatial_padding_mode="zeros")
    decoder = filled(VideoDecoder(config))
    peaks = []
    for frames in (6, 30):
        latent = normal((1, frames, 8, 8, 4))
        mx.eval(latent)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        count = 0
        for piece in decoder.stream(latent, noise=CountedNoise(), pixels=1):
            count += piece.shape[1]
        assert count == 1 + 4 * (frames - 1)
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < 1.1 * peaks[0]


# --- types, errors, layouts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tables", [mx.bfloat16, mx.float32])
def test_bfloat16_weights_give_bfloat16(tables):
    """Also if scale-shift tables, statistics and noise scales are float32, as in some published files."""
    config = small_config(timestep_conditioning=True)
    decoder, encoder = (filled(build(config), dtype=mx.bfloat16) for build in (VideoDecoder, VideoEncoder))
    for module in (decoder, encoder):
        names = ("table", "mean", "std", "scale1", "scale2", "multiplier")
        kept = [(path, p.astype(tables)) for path, p in tree_flatten(module.parameters()) if path.endswith(names)]
        module.update(tree_unflatten(kept))
    pieces = list(decoder.stream(normal((1, 2, 2, 3, 4)), 0.05, CountedNoise()))
    assert {piece.dtype for piece in pieces} == {mx.bfloat16}
    assert encoder(normal((1, 5, 8, 12, 3))).dtype == mx.bfloat16
    x, conditions = decoder.prepare(normal((1, 2, 2, 3, 4)), 0.05, CountedNoise())
    for stage in (stage for chain in decoder.chains(conditions) for stage in chain):
        x = together(run([stage], [x]))
        assert x.dtype == mx.bfloat16, stage


def test_norm_over_the_clip_keeps_bfloat16():
    block = filled(ResnetBlock(4, 8, "zeros"), dtype=mx.bfloat16)
    block.norm3 = nn.GroupNorm(1, 4)
    (stage,) = block.stages(Conditions(causal=True))
    assert together(run([stage], [normal((1, 3, 2, 2, 4)).astype(mx.bfloat16)])).dtype == mx.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "CausalDiffusionVAE"}, "vae._class_name = 'CausalDiffusionVAE'"),
        ({"dims": 2}, "vae.dims = 2"),
        ({"norm_layer": "group_norm"}, "vae.norm_layer = 'group_norm'"),
        ({"scaling_factor": 0.5}, "vae.scaling_factor = 0.5"),
        ({"use_quant_conv": True}, "vae.use_quant_conv = True"),
        ({"spatial_padding_mode": "circular"}, "vae.spatial_padding_mode = 'circular'"),
        ({"latent_log_var": "none"}, "vae.latent_log_var = 'none'"),
        ({"encoder_blocks": [["attn", {}]]}, "vae.encoder_blocks: block 'attn'"),
        ({"decoder_blocks": [["compress_all_res", {}]]}, "vae.decoder_blocks: block 'compress_all_res'"),
        ({"decoder_blocks": [["res_x", {}]]}, "num_layers = None of block 'res_x'"),
        ({"decoder_blocks": [["compress_time", {"residual": True}]]}, "residual = True of block 'compress_time'"),
        ({"encoder_blocks": [["compress_all", {"multiplier": 2}]]}, "multiplier = 2 of block 'compress_all'"),
        ({"decoder_blocks": [["res_x_y", {"inject_noise": True}]]}, "inject_noise = True of block 'res_x_y'"),
        ({"decoder_blocks": []}, "vae.decoder_blocks is missing"),
        ({"decoder_blocks": [["compress_all", {}]]}, "do not have the same scale"),
    ],
)
def test_unsupported_configs_are_refused_by_name(change, message):
    config = copy.deepcopy(REAL["2.3"])
    config["vae"].update(change)
    with pytest.raises(ValueError, match=message):
        VideoVaeConfig.from_metadata(config)


def test_a_config_without_the_section_is_refused():
    with pytest.raises(ValueError, match="vae is missing"):
        VideoVaeConfig.from_metadata({"audio_vae": {}})


def test_defaults_are_those_of_the_reference():
    lists = {"encoder_blocks": [["compress_all", 1]], "decoder_blocks": [["compress_all", 1]]}
    config = VideoVaeConfig.from_metadata({"vae": lists})
    assert (config.encoder_padding, config.decoder_padding) == ("zeros", "reflect")
    assert (config.timestep_conditioning, config.causal_decoder) == (True, False)
    assert (config.latent_channels, config.patch_size, config.decoder_base_channels) == (128, 4, 128)
    assert (config.time_scale, config.space_scale) == (2, 8)


def test_clips_that_cannot_be_encoded_are_refused():
    encoder = VideoEncoder(small_config())
    for frames in (0, 4, 8):
        with pytest.raises(ValueError, match=f"{frames} frames cannot be encoded, only 1"):
            encoder(mx.zeros((1, frames, 8, 8, 3)))
    with pytest.raises(ValueError, match="frames of 10x8 cannot be encoded, only multiples of 4"):
        encoder(mx.zeros((1, 5, 8, 10, 3)))
    with pytest.raises(ValueError, match="8x8 is the least"):
        VideoEncoder(small_config(spatial_padding_mode="reflect"))(mx.zeros((1, 5, 8, 4, 3)))


def test_decodes_that_cannot_be_are_refused():
    latent = mx.zeros((1, 2, 2, 2, 4))
    with pytest.raises(ValueError, match="needs a source of noise"):
        VideoDecoder(small_config())(latent)
    with pytest.raises(ValueError, match="needs a source of noise"):
        VideoDecoder(small_config(decoder_blocks=THREE_TIMES[:1] + THREE_TIMES[2:], timestep_conditioning=True))(latent)
    with pytest.raises(ValueError, match="no timestep conditioning"):
        VideoDecoder(small_config())(latent, 0.05, CountedNoise())
    with pytest.raises(ValueError, match="padding by reflection"):
        VideoDecoder(small_config())(mx.zeros((1, 2, 1, 2, 4)), None, CountedNoise())


def test_patches_have_their_columns_slower_than_their_rows():
    video = mx.arange(2 * 8 * 12 * 3).reshape(1, 2, 8, 12, 3)
    patches = patchify(video, 4)
    assert patches.shape == (1, 2, 2, 3, 48)
    assert patches[0, 1, 1, 2, 2 * 16 + 3 * 4 + 1].item() == video[0, 1, 4 + 1, 8 + 3, 2].item()
    assert mx.array_equal(unpatchify(patches, 4), video)


def test_channels_become_pixels_with_the_column_fastest():
    x = mx.arange(2 * 3 * 4 * 16).reshape(1, 2, 3, 4, 16)
    y = depth_to_space(x, (2, 2, 2))
    assert y.shape == (1, 4, 6, 8, 2)
    assert y[0, 3, 4, 1, 1].item() == x[0, 1, 2, 0, 8 + 4 * 1 + 2 * 0 + 1].item()
    assert mx.array_equal(space_to_depth(y, (2, 2, 2)), x)


def test_statistics_invert_each_other():
    statistics = filled(ChannelStatistics(4))
    latent = normal((1, 2, 3, 3, 4))
    assert error(statistics.normalize(statistics.denormalize(latent)), latent) < 1e-6
    assert error(statistics.denormalize(latent), latent * statistics.std + statistics.mean) < 1e-7
    assert statistics.normalize(latent.astype(mx.bfloat16)).dtype == mx.bfloat16


assert parity.video_vae  # registers the runner
