"""LoRAs: every layout lands on the same layers, fusing equals the reference, and going back leaves no trace."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import parity.lora
from mlx_ltx.checkpoints.components import load_transformer
from mlx_ltx.checkpoints.files import SafetensorsFile
from mlx_ltx.checkpoints.keymaps import TRANSFORMER
from mlx_ltx.checkpoints.lora import Lora, LoraFile, LoraInfo, layer_path
from mlx_ltx.checkpoints.lora_switch import LoraStack, LoraSwitch, check_loras, layer_shape, linear_layers
from mlx_ltx.errors import UserError
from mlx_ltx.models.lora import LoraLinear
from mlx_ltx.models.transformer import Transformer
from mlx_ltx.models.transformer_config import TransformerConfig
from parity import GoldenSet, runner_for
from parity.transformer import stream_inputs

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIGS = json.loads((GOLDEN / "real_configs.json").read_text())
CHECKPOINT = "transformer_23"
TO_Q = "blocks.1.video.attn1.to_q"
OFFICIAL_TO_Q = "diffusion_model.transformer_blocks.1.attn1.to_q"


@pytest.fixture
def checkpoint():
    return SafetensorsFile(GOLDEN / f"{CHECKPOINT}.ckpt.safetensors")


@pytest.fixture
def golden_loras():
    return [Lora(LoraFile(GOLDEN / f"lora_{i}.safetensors"), strength) for i, strength in enumerate((0.8, -0.5))]


def load(checkpoint: SafetensorsFile, dtype: mx.Dtype = mx.float32, **parts: bool) -> Transformer:
    return load_transformer(checkpoint, dtype, **parts)


def parameters(model: nn.Module) -> dict[str, np.ndarray]:
    """Every parameter's bits."""
    return {path: np.array(value.view(mx.uint8)) for path, value in tree_flatten(model.parameters())}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[path], other[path]) for path in one)


def velocity(model: Transformer) -> np.ndarray:
    golden = GoldenSet(GOLDEN, CHECKPOINT)
    return np.array(model(*stream_inputs(model, golden, "plain")).video.astype(mx.float32))


def error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def save(path: Path, tensors: dict[str, mx.array], metadata: dict[str, str] | None = None) -> Path:
    mx.save_safetensors(str(path), tensors, metadata or {})
    return path


def pair(
    layer: str = OFFICIAL_TO_Q, inputs: int = 64, outputs: int = 64, rank: int = 4, names: tuple[str, str] = ("A", "B")
) -> dict[str, mx.array]:
    down, up = (name if "." in name or "_" in name else f"lora_{name}" for name in names)
    keys = [mx.random.key(seed) for seed in (rank, rank + 1)]
    return {
        f"{layer}.{down}.weight": mx.random.normal((rank, inputs), key=keys[0]),
        f"{layer}.{up}.weight": mx.random.normal((outputs, rank), key=keys[1]),
    }


def whole_lora(folder: Path, model: Transformer, rank: int = 2) -> LoraFile:
    """A LoRA that changes every layer of ``model``."""
    tensors: dict[str, mx.array] = {}
    keys = TRANSFORMER.select(load_keys())
    for path, layer in linear_layers(model).items():
        name = keys[f"{path}.weight"].removeprefix("model.").removesuffix(".weight")
        outputs, inputs = layer_shape(layer)
        tensors |= pair(name, inputs, outputs, rank)
    return LoraFile(save(folder / "whole.safetensors", tensors))


def load_keys() -> list[str]:
    return list(SafetensorsFile(GOLDEN / f"{CHECKPOINT}.ckpt.safetensors").tensors)


def refused(path: Path, config: str | None = None) -> str:
    """What is said of a file that cannot be read, or does not fit the checkpoint's model."""
    values = CONFIGS[config] if config else SafetensorsFile(GOLDEN / f"{CHECKPOINT}.ckpt.safetensors").config
    with pytest.raises(UserError) as caught:
        check_loras([Lora(LoraFile(path))], TransformerConfig.from_metadata(values))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


# Fusing


def test_parity(compare_golden):
    """Measured: 0, to the last bit."""
    for result in compare_golden("lora_fused"):
        assert result.error <= 1e-6, result.tensor


