"""Shows a job's events: bars on a terminal, plain lines elsewhere, JSON lines for host apps, or nothing."""

from __future__ import annotations

import json
import sys
from typing import Any, Protocol, TextIO

from tqdm import tqdm

from mlx_ltx.events import (
    DataSetFinished,
    Event,
    FileWritten,
    Finished,
    MemorySeen,
    Phase,
    PhaseStarted,
    Progress,
    PromptEnhanced,
    StepDone,
    TextStreamed,
    TrainingFinished,
    TrainingStep,
    Warned,
)


class Display(Protocol):
    """Consumes events, then is closed, whether the job ended well or not."""

    def show(self, event: Event) -> None: ...

    def close(self) -> None: ...


class Text:
    """Shows streamed text as it comes, and ends its line before anything else is shown."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self._open = False

    def show(self, text: str) -> None:
        print(text, end="", file=self.stream, flush=True)
        self._open = not text.endswith("\n")

    def end(self) -> None:
        if self._open:
            print(file=self.stream, flush=True)
            self._open = False


class Quiet:
    """Shows warnings only; streamed text too if it is given a place for that."""

    def __init__(self, text: TextIO | None = None):
        self._text = Text(text) if text is not None else None

    def show(self, event: Event) -> None:
        if isinstance(event, TextStreamed):
            if self._text is not None:
                self._text.show(event.text)
        elif isinstance(event, PromptEnhanced):
            self.close()
        elif isinstance(event, Warned):
            self.close()
            print(f"mlx_ltx: {event.message}", file=sys.stderr)

    def close(self) -> None:
        if self._text is not None:
            self._text.end()


class JsonLines:
    """One JSON object per event on ``stream``, flushed at once."""

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stdout

    def show(self, event: Event) -> None:
        self.write(event.to_json())

    def write(self, data: dict[str, Any]) -> None:
        print(json.dumps(data, ensure_ascii=False), file=self._stream, flush=True)

    def close(self) -> None:
        pass


class Lines:
    """A line per phase and per denoising step, for logs and pipes; streamed text as it comes, to ``text`` if given."""

    def __init__(self, stream: TextIO | None = None, text: TextIO | None = None):
        self._stream = stream or sys.stderr
        self._text = Text(text or self._stream)

    def show(self, event: Event) -> None:
        if isinstance(event, TextStreamed):
            self._text.show(event.text)
        elif isinstance(event, PromptEnhanced):
            self._text.end()
        elif isinstance(event, PhaseStarted):
            self._print(event.phase.title)
        elif isinstance(event, StepDone):
            reused = ", left out" if event.reused else ""
            self._print(f"  step {event.step} of {event.total}: {event.seconds:.1f} s{reused}")
        elif isinstance(event, Warned):
            self._print(f"mlx_ltx: {event.message}")
        elif isinstance(event, FileWritten):
            self._print(f"wrote {event.path} ({event.kind})")
        elif isinstance(event, TrainingStep):
            # A line for each hundredth of a training: it may have many thousands of steps.
            if event.step % max(event.total // 100, 1) == 0 or event.step == event.total:
                self._print(f"  step {event.step} of {event.total}: {training_speed(event)}")
        elif isinstance(event, Finished | TrainingFinished | DataSetFinished):
            self._print(summary(event))

    def close(self) -> None:
        self._text.end()

    def _print(self, text: str) -> None:
        self._text.end()
        print(text, file=self._stream, flush=True)


class Bars:
    """A progress bar per phase, for terminals; streamed text takes the place of the bar, on ``text`` if given."""

    FORMAT = "{desc:<42.42} {percentage:3.0f}%|{bar}| {n:.0f}/{total_fmt} [{elapsed}<{remaining}]"
    UNKNOWN = "{desc:<42.42} [{elapsed}]"

    def __init__(self, text: TextIO | None = None) -> None:
        self._bar: tqdm[Any] | None = None
        self._text = Text(text or sys.stderr)

    def show(self, event: Event) -> None:
        if isinstance(event, TextStreamed):
            self._end_bar()
            self._text.show(event.text)
        elif isinstance(event, PromptEnhanced):
            self._text.end()
        elif isinstance(event, PhaseStarted):
            self._start(event.phase)
        elif isinstance(event, Progress) and self._bar is not None:
            if event.total is not None and self._bar.total != event.total:
                self._bar.total, self._bar.bar_format = event.total, self.FORMAT
            self._bar.update(event.done - self._bar.n)
        elif isinstance(event, StepDone) and self._bar is not None:
            self._bar.update(event.step - self._bar.n)
        elif isinstance(event, MemorySeen):
            self.close()
        elif isinstance(event, Warned):
            self._write(f"mlx_ltx: {event.message}")
        elif isinstance(event, FileWritten):
            self._write(f"wrote {event.path} ({event.kind})")
        elif isinstance(event, TrainingStep) and self._bar is not None:
            self._bar.set_description_str(training_speed(event), refresh=False)
            self._bar.update(event.step - self._bar.n)
        elif isinstance(event, Finished | TrainingFinished | DataSetFinished):
            self._write(summary(event))

    def _start(self, phase: Phase) -> None:
        self.close()
        form = self.UNKNOWN if phase.total is None else self.FORMAT
        self._bar = tqdm(total=phase.total, desc=phase.title, bar_format=form, dynamic_ncols=True, file=sys.stderr)

    def _write(self, line: str) -> None:
        self._text.end()
        tqdm.write(line, file=sys.stderr)

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def close(self) -> None:
        self._end_bar()
        self._text.end()


def training_speed(event: TrainingStep) -> str:
    """A training step in some words."""
    return f"loss {event.loss:.4f}, {event.seconds:.2f} s, {event.peak_bytes / 1e9:.2f} GB"


def summary(event: Finished | TrainingFinished | DataSetFinished) -> str:
    """What was made, in one line."""
    if isinstance(event, TrainingFinished):
        return (
            f"{event.weights_path}: {event.step} steps, loss {event.loss:.4f}: {event.seconds:.1f} s, "
            f"MLX peak {event.peak_bytes / 1e9:.2f} GB"
        )
    if isinstance(event, DataSetFinished):
        skipped = f", {event.skipped} files skipped" if event.skipped else ""
        return f"{event.folder}: {event.samples} samples{skipped}: {event.seconds:.1f} s"
    what = f"{len(event.clips)} clips of " if len(event.clips) > 1 else ""
    picture = f"{event.width}x{event.height}, {event.frames} frames at {event.fps:g} fps ({event.duration:.2f} s)"
    if all(path is None for clip in event.clips for path in (clip.video_path, clip.exr_path, clip.hdr_path)):
        picture = f"{event.duration:.2f} s"  # sound alone
    sound = f", {event.sample_rate / 1000:g} kHz stereo" if event.sample_rate else ", silent"
    seeds = ", ".join(map(str, dict.fromkeys(clip.seed for clip in event.clips)))
    reused = f", {event.reused_steps} of {event.steps} steps left out by the step cache" if event.steps else ""
    took = f"{event.seconds:.1f} s, MLX peak {event.peak_bytes / 1e9:.2f} GB"
    return f"{what}{picture}{sound}, seed {seeds}: {took}{reused}"


def choose(quiet: bool, as_json: bool, text: TextIO | None = None) -> Display:
    """The display that suits the flags and the terminal.

    ``text`` is where streamed text goes, even with ``quiet``, when it is what was asked for; JSON holds it anyway.
    """
    if as_json:
        return JsonLines()
    if quiet:
        return Quiet(text)
    return Bars(text) if sys.stderr.isatty() else Lines(text=text)
