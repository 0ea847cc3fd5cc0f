"""``benchmark.py quantize``: what quantised weights cost in time and in accuracy, at published widths.

Speed: single layers beside the same layers with dense weights, run in turns, so that a busy machine disturbs both.

Accuracy: one block of both streams. Published weights cannot be had here, so they are drawn: normal with a standard
deviation of 0.02, rows and columns scaled by log-normal factors (sigma 0.4), and one weight in a thousand ten times
larger, rounded to bfloat16 as published. The error is that of the block's change to its tokens, relative to the change
with plain weights: the residual stream itself would hide it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from benchmark import (
    WHOLE,
    Measurement,
    Stopwatch,
    block_states,
    chosen_dtype,
    dtype_name,
    load_config,
    ready,
    size,
)
from mlx_ltx.checkpoints.quantize import SETTINGS, Quantization, choose_formats, transformer_rules
from mlx_ltx.models.passes import Perturbation
from mlx_ltx.models.quantized import QuantizedLinear, WeightFormat, quantize_layers, quantized_layer
from mlx_ltx.models.transformer import Transformer
from mlx_ltx.models.transformer_block import Block, StreamState
from mlx_ltx.models.transformer_config import TransformerConfig

WIDTHS = ((4096, 4096), (4096, 16384), (16384, 4096))
PARTS = ("speed", "accuracy")


def add_command(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Register the sub-command."""
    parser = commands.add_parser("quantize", parents=parents, help="quantised layers: speed, and error of a block")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME", help="(all)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(both)")
    parser.add_argument("--tokens", type=WHOLE, nargs="+", default=[1, 2, 4, 2048], metavar="N", help="(1 2 4 2048)")
    parser.add_argument(
        "--widths", type=size, nargs="+", default=list(WIDTHS), metavar="INxOUT", help="of layers (as in LTX-2.3)"
    )
    parser.add_argument("--block-tokens", type=WHOLE, default=64, metavar="N", help="video tokens (%(default)s)")
    parser.set_defaults(run=benchmark_quantize)


def benchmark_quantize(arguments: argparse.Namespace) -> Iterator[Measurement]:
    if "speed" in arguments.parts:
        yield from measure_layers(arguments)
    if "accuracy" in arguments.parts:
        yield from measure_block(arguments)


# --- speed ---


def measure_layers(arguments: argparse.Namespace) -> Iterator[Measurement]:
    """Every width, setting and number of tokens: the quantised layer, beside the dense one."""
    dtype = chosen_dtype(arguments)
    watch = Stopwatch(arguments.repeats, arguments.limit)
    for inputs, outputs in arguments.widths:
        dense = nn.Linear(inputs, outputs)
        dense.weight = draw_weight(outputs, inputs).astype(dtype)
        dense.bias = mx.zeros((outputs,), dtype)
        mx.eval(dense.parameters())
        for name in arguments.settings:
            quantised = quantise_linear(dense, SETTINGS[name].usual)
            for tokens in arguments.tokens:
                x = mx.random.normal((tokens, inputs)).astype(dtype)
                mx.eval(x)
                where = f"{inputs} to {outputs}, {tokens} tokens, {dtype_name(dtype)}"
                runs = {"dense": partial(_run, dense, x), name: partial(_run, quantised, x)}
                plain, packed = watch.measure_in_turns({f"{where}, {each}": run for each, run in runs.items()})
                yield plain
                # Of the fastest runs: other work on the machine only ever adds.
                yield replace(packed, figures={"times dense": min(packed.seconds) / min(plain.seconds)})


def _run(layer: nn.Module, x: mx.array) -> None:
    mx.eval(layer(x))


def quantise_linear(layer: nn.Linear, weight_format: WeightFormat) -> QuantizedLinear:
    """An evaluated quantised layer with the weights of ``layer``."""
    quantised = quantized_layer(layer, weight_format)
    assert isinstance(quantised, QuantizedLinear)
    quantised.load_weights([*weight_format.quantize(layer.weight).items(), ("bias", layer.bias)])
    mx.eval(quantised.parameters())
    return quantised