def test_parity_would_notice_another_strength(tmp_path):
    for name in ("lora_0.safetensors", "lora_1.safetensors", f"{CHECKPOINT}.ckpt.safetensors"):
        (tmp_path / name).symlink_to(GOLDEN / name)
    golden = GoldenSet(GOLDEN, "lora_fused")
    golden.folder = tmp_path
    golden.cases = {"note": "base transformer_23.ckpt + 0.8*lora_0 - 0.501*lora_1"}
    assert max(result.error for result in runner_for("lora_fused")(golden)) > 1e-4
    assert parity.lora.run_lora is runner_for("lora_fused")


def test_float32_weights_are_fused_in_float32(checkpoint, golden_loras):
    model = load(checkpoint)
    before = np.array(linear_layers(model)[TO_Q].weight).astype(np.float64)
    LoraSwitch(model, checkpoint).use(golden_loras)
    for lora in golden_loras:
        down, up = (np.array(factor).astype(np.float64) for factor in lora.file.factors(TO_Q, mx.float32))
        before += lora.strength * up @ down
    assert error(np.array(linear_layers(model)[TO_Q].weight), before) < 2e-7


def test_bfloat16_weights_are_fused_as_the_reference_does_and_stay_bfloat16(checkpoint, golden_loras):
    model = load(checkpoint, mx.bfloat16)
    weight = linear_layers(model)[TO_Q].weight
    LoraSwitch(model, checkpoint).use(golden_loras)
    first, second = (lora.file.factors(TO_Q, mx.bfloat16) for lora in golden_loras)
    (down, up), (down_2, up_2) = ([np.array(f.astype(mx.float32)) for f in factors] for factors in (first, second))
    rounded = lambda x: np.array(mx.array(x).astype(mx.bfloat16).astype(mx.float32))  # noqa: E731
    delta = rounded(rounded(np.float32(0.8) * up) @ down)
    delta = rounded(delta - np.float32(0.5) * (up_2 @ down_2))
    expected = rounded(delta + np.array(weight.astype(mx.float32)))
    fused = linear_layers(model)[TO_Q].weight
    assert fused.dtype == mx.bfloat16
    assert error(np.array(fused.astype(mx.float32)), expected) < 1e-4
    assert {value.dtype for _, value in tree_flatten(model.parameters())} == {mx.bfloat16}
    # Summed in float32 instead, the strengths count fully, and the last bit differs here and there.
    precise = LoraStack(golden_loras, {TO_Q: (64, 64)}).fuse(TO_Q, weight, mx.float32)
    assert 0 < error(np.array(precise.astype(mx.float32)), expected) < 5e-3


def test_a_negative_strength_undoes_a_positive_one(checkpoint, golden_loras):
    file = golden_loras[0].file
    model = load(checkpoint)
    bare = np.array(linear_layers(model)[TO_Q].weight)
    LoraSwitch(model, checkpoint).use([Lora(file, 0.7), Lora(file, -0.7)])
    assert error(np.array(linear_layers(model)[TO_Q].weight), bare) < 1e-6


def test_strength_zero_changes_nothing_but_is_still_checked(checkpoint, golden_loras, tmp_path):
    model = load(checkpoint)
    bare = parameters(model)
    switch = LoraSwitch(model, checkpoint)
    switch.use([Lora(golden_loras[0].file, 0.0)])
    assert same(parameters(model), bare)
    wrong = LoraFile(save(tmp_path / "wrong.safetensors", pair(inputs=63)))
    with pytest.raises(UserError, match="another size"):
        switch.use([Lora(wrong, 0.0)])


# Going from one set to another


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_after_all_switches_the_model_is_the_freshly_loaded_one_bit_for_bit(checkpoint, golden_loras, dtype):
    fresh = parameters(load(checkpoint, dtype))
    model = load(checkpoint, dtype)
    switch = LoraSwitch(model, checkpoint)
    assert switch.use(golden_loras) == []
    on = parameters(model)
    changed = {path for path in fresh if not np.array_equal(on[path], fresh[path])}
    assert changed == {f"{path}.weight" for path in golden_loras[0].file.layers}
    switch.use(golden_loras[1:])
    assert not same(parameters(model), on)
    switch.use([])
    assert same(parameters(model), fresh)
    switch.use(golden_loras)
    assert same(parameters(model), on)


