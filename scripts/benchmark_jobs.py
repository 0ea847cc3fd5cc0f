"""``benchmark.py end-to-end``, ``plan`` and ``text``: whole jobs, what was predicted of them, and reading prompts."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

import mlx_ltx
from benchmark import MIB, WHOLE, Measurement, Stopwatch, chosen_dtype, dtype_name, load_config, ready, size
from mlx_ltx.checkpoints.gemma import read_gemma_config
from mlx_ltx.events import MemorySeen, PhaseStarted
from mlx_ltx.models.connectors import Connector, TextConnectors
from mlx_ltx.models.gemma import FULL, SLIDING, Gemma, GemmaConfig, RopeSpec, all_hidden_states
from mlx_ltx.models.text_features import FeatureConfig, FeatureExtractor
from mlx_ltx.pipelines.job import prepare
from mlx_ltx.pipelines.predict import make_plan

WHOLE_CLIP = "the whole clip"
PREDICTED, RATIO = "MiB predicted", "of what was measured"
CONNECTED = 1024  # tokens and registers together
# The text model of the published checkpoints, but for its vocabulary, which costs memory and no time.
GEMMA_3_12B = GemmaConfig(
    hidden_size=3840,
    num_hidden_layers=48,
    intermediate_size=15360,
    layer_types=tuple(FULL if (layer + 1) % 6 == 0 else SLIDING for layer in range(48)),
    num_attention_heads=16,
    num_key_value_heads=8,
    vocab_size=1024,
    sliding_window=1024,
    full_rope=RopeSpec(1_000_000.0, 8.0),
)


def add_commands(commands: Any, parents: list[argparse.ArgumentParser], shapes: list[argparse.ArgumentParser]) -> None:
    """Register the sub-commands; ``shapes`` are those of commands that measure networks."""
    whole = commands.add_parser("end-to-end", aliases=["demo"], parents=parents, help="a clip, phase by phase")
    _add_clip(whole)
    whole.set_defaults(run=benchmark_whole)

    plan = commands.add_parser("plan", parents=parents, help="predicted and measured memory of a clip's phases")
    _add_clip(plan)
    plan.set_defaults(run=benchmark_plan)

    text = commands.add_parser("text", parents=[*parents, *shapes], help="the text model and what follows it")
    text.add_argument("--tokens", type=WHOLE, nargs="+", default=[32, 128], metavar="N", help="of a prompt (32 128)")
    text.add_argument("--layers", type=WHOLE, default=2, metavar="N", help="of the text model (%(default)s; it has 48)")
    text.add_argument("--gemma", type=Path, metavar="FOLDER", help="take this text model's sizes, not Gemma 3 12B's")
    text.set_defaults(run=benchmark_text)


def _add_clip(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", default="demo", metavar="NAME|PATH", help="another model (%(default)s)")
    command.add_argument("--pipeline", metavar="NAME", help="by default the model's own")
    command.add_argument("--prompt", default="a red ball rolls over green grass", metavar="TEXT")
    command.add_argument("--size", type=size, metavar="WxH", help="by default the model's own")
    command.add_argument("--frames", type=WHOLE, metavar="N", help="by default the model's own")


class PhaseSeen(NamedTuple):
    """What the event stream of one run says about a phase."""

    seconds: float
    peak: int


def benchmark_whole(arguments: argparse.Namespace) -> Iterator[Measurement]:
    """A whole clip, from the events that every user of the package sees."""
    clips: list[dict[str, PhaseSeen]] = []
    while len(clips) <= arguments.repeats and sum(clip[WHOLE_CLIP].seconds for clip in clips) < arguments.limit:
        with tempfile.TemporaryDirectory() as folder:
            clips.append(_one_clip(_request(arguments, Path(folder))))
    counted = clips[1:] or clips  # without the warm-up
    for title in clips[0]:
        seen = [clip[title] for clip in counted]
        yield Measurement(title, tuple(phase.seconds for phase in seen), max(phase.peak for phase in seen))


def _request(arguments: argparse.Namespace, folder: Path) -> mlx_ltx.Request:
    width, height = arguments.size or (None, None)
    return mlx_ltx.Request(
        prompt=arguments.prompt,
        model=arguments.model,
        pipeline=arguments.pipeline,
        output=folder / "clip.mp4",
        width=width,
        height=height,
        num_frames=arguments.frames,
        cache=False,
        dtype=arguments.dtype or "auto",
    )


def _one_clip(request: mlx_ltx.Request) -> dict[str, PhaseSeen]:
    """Time and peak of every phase of one run by its title, and of all of it."""
    phases: dict[str, PhaseSeen] = {}
    first = begun = time.perf_counter()
    title = ""
    for event in mlx_ltx.stream(request):
        if isinstance(event, PhaseStarted):
            begun, title = time.perf_counter(), event.phase.title
        elif isinstance(event, MemorySeen):
            phases[title] = PhaseSeen(time.perf_counter() - begun, event.peak_bytes)
    peak = max((seen.peak for seen in phases.values()), default=0)
    return {**phases, WHOLE_CLIP: PhaseSeen(time.perf_counter() - first, peak)}


def benchmark_plan(arguments: argparse.Namespace) -> Iterator[Measurement]:
    """How long planning takes, and every phase's peak beside the plan's."""
    with tempfile.TemporaryDirectory() as folder:
        job = prepare(_request(arguments, Path(folder)))
        watch = Stopwatch(arguments.repeats, arguments.limit)
        yield watch.measure("making the plan", lambda: make_plan(job))
        plan = {phase.title: phase.peak_bytes for phase in make_plan(job).phases}
        seen = _one_clip(job.request)
    for title, predicted in plan.items():
        figures = {PREDICTED: predicted / MIB, RATIO: predicted / seen[title].peak}
        yield Measurement(title, (seen[title].seconds,), seen[title].peak, figures=figures)


def benchmark_text(arguments: argparse.Namespace) -> Iterator[Measurement]:
    """The parts of a prompt's way one by one, since at real sizes they are not in memory together either."""
    gemma = read_gemma_config(arguments.gemma)[0] if arguments.gemma else GEMMA_3_12B
    layers = min(arguments.layers, gemma.num_hidden_layers)
    dtype = chosen_dtype(arguments)
    watch = Stopwatch(arguments.repeats, arguments.limit)
    yield from _measure_layers(watch, gemma, layers, arguments.tokens, dtype)
    mx.clear_cache()
    config = load_config(
        arguments, lambda values: FeatureConfig.from_metadata(values, gemma.hidden_size, gemma.hidden_states)
    )
    yield from _measure_features(watch, config, arguments.tokens, dtype)
    mx.clear_cache()
    connectors = load_config(arguments, TextConnectors.from_metadata)
    for name, connector in (("video", connectors.video), ("audio", connectors.audio)):
        one = ready(Connector(replace(connector.config, layers=1)), dtype)
        x = mx.random.normal((1, CONNECTED, connector.config.dim)).astype(dtype)
        mask = mx.ones((1, CONNECTED))
        mx.eval(x, mask)
        of = f"a block of {connector.config.layers} of the {name} connector"
        yield watch.measure(f"{of}, {CONNECTED} tokens, {dtype_name(dtype)}", _evaluating(one, x, mask), 1, "blocks")


