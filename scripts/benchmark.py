#!/usr/bin/env python3
"""Measure time and memory of the parts that matter, on this machine.

    python scripts/benchmark.py end-to-end  a clip of the embedded demo model, or of another, phase by phase
    python scripts/benchmark.py plan        its predicted memory beside the measured one
    python scripts/benchmark.py text        reading a prompt: the text model, the features, the connectors
    python scripts/benchmark.py block       one block of the transformer, for several numbers of tokens
    python scripts/benchmark.py step        a guided step: its passes one by one, and sharing what they have in common
    python scripts/benchmark.py stream      the transformer read from disk while it runs, and how much of that is hidden
    python scripts/benchmark.py decode      the video decoder, streamed, in bands, in tiles and whole
    python scripts/benchmark.py encode      the video encoder, streamed and whole
    python scripts/benchmark.py vocoder     the vocoder with its bandwidth extension
    python scripts/benchmark.py quantize    quantised layers: their speed, and the error of a block

Networks are built at the widths of LTX-2.3 (or of --checkpoint) with random weights: speed and memory do not depend on
the values. Every number comes from several runs after a warm-up that is not counted. Peak memory is MLX's own count,
less what was in use before the run (weights, inputs). Needs the runtime dependencies only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

import mlx_ltx
from mlx_ltx.checkpoints.components import read_config
from mlx_ltx.checkpoints.files import SafetensorsFile
from mlx_ltx.errors import UserError
from mlx_ltx.media.atomic import check_output
from mlx_ltx.memory.machine import total_memory
from mlx_ltx.models.passes import Perturbation, StreamInput
from mlx_ltx.models.transformer import Transformer
from mlx_ltx.models.transformer_block import Block, StreamState
from mlx_ltx.models.transformer_config import TransformerConfig
from mlx_ltx.models.vocoder import VocoderConfig, build_vocoder

Network = TypeVar("Network", bound=nn.Module)
PUBLISHED_CONFIGS = Path(__file__).parents[1] / "tests" / "golden" / "real_configs.json"
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
MEL_FRAMES_PER_SECOND = 100  # 16 kHz in hops of 160 samples
MIB = 1 << 20
MATMUL_SIZE = 1024
NO_BLAS = "none preloaded"


@dataclass(frozen=True)
class Measurement:
    """One line of the table.

    Attributes:
        name: what was measured.
        seconds: of every run.
        peak_bytes: the largest of the runs' peaks.
        amount, unit: what one run makes ("frames"), for the rate; an amount of 0 has none.
        figures: other results, by what they are called.
        series: the line of a plot that it is a point of; "" for none.
    """

    name: str
    seconds: tuple[float, ...]
    peak_bytes: int
    amount: float = 0
    unit: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    series: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def row(self) -> list[str]:
        rates = [f"{self.amount / self.median:.3g} {self.unit}/s"] if self.amount else []
        rate = ", ".join([*rates, *(f"{name} {value:.3g}" for name, value in self.figures.items())])
        low, high = min(self.seconds), max(self.seconds)
        spread = f"{low:.3f} to {high:.3f}"
        return [self.name, f"{self.median:.3f}", spread, str(len(self.seconds)), f"{self.peak_bytes / MIB:,.1f}", rate]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "median_seconds": self.median}


HEADER = ["", "median s", "min to max s", "runs", "peak MiB", "rate"]


@dataclass
class Stopwatch:
    """Runs something until it has run often enough or long enough.

    Attributes:
        repeats: the most runs that count.
        limit: seconds after which no further run begins, warm-up included.
    """

    repeats: int
    limit: float

    def measure(self, name: str, run: Callable[[], object], amount: float = 0, unit: str = "") -> Measurement:
        """``run`` has to evaluate what it makes; its first time is the warm-up, which counts only if it is the last."""
        seconds: list[float] = []
        peak = 0
        while len(seconds) <= self.repeats and sum(seconds) < self.limit:
            mx.clear_cache()
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            begun = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begun)
            peak = max(peak, mx.get_peak_memory() - before)
        return Measurement(name, tuple(seconds[1:] or seconds), peak, amount, unit)

    def measure_in_turns(self, runs: dict[str, Callable[[], object]]) -> list[Measurement]:
        """As :meth:`measure`, one run of each after the other, so that what disturbs one disturbs all.

        Each has as many runs as the others, and at least one after its warm-up.
        """
        rounds: list[list[Measurement]] = []
        once = Stopwatch(0, self.limit)
        while len(rounds) < 2 or (
            len(rounds) <= self.repeats and sum(each.seconds[0] for one in rounds for each in one) < self.limit
        ):
            rounds.append([once.measure(name, run) for name, run in runs.items()])
        return [
            Measurement(each[0].name, tuple(m.seconds[0] for m in each[1:]), max(m.peak_bytes for m in each))
            for each in zip(*rounds, strict=True)
        ]


# --- what is measured ---


def benchmark_block(arguments: argparse.Namespace) -> Iterator[Measurement]:
    """One block of both streams: self-attention, text, the other stream, feed-forward."""
    config = load_config(arguments, TransformerConfig.from_metadata)
    if config.video is None or config.audio is None:
        raise UserError("the config has no audio-video transformer")
    dtype = chosen_dtype(arguments)
    model = Transformer(replace(config, layers=1))
    model.set_dtype(dtype)
    states = [block_states(model, tokens, arguments.audio_tokens, arguments.text_tokens) for tokens in arguments.tokens]
    block = model.blocks[0]
    del model  # the layers around the block are not measured
    mx.eval(block.parameters())
    mx.clear_cache()
    watch = Stopwatch(arguments.repeats, arguments.limit)
    for tokens, (video, audio) in zip(arguments.tokens, states, strict=True):
        name = f"block, {tokens} video + {arguments.audio_tokens} audio tokens, {dtype_name(dtype)}"
        measured = watch.measure(name, partial(_run_block, block, video, audio), tokens, "video tokens")
        yield replace(measured, series="block")


def _run_block(block: Block, video: StreamState, audio: StreamState) -> None:
    mx.eval([state.x for state in block(video, audio, 0, (Perturbation(),)) if state is not None])


def block_states(model: Transformer, video: int, audio: int, text: int) -> tuple[StreamState, StreamState]:
    """The streams as they enter the first block, evaluated."""
    inputs = stream_inputs(model, video, audio, text)
    states = model.video.prepare(inputs[0], inputs[1]), model.audio.prepare(inputs[1], inputs[0])
    mx.eval(_arrays(states))
    return states


def stream_inputs(model: Transformer, video: int, audio: int, text: int) -> tuple[StreamInput, StreamInput]:
    """Random tokens at random positions, all at one noise level."""
    random = np.random.default_rng(0)
    positions = [
        random.uniform(0, 1, (1, axes, count, 2)).astype(np.float32) for axes, count in ((3, video), (1, audio))
    ]
    inputs: list[StreamInput] = []
    streams = (model.config.video, model.config.audio)
    for stream, count, rope in zip(streams, (video, audio), model.rope(*positions), strict=True):
        assert stream is not None
        assert rope is not None
        width = stream.caption_channels or stream.context_dim
        inputs.append(
            StreamInput(
                latent=mx.random.normal((1, count, stream.in_channels)).astype(model.dtype),
                sigma=mx.array([0.5]),
                timesteps=mx.array([[0.5]]),
                context=mx.random.normal((1, text, width)).astype(model.dtype),
                rope=rope,
            )
        )
    mx.eval([(given.latent, given.context) for given in inputs])
    return inputs[0], inputs[1]


def _arrays(tree: Any) -> list[mx.array]:
    if isinstance(tree, mx.array):
        return [tree]
    return [array for part in tree for array in _arrays(part)] if isinstance(tree, tuple) else []


def benchmark_vocoder(arguments: argparse.Namespace) -> Iterator[Measurement]:
    """Mel spectrogram to stereo waveform; always float32, as in every pipeline."""
    config = load_config(arguments, VocoderConfig.from_metadata)
    vocoder = build_vocoder(config)
    mx.eval(vocoder.parameters())
    watch = Stopwatch(arguments.repeats, arguments.limit)
    for seconds in arguments.seconds:
        mel = mx.random.normal((1, max(1, round(seconds * MEL_FRAMES_PER_SECOND)), 64, 2))
        mx.eval(mel)
        name = f"vocoder, {seconds:g} s at {config.sample_rate} Hz"
        measured = watch.measure(name, partial(_run_vocoder, vocoder, mel), seconds, "seconds of sound")
        yield replace(measured, series="vocoder")


def _run_vocoder(vocoder: nn.Module, mel: mx.array) -> None:
    mx.eval(vocoder(mel))


# --- what it is measured with and on ---


def load_config(arguments: argparse.Namespace, parse: Callable[[dict[str, Any]], Any]) -> Any:
    """The config of --checkpoint, or that of the published LTX-2.3."""
    if arguments.checkpoint is not None:
        return read_config(SafetensorsFile(arguments.checkpoint), parse)
    return parse(json.loads(PUBLISHED_CONFIGS.read_text(encoding="utf-8"))["2.3"])


def on_cpu() -> bool:
    return mx.default_device() == mx.Device(mx.cpu)


def chosen_dtype(arguments: argparse.Namespace) -> mx.Dtype:
    """As the pipelines choose: bfloat16 on the GPU, float32 on the CPU backend."""
    return DTYPES[arguments.dtype] if arguments.dtype else (mx.float32 if on_cpu() else mx.bfloat16)


def ready(network: Network, dtype: mx.Dtype) -> Network:
    """The network with weights of ``dtype``, made already, so that no measurement makes them."""
    network.set_dtype(dtype)
    mx.eval(network.parameters())
    return network


def dtype_name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def machine() -> dict[str, Any]:
    """What the numbers depend on, measured where that says more than a name."""
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(total_memory() / (1 << 30), 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "mlx": metadata.version("mlx"),
        "mlx_ltx": mlx_ltx.__version__,
        "device": str(mx.device_info().get("device_name", mx.default_device())),
        "backend": "cpu" if on_cpu() else "gpu",
        "blas": fast_blas(),
        "matmul_gflops": {name: round(matmul_rate(DTYPES[name]), 1) for name in ("float32", "bfloat16")},
    }


def processor_name() -> str:
    if platform.system() == "Darwin":
        asked = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        )
        if asked.stdout.strip():
            return asked.stdout.strip()
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def fast_blas() -> str:
    """Which fast BLAS the CPU backend uses: Accelerate on macOS, on Linux one that was preloaded, or none."""
    if platform.system() == "Darwin":
        return "Accelerate"
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return "unknown"
    # NumPy brings an OpenBLAS of its own, whose names are suffixed; MLX does not see it.
    loaded = {line.rsplit("/", 1)[-1] for line in maps.splitlines() if "/" in line and "site-packages" not in line}
    preloaded = os.environ.get("LD_PRELOAD", "")
    fast = sorted(
        name for name in loaded if re.search(r"openblas|blis|mkl", name) and re.search(r"openblas|blis|mkl", preloaded)
    )
    return f"{fast[0]}, preloaded" if fast else NO_BLAS


def matmul_rate(dtype: mx.Dtype) -> float:
    """Billions of multiplications and additions per second in a product of square matrices."""
    a = mx.random.normal((MATMUL_SIZE, MATMUL_SIZE)).astype(dtype)
    mx.eval(a @ a[:, :64])
    started = time.perf_counter()
    mx.eval(a @ a)
    return 2 * MATMUL_SIZE**3 / (time.perf_counter() - started) / 1e9


def print_machine(facts: dict[str, Any]) -> None:
    rates = ", ".join(f"{name} {rate:g}" for name, rate in facts["matmul_gflops"].items())
    print(f"{facts['processor']}, {facts['cores']} cores, {facts['memory_gib']:g} GiB, {facts['system']}")
    print(f"MLX {facts['mlx']} on {facts['device']}, BLAS: {facts['blas']}")
    print(f"matrix products, GFLOP/s: {rates}")
    if facts["blas"] == NO_BLAS:
        print("These runs take many times as long as with a fast BLAS (Debian: libopenblas0-pthread, then")
        print("LD_PRELOAD=libopenblas.so.0 in front of the command).")
    print(flush=True)


def print_table(rows: Iterable[Sequence[str]]) -> None:
    table = [HEADER, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        name, *numbers = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([name, *numbers]).rstrip())


# --- command line ---


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


def positive(kind: Callable[[str], Any], word: str) -> Callable[[str], Any]:
    """A type for argparse: a finite number above zero."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not {word}")
        return value

    return parse