def test_a_set_does_not_depend_on_the_one_before(checkpoint, golden_loras, tmp_path):
    direct = load(checkpoint)
    LoraSwitch(direct, checkpoint).use(golden_loras[:1])
    model = load(checkpoint)
    switch = LoraSwitch(model, checkpoint)
    switch.use([Lora(whole_lora(tmp_path, model), 0.3)])
    mx.eval(model.parameters())
    switch.use(golden_loras[:1])
    assert same(parameters(model), parameters(direct))


def test_the_forward_pass_follows(checkpoint, golden_loras):
    model = load(checkpoint)
    bare = velocity(model)
    switch = LoraSwitch(model, checkpoint)
    switch.use(golden_loras)
    assert error(velocity(model), bare) > 1e-3
    switch.use([])
    assert np.array_equal(velocity(model), bare)


def test_a_refused_set_leaves_the_one_in_use(checkpoint, golden_loras, tmp_path):
    model = load(checkpoint)
    switch = LoraSwitch(model, checkpoint)
    switch.use(golden_loras)
    on = parameters(model)
    wrong = LoraFile(save(tmp_path / "wrong.safetensors", pair(inputs=63)))
    with pytest.raises(UserError, match="another size"):
        switch.use([golden_loras[0], Lora(wrong)])
    assert same(parameters(model), on)
    switch.use([])
    assert same(parameters(model), parameters(load(checkpoint)))


def test_switching_needs_no_more_than_one_part_of_the_model_beside_it(checkpoint, tmp_path):
    model = load(checkpoint)
    lora = Lora(whole_lora(tmp_path, model))
    switch = LoraSwitch(model, checkpoint)

    def evaluate() -> None:
        for block in model.blocks:
            mx.eval(block.parameters())
        mx.eval(model.parameters())

    evaluate()
    size = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
    block = sum(value.nbytes for _, value in tree_flatten(model.blocks[0].parameters()))
    largest = max(block, size - len(model.blocks) * block)
    base = mx.get_active_memory()
    for loras in ([lora], [Lora(lora.file, 0.5)], []):
        mx.reset_peak_memory()
        switch.use(loras)
        assert mx.get_peak_memory() - base < block / 4, "nothing is read before it is evaluated"
        evaluate()
        assert mx.get_peak_memory() - base < 1.1 * largest < size / 2
        assert abs(mx.get_active_memory() - base) < block / 4


# Quantised weights


@pytest.fixture
def quantised(checkpoint):
    model = load(checkpoint)
    nn.quantize(model, group_size=32, bits=8)
    return model


def test_quantised_layers_get_a_branch_and_lose_it_again(checkpoint, quantised, golden_loras):
    before, bare = parameters(quantised), velocity(quantised)
    layers = linear_layers(quantised)
    switch = LoraSwitch(quantised, checkpoint)
    assert switch.use(golden_loras) == []
    attention = quantised.blocks[1].video.attn1
    assert isinstance(attention.to_q, LoraLinear)
    assert attention.to_q.base is layers[TO_Q]
    assert not isinstance(quantised.blocks[0].video.attn1.to_q, LoraLinear)
    assert error(velocity(quantised), bare) > 1e-3
    switch.use([])
    assert linear_layers(quantised) == layers
    assert attention.to_q is layers[TO_Q]
    assert same(parameters(quantised), before)
    assert np.array_equal(velocity(quantised), bare)


def test_a_branch_does_what_fusing_does(checkpoint, quantised, golden_loras):
    """All LoRAs in one branch; against the dequantised weights with the same LoRAs fused. Measured: 7e-7."""
    plain = load(checkpoint)
    for path, layer in linear_layers(quantised).items():
        if isinstance(layer, nn.QuantizedLinear):
            weight = mx.dequantize(layer.weight, layer.scales, layer.biases, layer.group_size, layer.bits)
            linear_layers(plain)[path].weight = weight
    LoraSwitch(plain, checkpoint).use(golden_loras)
    LoraSwitch(quantised, checkpoint).use(golden_loras)
    assert quantised.blocks[1].video.attn1.to_q.down.shape == (8, 64)
    assert error(velocity(quantised), velocity(plain)) < 1e-5


