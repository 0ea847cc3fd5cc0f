"""LoRA training: which layers, on plain and quantised weights, and the files that come out."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_ltx.checkpoints.components import load_transformer
from mlx_ltx.checkpoints.files import SafetensorsFile
from mlx_ltx.checkpoints.lora import Lora, LoraFile
from mlx_ltx.checkpoints.lora_switch import LoraSwitch
from mlx_ltx.checkpoints.quantize import Quantization
from mlx_ltx.errors import UserError
from mlx_ltx.models import quantized
from mlx_ltx.models.quantized import QuantizedLinear
from mlx_ltx.training.flow import FlowLoss
from mlx_ltx.training.loop import Training
from mlx_ltx.training.lora import LoraSettings, LoraTraining, TrainedLora, choose_layers
from mlx_ltx.training.optimizer import Optimization

NAMES = (
    "transformer_blocks.0.attn1.to_k", "transformer_blocks.0.audio_attn1.to_k", "transformer_blocks.0.attn1.to_out.0",
    "transformer_blocks.0.ff.net.2", "transformer_blocks.0.audio_ff.net.2", "transformer_blocks.12.attn1.to_k",
)  # fmt: skip


@pytest.mark.parametrize(
    ("target", "places"),
    [
        ("to_k", (0, 1, 5)),
        ("attn1.to_k", (0, 5)),
        ("audio_attn1.to_k", (1,)),
        ("to_out.0", (2,)),
        ("ff.net.2", (3,)),
        ("*ff.net.2", (3, 4)),
        ("transformer_blocks.0.*", (0, 1, 2, 3, 4)),
        ("transformer_blocks.1?.*", (5,)),
    ],
)
def test_targets(target, places):
    official = dict(zip("abcdef", NAMES, strict=True))
    assert choose_layers(official, [target]) == ["abcdef"[place] for place in places]


def test_a_target_that_means_no_layer(transformer, golden):
    checkpoint = SafetensorsFile(golden / "transformer_23.ckpt.safetensors")
    with pytest.raises(UserError, match=r"lora.target_modules: 'to_x' is no layer of the model; try one of .*to_k"):
        LoraTraining(transformer, checkpoint, LoraSettings(target_modules=("to_k", "to_x")), 0)


def trained(golden, make_batch, quantization=None, steps=3, checkpointing=False, **settings):
    checkpoint = SafetensorsFile(golden / "transformer_23.ckpt.safetensors")
    model = load_transformer(checkpoint, mx.float32, quantization=quantization)
    lora = LoraTraining(model, checkpoint, LoraSettings(**{"rank": 4, "alpha": 8, **settings}), 0)
    training = Training(model, Optimization(learning_rate=1e-2, steps=steps))
    before = velocity(model, make_batch())
    batch = make_batch()
    events = list(training.run(lora.with_dropout(FlowLoss(checkpointing=checkpointing)), lambda number: batch))
    return model, lora, training, before, events


def velocity(model, batch):
    video, audio = FlowLoss().noise(model, batch, mx.random.key(2))
    return model(video.given, audio.given).video


@pytest.mark.parametrize("quantization", [None, Quantization.parse("q8")])
def test_it_begins_as_no_change_and_learns(golden, make_batch, quantization):
    model, _, training, before, events = trained(golden, make_batch, quantization, steps=10)
    assert events[-1].loss < events[0].loss
    assert {path.rpartition(".")[2] for path in training.parameters} == {"down", "up"}
    plain = load_transformer(
        SafetensorsFile(golden / "transformer_23.ckpt.safetensors"), mx.float32, quantization=quantization
    )
    assert mx.allclose(velocity(plain, make_batch()), before, atol=1e-6)
    assert not mx.allclose(velocity(model, make_batch()), before, atol=1e-3)


def test_the_file_gives_what_was_trained(golden, make_batch, tmp_path):
    model, lora, training, _, _ = trained(golden, make_batch)
    path = tmp_path / "lora.safetensors"
    lora.save(path, training.result, {"lora_rank": "4"}, mx.float32)
    file = LoraFile(path)
    assert file.file.metadata == {"format": "pt", "lora_rank": "4"}
    assert len(file.layers) == 3 * 6 * 4
    assert "diffusion_model.transformer_blocks.0.audio_to_video_attn.to_out.0.lora_B.weight" in file.file.tensors
    checkpoint = SafetensorsFile(golden / "transformer_23.ckpt.safetensors")
    plain = load_transformer(checkpoint, mx.float32)
    assert LoraSwitch(plain, checkpoint).use([Lora(file)]) == []
    assert mx.allclose(velocity(plain, make_batch()), velocity(model, make_batch()), atol=1e-5)


def test_checkpointed_dropout_has_the_same_gradient(golden, make_batch):
    one = trained(golden, make_batch, steps=2, dropout=0.3)[2]
    other = trained(golden, make_batch, steps=2, dropout=0.3, checkpointing=True)[2]
    without = trained(golden, make_batch, steps=2)[2]
    for path, expected in one.parameters.items():
        assert mx.allclose(other.parameters[path], expected, atol=1e-5), path
    assert any(not mx.allclose(without.parameters[path], value, atol=1e-4) for path, value in one.parameters.items())


def test_dropout_leaves_out_inputs_of_the_change_only():
    base = mx.random.normal((3, 64), key=mx.random.key(0))
    layer = TrainedLora(linear(base), LoraSettings(rank=64, alpha=64, dropout=0.5), mx.random.key(1))
    layer.down, layer.up = mx.eye(64), mx.ones((3, 64))
    x = mx.ones((1000, 64))
    expected = base.sum(axis=1) + 64
    assert mx.allclose(layer(x), mx.broadcast_to(expected, (1000, 3)), rtol=1e-4)
    layer.draw(mx.random.key(2))
    dropped = np.array(layer(x) - base.sum(axis=1))
    assert dropped.mean() == pytest.approx(64, rel=0.02)
    assert dropped.std() == pytest.approx(8, rel=0.1)  # 64 draws of 0 or 2


def linear(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = weight
    return layer


def test_a_gradient_goes_through_quantised_layers(golden, make_batch, monkeypatch):
    quantization = Quantization.parse("q8")
    _, lora, whole, _, expected_events = trained(golden, make_batch, quantization)
    quantised = [layer.base for layer in lora.layers.values() if isinstance(layer.base, QuantizedLinear)]
    assert quantised
    assert all(layer.training for layer in quantised)  # lazy, so that nothing is kept that gradients do not need
    monkeypatch.setattr(quantized, "limits", lambda: quantized.Limits(packed_rows=2, piece_rows=24))
    for checkpointing in (False, True):
        _, _, pieces, _, events = trained(golden, make_batch, quantization, checkpointing=checkpointing)
        for event, expected in zip(events, expected_events, strict=True):
            assert event.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-4)
        for path, parameter in whole.parameters.items():
            # AdamW goes as far for tiny gradients, whose rounding differs, as for large ones.
            assert mx.allclose(pieces.parameters[path], parameter, atol=1e-3), path


def test_every_layer_has_the_name_and_shape_that_diffusers_loads(golden, transformer, tmp_path):
    """The listing is what diffusers made of such a file (scripts/check_trained_lora.py)."""
    checkpoint = SafetensorsFile(golden / "transformer_23.ckpt.safetensors")
    lora = LoraTraining(transformer, checkpoint, LoraSettings(rank=2, target_modules=("*",)), 0)
    parameters = Training(transformer, Optimization()).parameters
    lora.save(tmp_path / "lora.safetensors", parameters, {})
    expected = {}
    for name, layer in json.loads((golden / "trained_lora_layers.json").read_text()).items():
        expected[f"diffusion_model.{name}.lora_A.weight"] = tuple(layer["A"])
        expected[f"diffusion_model.{name}.lora_B.weight"] = tuple(layer["B"])
    made = SafetensorsFile(tmp_path / "lora.safetensors")
    assert {key: info.shape for key, info in made.tensors.items()} == expected
    assert {info.dtype for info in made.tensors.values()} == {"BF16"}