WHOLE, NUMBER = positive(int, "a positive whole number"), positive(float, "a positive number")


def size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 192x128")
    return int(match[1]), int(match[2])


def build_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common = Parser(add_help=False)
    common.add_argument("--repeats", type=WHOLE, default=5, metavar="N", help="runs that count (%(default)s)")
    common.add_argument(
        "--limit",
        type=NUMBER,
        default=15.0,
        metavar="SECONDS",
        help="begin no further run after this long (%(default)g)",
    )
    common.add_argument("--json", type=Path, metavar="FILE", help="also write everything to this file")
    dtype = Parser(add_help=False)
    dtype.add_argument("--dtype", choices=DTYPES, help="of weights and activations (GPU: bfloat16, CPU: float32)")
    shape = Parser(add_help=False)
    shape.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="take the config of this checkpoint, not LTX-2.3's"
    )
    plot = Parser(add_help=False)
    plot.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw time and memory against the sizes")
    commands = parser.add_subparsers(
        dest="command",
        required=True,
        metavar="end-to-end|plan|text|block|step|stream|decode|encode|vocoder|quantize",
    )

    block = commands.add_parser("block", parents=[common, dtype, shape, plot], help="one transformer block")
    block.add_argument("--tokens", type=WHOLE, nargs="+", default=[32, 128], metavar="N", help="video tokens (32 128)")
    block.add_argument("--audio-tokens", type=WHOLE, default=32, metavar="N", help="(%(default)s)")
    block.add_argument("--text-tokens", type=WHOLE, default=128, metavar="N", help="(%(default)s; real prompts: 1024)")
    block.set_defaults(run=benchmark_block)

    vocoder = commands.add_parser("vocoder", parents=[common, shape, plot], help="the vocoder")
    vocoder.add_argument("--seconds", type=NUMBER, nargs="+", default=[0.5], metavar="X", help="of sound (0.5)")
    vocoder.set_defaults(run=benchmark_vocoder)

    import benchmark_jobs  # which imports this module
    import benchmark_quantize
    import benchmark_transformer
    import benchmark_video_vae

    benchmark_jobs.add_commands(commands, [common, dtype], [shape, plot])
    benchmark_quantize.add_command(commands, [common, dtype, shape])
    benchmark_transformer.add_commands(commands, [common, dtype], shape)
    benchmark_video_vae.add_commands(commands, [common, dtype, shape, plot])
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    try:
        if arguments.json is not None:
            check_output(arguments.json, force=True)
        plot = getattr(arguments, "plot", None)
        if plot is not None:
            check_output(plot, force=True)
        facts = machine()
        print_machine(facts)
        results = list(arguments.run(arguments))
        print_table(result.row() for result in results)
        if plot is not None:
            import benchmark_plot

            title = f"{arguments.command} on {facts['processor']}, {facts['cores']} cores, MLX {facts['mlx']}"
            benchmark_plot.draw_plot(results, plot, title)
        if arguments.json is not None:
            settings = {
                name: str(value) if isinstance(value, Path) else value
                for name, value in vars(arguments).items()
                if name not in ("run", "json", "plot")
            }
            report = {"machine": facts, "settings": settings, "results": [result.to_json() for result in results]}
            arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except (UserError, OSError) as error:
        print(f"benchmark: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    import benchmark  # the module that its parts import, not a second copy of it

    sys.exit(benchmark.main())