def test_a_branch_keeps_bfloat16(checkpoint, golden_loras):
    model = load(checkpoint, mx.bfloat16)
    nn.quantize(model, group_size=32, bits=4)
    LoraSwitch(model, checkpoint).use(golden_loras)
    layer = model.blocks[1].video.attn1.to_q
    assert (layer.down.dtype, layer.up.dtype, layer.bias.dtype) == (mx.bfloat16,) * 3
    assert layer(mx.zeros((1, 2, 64), mx.bfloat16)).dtype == mx.bfloat16


@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 64), (4, 32), (5, 64), (6, 64), (8, 128)])
def test_the_size_of_a_quantised_layer(bits, group):
    layer = nn.QuantizedLinear(384, 96, bias=False, group_size=group, bits=bits)
    assert layer_shape(layer) == (96, 384)


# Names


def official_layers(generation: str) -> dict[str, str]:
    """Official layer name to module path, for every layer of a published transformer."""
    lines = (GOLDEN / "keys" / f"{generation}_transformer.txt").read_text().splitlines()
    published = dict(line.split("\t") for line in lines if not line.startswith("#"))
    return {
        key.removeprefix("model.diffusion_model.").removesuffix(".weight"): path.removesuffix(".weight")
        for path, key in TRANSFORMER.select(published).items()
        if key.endswith(".weight") and len(json.loads(published[key])) == 2
    }


def diffusers_name(name: str) -> str:
    """What diffusers calls an official layer."""
    for official, renamed in (
        ("patchify_proj", "proj_in"),
        ("av_ca_video_scale_shift_adaln_single", "av_cross_attn_video_scale_shift"),
        ("av_ca_a2v_gate_adaln_single", "av_cross_attn_video_a2v_gate"),
        ("av_ca_audio_scale_shift_adaln_single", "av_cross_attn_audio_scale_shift"),
        ("av_ca_v2a_gate_adaln_single", "av_cross_attn_audio_v2a_gate"),
        ("prompt_adaln_single", "prompt_adaln"),
        ("adaln_single", "time_embed"),
    ):
        name = name.replace(official, renamed)
    return name


@pytest.mark.parametrize("generation", ["19b", "2.3"])
def test_every_layer_of_a_published_model_is_found_in_every_spelling(generation):
    layers = official_layers(generation)
    assert layers["transformer_blocks.3.audio_attn1.to_q"] == "blocks.3.audio.attn1.to_q"
    assert set(layers.values()) == set(linear_layers(Transformer(TransformerConfig.from_metadata(CONFIGS[generation]))))
    for name, path in layers.items():
        diffusers = diffusers_name(name)
        for spelling in (
            name,
            f"diffusion_model.{name}",
            f"model.diffusion_model.{name}",
            f"transformer.{diffusers}",
            f"base_model.model.{name}",
            f"base_model.model.transformer.{diffusers}",
            f"lora_unet_{name.replace('.', '_')}",
            f"lora_transformer_{diffusers.replace('.', '_')}",
        ):
            assert layer_path(spelling) == path, spelling


@pytest.mark.parametrize(
    "name",
    [
        "diffusion_model.video_embeddings_connector.transformer_1d_blocks.0.attn1.to_q",
        "text_embedding_projection.aggregate_embed",
        "connectors.video_connector.transformer_blocks.0.attn1.to_q",
        "text_encoder.model.layers.0.self_attn.q_proj",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        "vae.decoder.conv_in",
    ],
)
def test_layers_of_other_networks_are_known_as_such(name):
    assert layer_path(name) is None