# --- accuracy ---


def measure_block(arguments: argparse.Namespace) -> Iterator[Measurement]:
    """One block with plain weights, then quantised in every setting; the time is that of a pass, for comparison."""
    config = replace(load_config(arguments, TransformerConfig.from_metadata), layers=1)
    dtype = chosen_dtype(arguments)
    model = Transformer(config)
    model.load_weights([(path, draw(path, each)) for path, each in tree_flatten(model.parameters())])
    paths = choose_formats(model, transformer_rules(config.layers), Quantization.parse(arguments.settings[0])).keys()
    weights = dict(tree_flatten(model.blocks[0].parameters()))
    model.set_dtype(dtype)
    video, audio = block_states(model, arguments.block_tokens, max(1, arguments.block_tokens // 2), 128)
    del model
    watch = Stopwatch(arguments.repeats, arguments.limit)
    title = f"block, {arguments.block_tokens} video tokens, {dtype_name(dtype)}"
    plain = build_block(config, weights, {}, dtype)
    expected = changes(plain, video, audio)
    yield replace(watch.measure(f"{title}, plain", partial(_run_block, plain, video, audio)), figures={"bits": 16.0})
    del plain
    for name in arguments.settings:
        formats = {path.removeprefix("blocks.0."): SETTINGS[name].usual for path in paths}
        block = build_block(config, weights, formats, dtype)
        errors = [relative_error(a, b) for a, b in zip(changes(block, video, audio), expected, strict=True)]
        figures = {"bits": SETTINGS[name].usual.bits_per_weight, "video error": errors[0], "audio error": errors[1]}
        measured = watch.measure(f"{title}, {name}", partial(_run_block, block, video, audio))
        yield replace(measured, figures=figures)
        del block


def draw_weight(outputs: int, inputs: int) -> mx.array:
    """A bfloat16 weight (outputs, inputs) as the module's description says."""
    weight = 0.02 * mx.random.normal((outputs, inputs))
    weight = weight * mx.exp(0.4 * mx.random.normal((outputs, 1))) * mx.exp(0.4 * mx.random.normal((1, inputs)))
    outliers = mx.random.uniform(shape=weight.shape) < 1e-3
    return mx.where(outliers, 10 * weight, weight).astype(mx.bfloat16)


def draw(path: str, parameter: mx.array) -> mx.array:
    """Matrices as above, weights of norms 1, everything else normal and small."""
    if path.endswith("norm.weight"):
        return mx.ones(parameter.shape, mx.bfloat16)
    if path.endswith(".weight"):
        return draw_weight(*parameter.shape)
    return (0.02 * mx.random.normal(parameter.shape)).astype(mx.bfloat16)


def build_block(
    config: TransformerConfig, weights: Mapping[str, mx.array], formats: Mapping[str, WeightFormat], dtype: mx.Dtype
) -> Block:
    """A block as the loader makes it: quantised from bfloat16, then in ``dtype``."""
    block = Block(config)
    quantize_layers(block, formats)
    parts: list[tuple[str, mx.array]] = []
    for path, weight in weights.items():
        layer, _, name = path.rpartition(".")
        if name == "weight" and layer in formats:
            parts += [(f"{layer}.{part}", each) for part, each in formats[layer].quantize(weight).items()]
        else:
            parts.append((path, weight))
    block.load_weights(parts, strict=True)
    ready(block, dtype)
    mx.clear_cache()
    return block


def changes(block: Block, video: StreamState, audio: StreamState) -> list[mx.array]:
    """What the block adds to the tokens of both streams."""
    after = block(video, audio, 0, (Perturbation(),))
    result = [new.x - old.x for new, old in zip(after, (video, audio), strict=True) if new is not None]
    mx.eval(result)
    return result


def _run_block(block: Block, video: StreamState, audio: StreamState) -> None:
    changes(block, video, audio)


def relative_error(actual: mx.array, expected: mx.array) -> float:
    actual, expected = actual.astype(mx.float32), expected.astype(mx.float32)
    return float((mx.linalg.norm(actual - expected) / mx.linalg.norm(expected)).item())
