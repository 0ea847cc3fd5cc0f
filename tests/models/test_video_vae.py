import copy
import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from video_vae_cases import THREE_TIMES, CountedNoise, error, filled, normal, small_config, together

import parity.video_vae
from mlx_ltx.checkpoints.files import SafetensorsFile
from mlx_ltx.checkpoints.keymaps import VIDEO_DECODER, VIDEO_ENCODER
from mlx_ltx.checkpoints.loading import load_weights, published_shapes
from mlx_ltx.errors import UserError
from mlx_ltx.models.statistics import ChannelStatistics
from mlx_ltx.models.streaming import run
from mlx_ltx.models.video_vae import VideoDecoder, VideoEncoder, VideoVaeConfig
from mlx_ltx.models.video_vae_blocks import (
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


def test_unknown_cases_are_not_covered():
    tiled, others = runner_for("video_vae_23_tiled"), runner_for("video_vae_27_tilted")
    assert tiled is not None
    assert others is not None
    assert tiled is not others
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