@pytest.mark.parametrize(
    ("prefix", "names"),
    [
        ("diffusion_model.", ("A", "B")),
        ("transformer.", ("A", "B")),
        ("base_model.model.", ("lora_A.default", "lora_B.default")),
        ("transformer.", ("lora.down", "lora.up")),
        ("diffusion_model.", ("lora_down", "lora_up")),
        ("", ("lora_linear_layer.down", "lora_linear_layer.up")),
        ("lora_unet_", ("lora_down", "lora_up")),
    ],
)
@pytest.mark.parametrize("alpha", [None, 2.0, 16.0])
def test_layouts_and_alpha(tmp_path, checkpoint, prefix, names, alpha):
    name = "transformer_blocks.1.attn1.to_q"
    layer = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
    tensors = pair(layer, names=names)
    down, up = (np.array(value).astype(np.float64) for value in tensors.values())
    if alpha is not None:
        tensors[f"{layer}.alpha"] = mx.array(alpha).astype(mx.bfloat16)
    model = load(checkpoint)
    expected = np.array(linear_layers(model)[TO_Q].weight) + 0.5 * (1 if alpha is None else alpha / 4) * up @ down
    LoraSwitch(model, checkpoint).use([Lora(LoraFile(save(tmp_path / "lora.safetensors", tensors)), 0.5)])
    assert error(np.array(linear_layers(model)[TO_Q].weight), expected) < 1e-6


@pytest.mark.parametrize(("settings", "scale"), [({}, 1.0), ({"lora_alpha": 2}, 0.5), ({"use_rslora": True}, 1.0)])
def test_pefts_settings_in_metadata_and_beside_the_file(tmp_path, settings, scale):
    """Rank 4; with rank-stabilised scaling alpha is divided by the rank's root."""
    if settings.get("use_rslora"):
        settings, scale = {**settings, "lora_alpha": 6.0}, 3.0
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in {"r": 4, **settings}.items()})}
    inside = LoraFile(save(tmp_path / "lora.safetensors", pair(), metadata))
    assert inside.layers[TO_Q].scale == scale
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "use_dora": False, **settings}))
    tensors = pair("base_model.model.transformer_blocks.1.attn1.to_q")
    beside = LoraFile(save(tmp_path / "adapter_model.safetensors", tensors))
    assert beside.layers[TO_Q].scale == scale
    # A layer's own alpha goes before the settings' one.
    tensors["base_model.model.transformer_blocks.1.attn1.to_q.alpha"] = mx.array(4.0)
    own = LoraFile(save(tmp_path / "adapter_model.safetensors", tensors))
    assert own.layers[TO_Q].scale == 4 / (math.sqrt(4) if settings.get("use_rslora") else 4)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"alpha_pattern": {"x": 2}}, {"lora_alpha": "eight"}, [1]])
def test_pefts_settings_that_are_not_understood(tmp_path, settings):
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    path = save(tmp_path / "adapter_model.safetensors", pair())
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        LoraFile(path)


# Metadata


def test_metadata_of_the_golden_loras(golden_loras):
    assert golden_loras[0].file.info == LoraInfo()
    assert golden_loras[1].file.info == LoraInfo(reference_downscale_factor=2, reference_temporal_scale_factor=4)


@pytest.mark.parametrize(
    ("metadata", "curve"),
    [
        ({}, None),
        ({"use_hdr_transform": "true"}, "logc3"),
        ({"use_hdr_transform": "True"}, "logc3"),
        ({"use_hdr_transform": "false"}, None),
        ({"hdr_transform": "true"}, "logc3"),
        ({"hdr_transform": "acescct", "use_hdr_transform": "true"}, "acescct"),
        ({"hdr_transform": "logc3", "reference_downscale_factor": "2"}, "logc3"),
    ],
)
def test_hdr_metadata(metadata, curve):
    assert LoraInfo.from_metadata(metadata).hdr_transform == curve


@pytest.mark.parametrize(
    "metadata",
    [
        {"reference_downscale_factor": "0"},
        {"reference_downscale_factor": "1.5"},
        {"reference_temporal_scale_factor": "two"},
        {"reference_temporal_scale_factor": ""},
        {"hdr_transform": "pq"},
    ],
)
def test_metadata_that_makes_no_sense_is_refused(tmp_path, metadata):
    name, value = next(iter(metadata.items()))
    assert f"{name}={value}" in refused(save(tmp_path / "lora.safetensors", pair(), metadata))


# What fits, and what does not


