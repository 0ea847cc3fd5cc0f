"""Quantising while loading: which layers, in which bits, with which error, and in how much memory."""

from __future__ import annotations

import json
import re
import shutil
import struct
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import parity.fp8  # noqa: F401
from mlx_ltx.checkpoints.components import load_transformer
from mlx_ltx.checkpoints.files import SafetensorsFile
from mlx_ltx.checkpoints.gemma import load_gemma
from mlx_ltx.checkpoints.keymaps import TRANSFORMER
from mlx_ltx.checkpoints.loading import read_array
from mlx_ltx.checkpoints.lora_switch import LoraSwitch
from mlx_ltx.checkpoints.quantize import SETTINGS, Level, Quantization, Rule, choose_formats, transformer_rules
from mlx_ltx.errors import UserError
from mlx_ltx.models.quantized import QuantizedLinear, WeightFormat
from mlx_ltx.models.transformer import Transformer
from mlx_ltx.models.transformer_config import TransformerConfig
from parity import Comparison, GoldenSet, NotCovered, runner_for
from parity.transformer import case_names, compare_case

GOLDEN = Path(__file__).parents[1] / "golden"
GEMMA = GOLDEN / "gemma3_tiny"
DIT = "model.diffusion_model."
PLAIN_FILE = GOLDEN / "transformer_23.ckpt.safetensors"
FP8_FILE = GOLDEN / "transformer_23_fp8.ckpt.safetensors"
SMALL = [Quantization.parse(name, 32 if name.startswith("q") else None) for name in SETTINGS]


def published(name: str) -> Transformer:
    configs = json.loads((GOLDEN / "real_configs.json").read_text())
    return Transformer(TransformerConfig.from_metadata(configs[name]))


def quantised(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, nn.QuantizedLinear)}


def worst_velocity(model: Transformer) -> float:
    golden = GoldenSet(GOLDEN, "transformer_23")
    return max(r.error for c in case_names(golden) for r in compare_case(model, golden, c) if "velocity" in r.tensor)


def make_checkpoint(
    path: Path, layers: int, heads: int, head_dim: int, dtype: mx.Dtype = mx.bfloat16
) -> SafetensorsFile:
    """A transformer with random weights in the published layout; the video stream is twice as wide as the audio."""
    golden = SafetensorsFile(PLAIN_FILE)
    config = golden.config
    config["transformer"] |= {
        "num_layers": layers,
        "num_attention_heads": heads,
        "audio_num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "audio_attention_head_dim": head_dim // 2,
        "cross_attention_dim": heads * head_dim,
        "audio_cross_attention_dim": heads * head_dim // 2,
    }
    model = Transformer(TransformerConfig.from_metadata(config))
    # The published names, from those of the golden file.
    names = TRANSFORMER.select(golden.tensors)
    tensors = {}
    for place, parameter in tree_flatten(model.parameters()):
        known = re.sub(r"^blocks\.(\d+)\.", "blocks.0.", place)
        index = place.split(".")[1] if place.startswith("blocks.") else "0"
        key = names[known].replace("transformer_blocks.0.", f"transformer_blocks.{index}.")
        tensors[key] = (mx.random.normal(parameter.shape) * 0.02).astype(dtype)
    mx.save_safetensors(str(path), tensors, {"config": json.dumps(config), "model_version": "2.3.0"})
    return SafetensorsFile(path)


# The policy