def _measure_layers(
    watch: Stopwatch, gemma: GemmaConfig, layers: int, tokens: list[int], dtype: mx.Dtype
) -> Iterator[Measurement]:
    few = replace(gemma, num_hidden_layers=layers, layer_types=gemma.layer_types[-layers:])
    model = ready(Gemma(few), dtype)

    def read(ids: mx.array, mask: mx.array) -> list[mx.array]:
        return list(all_hidden_states(model, ids, mask))

    def draw(count: int) -> mx.array:
        return mx.random.randint(0, few.vocab_size, (1, count))

    yield from _by_tokens(
        watch, f"{layers} of {gemma.num_hidden_layers} layers of the text model", read, draw, tokens, dtype
    )


def _measure_features(
    watch: Stopwatch, config: FeatureConfig, tokens: list[int], dtype: mx.Dtype
) -> Iterator[Measurement]:
    features = ready(FeatureExtractor(config), dtype)

    def draw(count: int) -> list[mx.array]:
        shape = (1, count, config.hidden_size)
        return [mx.random.normal(shape).astype(dtype) for _ in range(config.hidden_states)]

    yield from _by_tokens(watch, f"features of {config.hidden_states} hidden states", features, draw, tokens, dtype)


def _by_tokens(
    watch: Stopwatch,
    series: str,
    function: Callable[..., Any],
    draw: Callable[[int], Any],
    tokens: list[int],
    dtype: mx.Dtype,
) -> Iterator[Measurement]:
    """A function of tokens, which ``draw`` makes, and of their mask, for several numbers of them."""
    for count in tokens:
        given, mask = draw(count), mx.ones((1, count), mx.int32)
        mx.eval(given, mask)
        name = f"{series}, {count} tokens, {dtype_name(dtype)}"
        yield replace(watch.measure(name, _evaluating(function, given, mask), count, "tokens"), series=series)


def _evaluating(function: Callable[..., Any], *given: Any) -> Callable[[], None]:
    return lambda: mx.eval(function(*given))