@pytest.fixture
def hollow_lora(write_hollow):
    """Make a LoRA of full size whose data are a hole in the file."""

    def make(path: Path, shapes: dict[str, tuple[int, int]]) -> LoraFile:
        tensors = {}
        for name, (outputs, inputs) in shapes.items():
            for role, shape in (("A", [1, inputs]), ("B", [outputs, 1])):
                tensors[f"diffusion_model.{name}.lora_{role}.weight"] = shape
        write_hollow(path, tensors)
        return LoraFile(path)

    return make


def full_size_shapes(generation: str) -> dict[str, tuple[int, int]]:
    lines = (GOLDEN / "keys" / f"{generation}_transformer.txt").read_text().splitlines()
    published = dict(line.split("\t") for line in lines if not line.startswith("#"))
    return {
        name: tuple(json.loads(published[f"model.diffusion_model.{name}.weight"]))
        for name in official_layers(generation)
    }


def test_a_lora_of_all_layers_fits_the_published_model(tmp_path, hollow_lora):
    """The published distilled LoRA of LTX-2.3 has 3320 tensors."""
    file = hollow_lora(tmp_path / "distilled.safetensors", full_size_shapes("2.3"))
    assert (len(file.layers), len(file.file.tensors)) == (1660, 3320)
    assert check_loras([Lora(file)], TransformerConfig.from_metadata(CONFIGS["2.3"])) == []


def test_a_lora_of_all_layers_does_not_fit_another_generation(tmp_path, hollow_lora):
    path = tmp_path / "distilled.safetensors"
    hollow_lora(path, full_size_shapes("19b"))
    message = refused(path, "2.3")
    assert "does not fit this model" in message
    assert "2 of" in message
    assert "adaln_single.linear is" in message


def test_layers_that_the_model_lacks_are_listed(tmp_path, checkpoint):
    tensors = pair() | pair("diffusion_model.transformer_blocks.77.attn1.to_q") | pair("diffusion_model.mystery")
    tensors |= pair("text_embedding_projection.aggregate_embed", 48, 16)
    lora = Lora(LoraFile(save(tmp_path / "lora.safetensors", tensors)))
    warnings = LoraSwitch(load(checkpoint), checkpoint).use([lora])
    assert len(warnings) == 2
    assert "lora.safetensors: 2 of 3 layers are not in this model" in warnings[0]
    assert "mystery" in warnings[0]
    assert "transformer_blocks.77.attn1.to_q" in warnings[0]
    assert "text_embedding_projection.aggregate_embed" in warnings[1]
    assert check_loras([lora], TransformerConfig.from_metadata(checkpoint.config)) == warnings


def test_a_silent_clip_needs_only_the_picture(checkpoint, golden_loras, tmp_path):
    model = load(checkpoint, audio=False)
    switch = LoraSwitch(model, checkpoint)
    assert switch.use(golden_loras) == []
    assert switch.stack.paths == {p for p in golden_loras[0].file.layers if ".video." in p and "cross_attn" not in p}
    config = TransformerConfig.from_metadata(checkpoint.config, audio=False)
    assert check_loras(golden_loras, config) == []
    sound = save(tmp_path / "sound.safetensors", pair("diffusion_model.transformer_blocks.1.audio_attn1.to_q", 32, 32))
    with pytest.raises(UserError, match="only what this clip leaves out"):
        switch.use([Lora(LoraFile(sound))])