@pytest.mark.parametrize("name", ["19b", "2.3", "2.5"])
def test_the_policy_at_published_sizes(name):
    model = published(name)
    formats = choose_formats(model, transformer_rules(48), Quantization.parse("q4"))
    assert len(formats) == 48 * (6 * 4 + 4)  # six attentions of four projections, two feed-forwards of two
    coarse = {path for path, each in formats.items() if each == WeightFormat("affine", 4, 64)}
    fine = {path for path, each in formats.items() if each == WeightFormat("affine", 8, 64)}
    assert coarse | fine == formats.keys()
    assert {int(path.split(".")[1]) for path in fine} == {0, 1, 46, 47}
    plain = {path for path, layer in model.named_modules() if isinstance(layer, nn.Linear)} - formats.keys()
    for path in plain:
        assert re.search(r"adaln|patchify_proj|proj_out|caption_projection|to_gate_logits", path), path
    weights = sum(layer.weight.size for path, layer in model.named_modules() if path in formats)
    total = sum(parameter.size for _, parameter in tree_flatten(model.parameters()))
    assert 0.975 < weights / total < 0.985


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_divides_the_published_widths(name):
    setting = Quantization.parse(name)
    formats = choose_formats(published("2.3"), transformer_rules(48), setting)
    assert formats["blocks.0.video.attn1.to_q"] == setting.sensitive == WeightFormat("affine", 8, 64)
    assert formats["blocks.20.audio.ff.down"] == setting.usual
    assert formats["blocks.20.video.cross_attn.to_k"] == setting.usual


def test_first_rule_counts():
    rules = transformer_rules(6)
    levels = {}
    for path in ("blocks.1.video.attn1.to_q", "blocks.2.video.attn1.to_q", "blocks.0.audio.attn2.to_gate_logits"):
        levels[path] = next(rule.level for rule in rules if re.fullmatch(rule.layers, path))
    assert list(levels.values()) == [Level.SENSITIVE, Level.USUAL, Level.PLAIN]


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("q7", None, "--quantize q7: no such setting; it can be q8, q6"),
        ("mxfp", None, "did you mean mxfp"),
        ("q4", 48, "--group-size 48: .* it can be 32, 64, 128"),
        ("nvfp4", 64, "--group-size 64: .* it can be 16"),
    ],
)
def test_settings_that_do_not_exist(name, size, message):
    with pytest.raises(UserError, match=message):
        Quantization.parse(name, size)


def test_names_are_forgiving_of_case():
    assert Quantization.parse(" Q4 ") is SETTINGS["q4"]
    assert Quantization.parse("q4", 32).sensitive.group_size == 32


# While loading


@pytest.mark.parametrize("setting", SMALL, ids=lambda setting: setting.name)
def test_a_quantised_transformer_gives_nearly_the_same(setting):
    model = load_transformer(SafetensorsFile(PLAIN_FILE), mx.float32, quantization=setting)
    assert len(quantised(model)) >= 3 * 14
    assert worst_velocity(load_transformer(SafetensorsFile(PLAIN_FILE), mx.float32)) < 1e-5
    assert 1e-3 < worst_velocity(model) < 3e-2


def test_coarser_settings_cost_more(tmp_path):
    file = make_checkpoint(tmp_path / "six.safetensors", layers=6, heads=4, head_dim=32)
    weight = read_array(file, f"{DIT}transformer_blocks.2.attn1.to_q.weight", mx.float32)
    errors = {}
    for setting in (Quantization.parse(name) for name in ("q8", "q6", "q5", "q4")):
        model = load_transformer(file, mx.float32, quantization=setting)
        assert model.blocks[1].video.attn1.to_q.bits == 8
        layer = model.blocks[2].video.attn1.to_q
        assert layer.bits == setting.usual.bits
        held = layer.format.dequantize(layer.weight, layer.scales, layer.biases)
        errors[setting.name] = (mx.linalg.norm(held - weight) / mx.linalg.norm(weight)).item()
    assert 2 * errors["q8"] < errors["q6"] < 0.7 * errors["q5"] < 0.4 * errors["q4"]


def test_parameters_have_the_dtype_that_was_asked_for(tmp_path):
    file = make_checkpoint(tmp_path / "x.safetensors", layers=5, heads=2, head_dim=64)
    for dtype in (mx.bfloat16, mx.float32, mx.float16):
        model = load_transformer(file, dtype, quantization=Quantization.parse("mxfp4"))
        kinds = {parameter.dtype for _, parameter in tree_flatten(model.parameters())}
        assert kinds == {dtype, mx.uint32, mx.uint8}
        assert model.dtype == dtype


