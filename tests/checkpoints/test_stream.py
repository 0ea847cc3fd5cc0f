"""Streaming a transformer's blocks from disk: the bits of resident weights, in the memory of a few blocks."""

import gc
import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from safetensors.numpy import save_file

import parity.transformer
from make_synthetic_checkpoint import official_names, published_config, write_checkpoint
from mlx_ltx.checkpoints.catalogue import demo_folder
from mlx_ltx.checkpoints.components import load_transformer
from mlx_ltx.checkpoints.files import SafetensorsFile
from mlx_ltx.checkpoints.lora import Lora, LoraFile
from mlx_ltx.checkpoints.lora_switch import LoraSwitch
from mlx_ltx.checkpoints.packs import open_checkpoint, write_pack
from mlx_ltx.checkpoints.quantize import Quantization
from mlx_ltx.checkpoints.stream import BlockStream, evaluate_ends
from mlx_ltx.models.passes import PassInput, Perturbation, StreamInput
from parity import GoldenSet

GOLDEN = Path(__file__).parents[1] / "golden"
MIB = 1 << 20


def streamed(load, ahead=1):
    model = load()
    model.take_blocks_from(BlockStream(load, ahead))
    evaluate_ends(model)
    return model


def finish(generator, after=lambda: None):
    while True:
        try:
            hidden = next(generator)
        except StopIteration as end:
            return end.value
        mx.eval(hidden)
        del hidden
        after()


