"""The typed events of a running job: one stream for progress bars, previews, host apps and tests.

A job is an iterator of these. Cancelling is not asking for the next one. Everything here is plain data; only
:class:`StepDone` holds lazy arrays, which cost nothing unless somebody evaluates them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx


@dataclass(frozen=True)
class Phase:
    """A planned part of a job.

    Attributes:
        name: short and stable, for host apps ("denoise").
        title: for people ("Denoising 384x256, 8 steps").
        total: how many units of work it has (steps, frames, layers), or None if that is not known.
        unit: what is counted.
    """

    name: str
    title: str
    total: int | None = None
    unit: str = "steps"


@dataclass(frozen=True)
class Event:
    """Base of all events."""

    def to_json(self) -> dict[str, Any]:
        """Plain data with the event's name first, for JSON lines."""
        return {"event": type(self).__name__, **_plain(asdict(self))}


@dataclass(frozen=True)
class Planned(Event):
    """The first event: all phases, in order."""

    phases: tuple[Phase, ...]


@dataclass(frozen=True)
class PhaseStarted(Event):
    """A phase begins; ``index`` counts from 0 in the planned list."""

    index: int
    phase: Phase


@dataclass(frozen=True)
class Progress(Event):
    """``done`` of ``total`` units of the current phase; within a denoising step it is fractional."""

    phase: str
    done: float
    total: float | None


@dataclass(frozen=True)
class Warned(Event):
    """Something that the user should know and that does not stop the job."""

    message: str


@dataclass(frozen=True)
class TextStreamed(Event):
    """The next piece of a prompt that is being written; all pieces up to :class:`PromptEnhanced` joined are it."""

    phase: str
    text: str


@dataclass(frozen=True)
class PromptEnhanced(Event):
    """The text model has rewritten the prompt ``original``; the clip is made from ``prompt``."""

    prompt: str
    original: str


@dataclass(frozen=True)
class StepDone(Event):
    """A denoising step is done.

    Attributes:
        step, total: the step, counted from 1, and how many there are.
        sigma: the noise level after it.
        seconds: how long it took.
        video_x0, audio_x0: the current predictions of the clean latents, (B, F, H, W, C) and (B, T, M, C), lazy;
            None for a modality that is not generated.
        reused: the transformer was left out: the step cache took what it did in an earlier step.
    """

    phase: str
    step: int
    total: int
    sigma: float
    seconds: float
    video_x0: mx.array | None = field(default=None, repr=False, compare=False)
    audio_x0: mx.array | None = field(default=None, repr=False, compare=False)
    reused: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "event": "StepDone",
            "phase": self.phase,
            "step": self.step,
            "total": self.total,
            "sigma": self.sigma,
            "seconds": self.seconds,
            "reused": self.reused,
        }


@dataclass(frozen=True)
class TrainingStep(Event):
    """A training step is done.

    Attributes:
        step, total: the step, counted from 1, and how many there are.
        losses: of each stream ("video", "audio") or part, the mean over the step's batches.
        learning_rate: that was used.
        gradient_norm: before clipping.
        seconds: how long it took.
        samples: how many samples it saw.
        peak_bytes: the most memory that MLX had in use during it.
    """

    step: int
    total: int
    losses: dict[str, float]
    learning_rate: float
    gradient_norm: float
    seconds: float
    samples: int
    peak_bytes: int

    @property
    def loss(self) -> float:
        """What is minimised: the sum of the parts."""
        return sum(self.losses.values())


@dataclass(frozen=True)
class DataSetFinished(Event):
    """The last event of preparing a data set.

    Attributes:
        folder: where it lies.
        samples: how many it has, those from before included.
        skipped: files that could not be used.
        seconds: from the first event to this one.
    """

    folder: Path
    samples: int
    skipped: int
    seconds: float


@dataclass(frozen=True)
class TrainingFinished(Event):
    """The last event of a training that succeeded.

    Attributes:
        weights_path: the LoRA or model that was trained.
        step: how many steps it has had in all.
        loss: the mean over the last tenth of the steps.
        seconds: from the first event to this one.
        peak_bytes: the most memory that MLX had in use.
    """

    weights_path: Path
    step: int
    loss: float
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class MemorySeen(Event):
    """MLX's memory at the end of a phase, in bytes: what is in use, and the most that was since the phase began."""

    phase: str
    active_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class FileWritten(Event):
    """A file is complete under its final name."""

    path: Path
    kind: str


@dataclass(frozen=True)
class Clip:
    """One finished clip; a path is None for what was not asked for."""

    prompt: str
    seed: int
    video_path: Path | None = None
    audio_path: Path | None = None
    exr_path: Path | None = None
    hdr_path: Path | None = None


@dataclass(frozen=True)
class Finished(Event):
    """The last event of a job that succeeded.

    Attributes:
        clips: what was made, in order.
        contact_sheet_path: a picture of all of it, if asked for.
        width, height, frames, fps, duration, sample_rate: of each clip; ``sample_rate`` is None without sound.
        seconds: from the first event to this one.
        peak_bytes: the most memory that MLX had in use.
        reused_steps, steps: how many denoising steps the step cache left out, of how many; 0 without it.
    """

    clips: tuple[Clip, ...]
    contact_sheet_path: Path | None
    width: int
    height: int
    frames: int
    fps: float
    duration: float
    sample_rate: int | None
    seconds: float
    peak_bytes: int
    reused_steps: int = 0
    steps: int = 0

    @property
    def video_path(self) -> Path | None:
        """The (first) clip's video file."""
        return self.clips[0].video_path

    @property
    def audio_path(self) -> Path | None:
        """The (first) clip's sound file."""
        return self.clips[0].audio_path

    def to_json(self) -> dict[str, Any]:
        # The first clip's path also stands at the top, for hosts that make one clip at a time.
        return {"event": "Finished", "video_path": _plain(self.video_path), **_plain(asdict(self))}


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