def test_the_bits_do_not_depend_on_the_dtype(tmp_path):
    file = make_checkpoint(tmp_path / "x.safetensors", layers=5, heads=2, head_dim=64)
    models = [load_transformer(file, dtype, quantization=SETTINGS["q4"]) for dtype in (mx.bfloat16, mx.float32)]
    layers = [model.blocks[2].video.attn1.to_q for model in models]
    assert mx.array_equal(layers[0].weight, layers[1].weight)
    assert mx.array_equal(layers[0].scales.astype(mx.float32), layers[1].scales)


def test_one_stream_alone_is_quantised_too():
    model = load_transformer(SafetensorsFile(PLAIN_FILE), mx.float32, audio=False, quantization=SMALL[0])
    assert quantised(model)
    assert not any(".audio." in path for path in quantised(model))


def test_groups_must_divide_the_width_of_at_least_one_layer():
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lines = [nn.Linear(48, 64), nn.Linear(64, 48)]

    rules = (Rule(r"lines\.\d", Level.USUAL),)
    assert choose_formats(Narrow(), rules, SETTINGS["q4"]) == {"lines.1": WeightFormat()}
    with pytest.raises(UserError, match="--quantize q4: this model has no layer that 128 divides"):
        choose_formats(Narrow(), rules, Quantization.parse("q4", 128))


def test_a_wrong_weight_is_still_noticed(tmp_path):
    loaded = mx.load(str(PLAIN_FILE))
    loaded[f"{DIT}transformer_blocks.1.attn1.to_q.weight"] = mx.zeros((64, 32))
    path = tmp_path / "wrong.safetensors"
    mx.save_safetensors(str(path), loaded, SafetensorsFile(PLAIN_FILE).metadata)
    with pytest.raises(UserError, match=r"attn1.to_q.weight is \[64, 32\], not \[64, 64\]"):
        load_transformer(SafetensorsFile(path), quantization=SMALL[0])


def test_the_plain_model_is_never_in_memory_whole(tmp_path):
    file = make_checkpoint(tmp_path / "mid.safetensors", layers=12, heads=8, head_dim=64)
    whole = sum(info.nbytes for info in file.tensors.values())
    assert whole > 100 << 20
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = load_transformer(file, mx.bfloat16, quantization=SETTINGS["q4"])
    for block in model.blocks:  # as the pipelines do it
        mx.eval(block.parameters())
    mx.eval(model.parameters())
    held = mx.get_active_memory() - before
    peak = mx.get_peak_memory() - before
    assert held < 0.5 * whole
    assert peak - held < 2.5 * whole / len(model.blocks)


# Gemma


def test_gemma_from_a_plain_folder():
    setting = Quantization.parse("q4", 32)
    model = load_gemma(GEMMA, mx.float32, setting).model
    assert model.embed_tokens.bits == 8
    assert {layer.bits for layer in quantised(model).values()} == {4}
    assert len(quantised(model)) == 7 * len(model.layers)
    assert all(type(layer) is QuantizedLinear for layer in quantised(model).values())
    plain = load_gemma(GEMMA, mx.float32).model
    tokens = mx.array([[2, 5, 6, 7]])
    a, b = model.embed(tokens), plain.embed(tokens)
    assert 0 < (mx.linalg.norm(a - b) / mx.linalg.norm(b)).item() < 0.02