@pytest.mark.parametrize("name", ["transformer_19b", "transformer_23"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_streamed_is_resident_bit_for_bit(name, dtype, ahead):
    golden = GoldenSet(GOLDEN, name)
    file = golden.checkpoint()
    resident = load_transformer(file, dtype)
    model = streamed(lambda: load_transformer(file, dtype), ahead)
    video, audio = parity.transformer.stream_inputs(resident, golden, "plain")
    passes = [PassInput(video, audio), PassInput(video, audio, (Perturbation(frozenset({1})),))]
    expected = finish(resident.forward_passes(passes))
    for _ in range(2):  # a pass leaves nothing behind that the next one would miss
        found = finish(model.forward_passes(passes))
        for ours, theirs in zip(found, expected, strict=True):
            assert mx.array_equal(ours.video, theirs.video)
            assert mx.array_equal(ours.audio, theirs.audio)
    assert not mx.array_equal(found[0].video, found[1].video)


def test_loras_are_streamed_too():
    file = GoldenSet(GOLDEN, "transformer_23").checkpoint()
    golden = GoldenSet(GOLDEN, "transformer_23")
    loras = [Lora(LoraFile(GOLDEN / f"lora_{number}.safetensors"), 0.5 + number) for number in (0, 1)]

    def load():
        model = load_transformer(file, mx.float32)
        LoraSwitch(model, file).use(loras)
        return model

    resident, bare = load(), load_transformer(file, mx.float32)
    inputs = parity.transformer.stream_inputs(resident, golden, "plain")
    found, expected = streamed(load)(*inputs), resident(*inputs)
    assert mx.array_equal(found.video, expected.video)
    assert not mx.allclose(found.video, bare(*inputs).video, atol=1e-4)


def test_a_pass_that_is_broken_off_leaves_the_next_one_whole():
    golden = GoldenSet(GOLDEN, "transformer_23")
    file = golden.checkpoint()
    model = streamed(lambda: load_transformer(file, mx.float32))
    inputs = parity.transformer.stream_inputs(model, golden, "plain")
    expected = model(*inputs)
    broken = model.forward(*inputs)
    next(broken)
    broken.close()
    assert mx.array_equal(model(*inputs).video, expected.video)


def test_random_numbers_are_the_same_as_without_streaming():
    golden = GoldenSet(GOLDEN, "transformer_23")
    file = golden.checkpoint()
    model = streamed(lambda: load_transformer(file, mx.float32))
    inputs = parity.transformer.stream_inputs(model, golden, "plain")
    mx.random.seed(7)
    expected = mx.random.normal((4,))
    mx.random.seed(7)
    mx.eval(model(*inputs).video)
    assert mx.array_equal(mx.random.normal((4,)), expected)


LAYERS = 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """12 blocks of about 20 MiB in bfloat16."""
    config = published_config("19b")
    config["transformer"] |= {
        "num_layers": LAYERS, "num_attention_heads": 8, "attention_head_dim": 96, "cross_attention_dim": 768,
        "audio_num_attention_heads": 8, "audio_attention_head_dim": 24, "audio_cross_attention_dim": 192,
        "caption_channels": 64,
    }  # fmt: skip
    path = tmp_path_factory.mktemp("synthetic") / "middle.safetensors"
    write_checkpoint(path, config, official_names("19b"))
    return SafetensorsFile(path)


def tokens(model, video=16, audio=4, text=8):
    random = np.random.default_rng(0)
    positions = [random.uniform(0, 1, (1, n, count, 2)).astype(np.float32) for n, count in ((3, video), (1, audio))]
    config = model.config
    return [
        StreamInput(
            latent=mx.array(random.standard_normal((1, count, stream.in_channels), np.float32)),
            sigma=mx.array([0.5]),
            timesteps=mx.array([[0.5]]),
            context=mx.array(
                random.standard_normal((1, text, stream.caption_channels or stream.context_dim), np.float32)
            ),
            rope=rope,
        )
        for stream, count, rope in zip(
            (config.video, config.audio), (video, audio), model.rope(*positions), strict=True
        )
    ]


def block_bytes(model):
    return sum(info.nbytes for key, info in model.tensors.items() if ".transformer_blocks.0." in key)


def peak_above_ends(model):
    """What a forward pass adds to the layers around the blocks, at most."""
    inputs = tokens(model)
    gc.collect()
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    seen = []
    velocities = finish(model.forward(*inputs), lambda: seen.append(mx.get_active_memory() - before))
    mx.eval(velocities)
    assert bool(mx.isfinite(velocities.video).all())
    return mx.get_peak_memory() - before, max(seen)


@pytest.mark.parametrize(("ahead", "blocks"), [(0, 1), (1, 2), (2, 3)])
def test_only_some_blocks_are_in_memory(checkpoint, ahead, blocks):
    size = block_bytes(checkpoint)
    assert 16 * MIB < size < 24 * MIB
    model = streamed(lambda: load_transformer(checkpoint, mx.bfloat16), ahead)
    peak, between = peak_above_ends(model)
    assert blocks * size < peak < (blocks + 0.3) * size
    assert between < (blocks + 0.3) * size


def test_after_a_pass_no_block_is_in_memory(checkpoint):
    model = streamed(lambda: load_transformer(checkpoint, mx.bfloat16))
    before = mx.get_active_memory()
    finish(model.forward(*tokens(model)))
    gc.collect()
    assert mx.get_active_memory() - before < MIB


def test_resident_weights_take_all_the_memory(checkpoint):
    """What the limits above are measured against."""
    model = load_transformer(checkpoint, mx.bfloat16)
    evaluate_ends(model)
    peak, _ = peak_above_ends(model)
    assert peak > LAYERS * block_bytes(checkpoint)


def test_a_checkpoint_of_less_tensors_is_refused_before_any_block_is_read(tmp_path):
    file = GoldenSet(GOLDEN, "transformer_23").checkpoint()
    tensors = {key: np.array(file.arrays[key].astype(mx.float32)) for key in file.tensors if ".2.attn1.to_q" not in key}
    save_file(tensors, tmp_path / "less.safetensors", {"config": json.dumps(file.config)})
    less = SafetensorsFile(tmp_path / "less.safetensors")
    with pytest.raises(Exception, match="missing"):
        streamed(lambda: load_transformer(less, mx.float32))


@pytest.mark.parametrize("setting", ["q4", "q8", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("with_lora", [False, True])
def test_blocks_are_quantised_while_they_are_streamed(setting, with_lora):
    golden = GoldenSet(GOLDEN, "transformer_23")
    file = golden.checkpoint()
    quantization = Quantization.parse(setting, 32 if setting.startswith("q") else None)
    loras = [Lora(LoraFile(GOLDEN / "lora_0.safetensors"), 1.0)] if with_lora else []

    def load():
        model = load_transformer(file, mx.float32, quantization=quantization)
        LoraSwitch(model, file).use(loras)
        return model

    resident = load()
    assert any(isinstance(layer, nn.QuantizedLinear) for _, layer in resident.blocks[0].named_modules())
    inputs = parity.transformer.stream_inputs(resident, golden, "plain")
    found, expected = streamed(load)(*inputs), resident(*inputs)
    assert mx.array_equal(found.video, expected.video)
    assert mx.array_equal(found.audio, expected.audio)


def test_a_saved_pack_is_streamed(tmp_path):
    source = SafetensorsFile(next(demo_folder().glob("*demo*.safetensors")))
    list(write_pack(source, tmp_path / "pack", Quantization.parse("q4", 32)))
    pack = open_checkpoint(tmp_path / "pack")
    resident = load_transformer(pack, mx.float32)
    assert any(isinstance(layer, nn.QuantizedLinear) for _, layer in resident.blocks[0].named_modules())
    model = streamed(lambda: load_transformer(pack, mx.float32))
    inputs = tokens(model)
    for _ in range(2):
        assert mx.array_equal(model(*inputs).video, resident(*inputs).video)


def test_quantised_while_streamed_a_block_is_held_in_its_few_bits(checkpoint):
    """Measured: 0.54 of the plain block held (8 bits in the outermost), 1.53 while it is quantised."""
    quantization = Quantization.parse("q4", 64)
    model = streamed(lambda: load_transformer(checkpoint, mx.bfloat16, quantization=quantization), ahead=0)
    peak, between = peak_above_ends(model)
    assert between < 0.6 * block_bytes(checkpoint)
    assert peak < 1.7 * block_bytes(checkpoint)