@pytest.mark.parametrize(
    ("layer", "looks_like"),
    [
        ("diffusion_model.double_blocks.0.img_attn.qkv", "Flux"),
        ("transformer.single_transformer_blocks.3.attn.to_q", "Flux"),
        ("lora_unet_double_blocks_0_img_attn_qkv", "Hunyuan|Flux"),
        ("diffusion_model.blocks.0.self_attn.q", "Wan"),
        ("lora_unet_blocks_0_cross_attn_k", "Wan"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in", "Stable Diffusion"),
        ("unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k", "Stable Diffusion"),
        ("transformer.transformer_blocks.0.attn.add_q_proj", "Qwen-Image"),
        ("base_model.model.model.layers.0.self_attn.q_proj", "a language model"),
        ("diffusion_model.transformer_blocks.40.attn1.to_q", "a larger LTX model"),
        ("something.else", "unknown kind"),
        ("text_encoder.layers.0.q", "only other networks"),
    ],
)
def test_a_lora_for_another_model_is_refused_and_recognised(tmp_path, layer, looks_like):
    message = refused(save(tmp_path / "lora.safetensors", pair(layer)))
    assert "does not fit this model" in message
    assert re.search(looks_like, message)


def test_a_lora_of_another_width_is_refused(tmp_path):
    message = refused(save(tmp_path / "lora.safetensors", pair(inputs=32, outputs=128)))
    assert "128x32 in the LoRA and 64x64 in the model" in message


# Damaged files


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.pop(f"{OFFICIAL_TO_Q}.lora_B.weight"), "lora_A.weight has no B matrix"),
        (lambda t: t.pop(f"{OFFICIAL_TO_Q}.lora_A.weight"), "lora_B.weight has no A matrix"),
        (lambda t: t.update({"diffusion_model.proj_out.alpha": mx.array(1.0)}), "alpha has no A matrix"),
        (lambda t: t.update({f"{OFFICIAL_TO_Q}.alpha": mx.zeros((2,))}), "not a single number"),
        (lambda t: t.update({f"{OFFICIAL_TO_Q}.alpha": mx.array(math.nan)}), "is nan"),
        (lambda t: t.update({f"{OFFICIAL_TO_Q}.lora_B.weight": mx.zeros((64, 5))}), r"A is \[4, 64\], B is \[64, 5\]"),
        (lambda t: t.update({f"{OFFICIAL_TO_Q}.lora_B.weight": mx.zeros((64, 4, 1))}), "do not fit each other"),
        (lambda t: t.update({f"{OFFICIAL_TO_Q}.lora_B.weight": mx.zeros((64, 0))}), "do not fit each other"),
        (lambda t: t.update({f"{OFFICIAL_TO_Q}.lora_B.weight": mx.zeros((64, 4), mx.int32)}), "is I32"),
        (lambda t: t.update({"transformer_blocks.1.attn1.norm": mx.zeros((4,))}), "belong to no LoRA"),
        (lambda t: t.update(pair("transformer.transformer_blocks.1.attn1.to_q")), "changes a layer twice"),
        (lambda t: t.update(pair(names=("lora_A.second", "lora_B.second"))), "two adapters"),
        (lambda t: t.update({f"{OFFICIAL_TO_Q}.dora_scale": mx.zeros((64,))}), "DoRA"),
        (lambda t: t.update({f"{OFFICIAL_TO_Q}.hada_w1_a": mx.zeros((64,))}), "LoHa"),
        (lambda t: t.update({f"{OFFICIAL_TO_Q}.lokr_w1": mx.zeros((64,))}), "LoKr"),
        (lambda t: t.update({f"{OFFICIAL_TO_Q}.diff": mx.zeros((64, 64))}), "whole changed weights"),
        (lambda t: t.update({f"{OFFICIAL_TO_Q}.lora_B.bias": mx.zeros((64,))}), "changed bias"),
    ],
)
def test_a_damaged_or_unsupported_file_is_refused_in_one_line(tmp_path, change, complaint):
    tensors = pair()
    change(tensors)
    assert re.search(complaint, refused(save(tmp_path / "lora.safetensors", tensors)))


def test_a_file_that_is_no_lora_says_what_it_is(tmp_path):
    assert "a whole checkpoint" not in refused(save(tmp_path / "vae.safetensors", {"vae.encoder.x": mx.zeros((1,))}))
    assert "looks like a VAE" in refused(tmp_path / "vae.safetensors")
    alone = save(tmp_path / "alpha.safetensors", {f"{OFFICIAL_TO_Q}.alpha": mx.array(1.0)})
    assert "is not a LoRA" in refused(alone)


def test_a_truncated_or_missing_file(tmp_path):
    path = save(tmp_path / "lora.safetensors", pair())
    path.write_bytes(path.read_bytes()[:-100])
    assert "100 bytes are missing" in refused(path)
    assert "No such file" in refused(tmp_path / "nothing.safetensors")
    path.write_bytes(b"<html>not found</html>")
    assert "not a safetensors file" in refused(path)