def test_gemma_that_is_quantised_already(tmp_path):
    shutil.copytree(GEMMA, tmp_path / "pack")
    tensors = mx.load(str(GEMMA / "model.safetensors"))
    key = "language_model.model.layers.0.mlp.up_proj"
    tensors.update(
        {
            f"{key}.{name}": part
            for name, part in WeightFormat("affine", 4, 32).quantize(tensors[f"{key}.weight"]).items()
        }
    )
    mx.save_safetensors(str(tmp_path / "pack" / "model.safetensors"), tensors)
    config = json.loads((GEMMA / "config.json").read_text()) | {"quantization": {"bits": 4, "group_size": 32}}
    (tmp_path / "pack" / "config.json").write_text(json.dumps(config))
    assert list(quantised(load_gemma(tmp_path / "pack").model)) == ["layers.0.mlp.up_proj"]
    with pytest.raises(UserError, match=r"the Gemma 3 text model is already quantised \(4 bits, affine\)"):
        load_gemma(tmp_path / "pack", quantization=Quantization.parse("q4", 32))


# Published fp8


def test_fp8_weights_are_those_of_the_reference():
    compared = list(runner_for("fp8")(GoldenSet(GOLDEN, "fp8")))
    tensors = [result for result in compared if isinstance(result, Comparison)]
    assert len(tensors) == 34
    assert max(result.error for result in tensors) == 0
    assert [result.case[:10] for result in compared if isinstance(result, NotCovered)] == ["castpolicy"]


def test_an_fp8_checkpoint_loads_and_comes_close():
    model = load_transformer(SafetensorsFile(FP8_FILE), mx.float32)
    assert not quantised(model)
    assert 1e-2 < worst_velocity(model) < 5e-2  # 3 bits of mantissa
    assert {p.dtype for _, p in tree_flatten(load_transformer(SafetensorsFile(FP8_FILE)).parameters())} == {mx.bfloat16}


def test_fp8_weights_can_be_quantised_again():
    model = load_transformer(SafetensorsFile(FP8_FILE), mx.float32, quantization=Quantization.parse("q8", 32))
    assert isinstance(model.blocks[1].video.attn1.to_q, QuantizedLinear)
    assert worst_velocity(model) < 5e-2


def test_fp8_weights_come_back_after_a_lora():
    file = SafetensorsFile(FP8_FILE)
    switch = LoraSwitch(load_transformer(file, mx.float32), file)
    path = "blocks.1.video.attn1.to_q"
    before = mx.array(switch.layers[path].weight)
    switch.fused.add(path)
    assert mx.array_equal(switch._original(path, switch.layers[path]), before)


def rewrite(path: Path, change) -> SafetensorsFile:
    """The fp8 checkpoint with a changed header; data that nothing names stay in the file."""
    raw = FP8_FILE.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    return SafetensorsFile(path)


LAYER = f"{DIT}transformer_blocks.1.attn1.to_q"


def nvfp4(header: dict) -> None:
    header[f"{LAYER}.weight"] |= {"dtype": "U8"}
    header[f"{LAYER}.weight_scale_2"] = header[f"{LAYER}.weight_scale"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.pop(f"{LAYER}.weight_scale"), "to_q.weight is F8_E4M3 without a scale of its own"),
        (lambda h: h.update({f"{LAYER}.weight_scale": h[f"{LAYER}.bias"]}), "without a scale of its own"),
        (lambda h: h[f"{LAYER}.weight"].update(dtype="F8_E5M2"), "unexpected"),
        (lambda h: h[f"{LAYER}.weight"].update(dtype="I8"), "unexpected"),
        (nvfp4, "its weights are NVFP4 for NVIDIA GPUs"),
    ],
)
def test_other_layouts_of_eight_bits_are_refused(tmp_path, change, message):
    file = rewrite(tmp_path / "x.safetensors", change)
    with pytest.raises(UserError, match=message) as caught:
        load_transformer(file)
    assert "\n" not in str(caught.value)


def test_input_scales_are_not_needed(tmp_path):
    file = rewrite(tmp_path / "x.safetensors", lambda h: h.pop(f"{LAYER}.input_scale"))
    layers = [
        load_transformer(each, mx.float32).blocks[1].video.attn1.to_q for each in (file, SafetensorsFile(FP8_FILE))
    ]
    assert np.array_equal(np.array(layers[0].weight), np.array(layers[1].weight))
