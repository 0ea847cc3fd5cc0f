"""``benchmark.py step`` and ``stream``: what a guided step saves, and what reading weights while computing costs."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from benchmark import WHOLE, Measurement, Stopwatch, chosen_dtype, dtype_name, load_config, ready, stream_inputs
from make_synthetic_checkpoint import official_names, published_config, write_checkpoint
from mlx_ltx.checkpoints.components import load_transformer
from mlx_ltx.checkpoints.files import SafetensorsFile
from mlx_ltx.checkpoints.stream import BlockStream, evaluate_ends
from mlx_ltx.errors import UserError
from mlx_ltx.models.passes import PassInput, Perturbation
from mlx_ltx.models.transformer import Transformer
from mlx_ltx.models.transformer_block import Block
from mlx_ltx.models.transformer_config import TransformerConfig


def add_commands(commands: Any, parents: list[argparse.ArgumentParser], shape: argparse.ArgumentParser) -> None:
    """Register the sub-commands; ``shape`` is that of all that take a config from a checkpoint."""
    step = commands.add_parser("step", parents=[*parents, shape], help="a guided step and its four passes")
    _add_tokens(step, [32], 16, 32)
    step.add_argument("--layers", type=WHOLE, default=12, metavar="N", help="blocks (%(default)s; real models: 48)")
    step.set_defaults(run=benchmark_step)

    stream = commands.add_parser("stream", parents=parents, help="the transformer read from disk")
    _add_tokens(stream, [16, 128], 8, 16)
    stream.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="by default one with random weights, written for the occasion"
    )
    stream.add_argument("--layers", type=WHOLE, default=3, metavar="N", help="its blocks, 0.8 GB each (%(default)s)")
    stream.add_argument("--folder", type=Path, metavar="FOLDER", help="where it is written; by default the system's")
    stream.set_defaults(run=benchmark_stream)


def _add_tokens(parser: argparse.ArgumentParser, video: list[int], audio: int, text: int) -> None:
    listed = " ".join(map(str, video))
    parser.add_argument("--tokens", type=WHOLE, nargs="+", default=video, metavar="N", help=f"video tokens ({listed})")
    parser.add_argument("--audio-tokens", type=WHOLE, default=audio, metavar="N", help="(%(default)s)")
    parser.add_argument(
        "--text-tokens", type=WHOLE, default=text, metavar="N", help="(%(default)s; real prompts: 1024)"
    )


# --- a guided step ---


def benchmark_step(arguments: argparse.Namespace) -> Iterator[Measurement]:
    """A fully guided step (negative prompt, STG at 28/48 of the depth, isolated modalities) beside four full passes."""
    config = load_config(arguments, TransformerConfig.from_metadata)
    if config.video is None or config.audio is None:
        raise UserError("the config has no audio-video transformer")
    dtype = chosen_dtype(arguments)
    layers = arguments.layers
    model = _deepened(replace(config, layers=1), dtype, layers)
    perturbed = Perturbation(*[frozenset({round(layers * 28 / 48)})] * 2)
    watch = Stopwatch(arguments.repeats, arguments.limit)
    for tokens in arguments.tokens:
        prompt, negative = (
            stream_inputs(model, tokens, arguments.audio_tokens, arguments.text_tokens) for _ in range(2)
        )
        guided = [
            PassInput(*prompt),
            PassInput(*negative),
            PassInput(*prompt, (perturbed,)),
            PassInput(*prompt, (Perturbation(isolated=True),)),
        ]
        what = f"{tokens} video + {arguments.audio_tokens} audio tokens, {layers} blocks, {dtype_name(dtype)}"
        full, step = watch.measure_in_turns(
            {
                f"four full passes, {what}": partial(_run, model, [[PassInput(*prompt)]] * 4),
                f"guided step, {what}": partial(_run, model, [guided]),
            }
        )
        blocks = {"blocks": float(model.evaluations(guided))}
        yield replace(full, figures={"blocks": 4.0 * layers})
        yield replace(step, figures={**blocks, "of the four passes' time": step.median / full.median})


def _deepened(config: TransformerConfig, dtype: mx.Dtype, layers: int) -> Transformer:
    """A model whose only block comes again and again: the work of many, the memory of one."""
    shallow = ready(Transformer(config), dtype)
    model = Transformer(replace(config, layers=layers))
    model.update(shallow.parameters())
    model.take_blocks_from(shallow.blocks * layers)
    return model


def _run(model: Transformer, groups: Iterable[list[PassInput]]) -> None:
    """Passes, each group together, evaluated as denoising does."""
    for passes in groups:
        running = model.forward_passes(passes)
        while True:
            try:
                mx.eval(next(running))
            except StopIteration as end:
                mx.eval(end.value)
                break


# --- streamed weights ---


def benchmark_stream(arguments: argparse.Namespace) -> Iterator[Measurement]:
    """Forward passes with the blocks in memory, and read from disk without and with reading ahead."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = arguments.checkpoint
        if path is None:
            path = Path(folder) / "synthetic.safetensors"
            config = published_config("19b")
            config["transformer"]["num_layers"] = arguments.layers
            write_checkpoint(path, config, official_names("19b"))
        yield from _stream_from(SafetensorsFile(path), arguments)


def _stream_from(file: SafetensorsFile, arguments: argparse.Namespace) -> Iterator[Measurement]:
    dtype = chosen_dtype(arguments)
    watch = Stopwatch(arguments.repeats, arguments.limit)
    load = partial(load_transformer, file, dtype)
    model = load()
    evaluate_ends(model)
    layers = model.config.layers
    kept = model.blocks[0]  # in memory, one block stands for all
    mx.eval(kept.parameters())

    def read() -> None:
        forget(file.path)
        for block in BlockStream(load, ahead=0):
            mx.eval(block.parameters())
            del block

    def compute(source: Iterable[Block], inputs: PassInput) -> None:
        forget(file.path)
        model.take_blocks_from(source)
        _run(model, [[inputs]])

    for tokens in arguments.tokens:
        inputs = PassInput(*stream_inputs(model, tokens, arguments.audio_tokens, arguments.text_tokens))
        what = f"{tokens} video + {arguments.audio_tokens} audio tokens"
        runs: dict[str, Callable[[], object]] = {
            f"reading alone, {layers} blocks, {dtype_name(dtype)}": read,
            f"in memory, {what}": partial(compute, [kept] * layers, inputs),
            f"streamed, nothing ahead, {what}": partial(compute, BlockStream(load, 0), inputs),
            f"streamed, one block ahead, {what}": partial(compute, BlockStream(load, 1), inputs),
        }
        reading, memory, *streamed = watch.measure_in_turns(runs)
        yield from (reading, memory)
        for measured in streamed:
            hidden = 1 - (measured.median - memory.median) / reading.median
            yield replace(measured, figures={"reading hidden": min(max(hidden, 0.0), 1.0)})


def forget(path: Path) -> None:
    """Let the system drop what it keeps of a file in memory, where it can be told to (Linux)."""
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
