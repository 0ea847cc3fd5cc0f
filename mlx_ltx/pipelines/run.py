"""A running job: where its events, its noise and its memory come together."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TypeVar

import mlx.core as mx

from mlx_ltx.events import Clip, Event, Finished, MemorySeen, Phase, PhaseStarted, Planned, Warned
from mlx_ltx.pipelines.job import Job
from mlx_ltx.request import Request
from mlx_ltx.sampling.noise import Noise

T = TypeVar("T")


@dataclass(frozen=True)
class Shot:
    """One clip of a job while it is made.

    Attributes:
        request: what was asked for, of this clip alone.
        noise: its one stream of random numbers, drawn from in the order of the recipe.
    """

    request: Request
    noise: Noise


def per_shot(job: Job, phases: list[Phase]) -> list[Phase]:
    """Phases that every clip of the job goes through, numbered if there are several."""
    count = len(job.shots)
    if count == 1:
        return phases
    return [
        Phase(phase.name, f"{number}/{count} {phase.title}", phase.total, phase.unit)
        for number in range(1, count + 1)
        for phase in phases
    ]


class Run:
    """What the parts of one running job share.

    Attributes:
        job: what is being made.
        shots: its clips.
        steps, reused_steps: with a step cache, of all its denoising so far.
    """

    def __init__(self, job: Job):
        self.job = job
        self.shots = [Shot(request, Noise(request.seed)) for request in job.shots]
        self._phases = job.phases()
        self._index = -1
        self._started = time.perf_counter()
        self._peak = 0
        self.steps = self.reused_steps = 0

    def begin(self) -> Iterator[Event]:
        """The first events: the plan, and what the user should know."""
        yield Planned(tuple(self._phases))
        for warning in self.job.loras.warnings:
            yield Warned(warning)

    def phase(self, name: str, work: Generator[Event, None, T]) -> Generator[Event, None, T]:
        """Do one planned phase: its start, its work's events, and the memory that it took.

        What the work held on to is free again before the next phase begins.
        """
        self._index += 1
        phase = self._phases[self._index]
        if phase.name != name:
            raise ValueError(f"phase {name} begins where {phase.name} was planned")
        yield PhaseStarted(self._index, phase)
        mx.reset_peak_memory()
        result = yield from work
        del work
        peak = mx.get_peak_memory()
        self._peak = max(self._peak, peak)
        mx.clear_cache()
        yield MemorySeen(name, mx.get_active_memory(), peak)
        return result

    def finish(self) -> Finished:
        """The last event."""
        if self._index != len(self._phases) - 1:
            raise ValueError(f"the job ends before its phase {self._phases[self._index + 1].name}")
        job, clip = self.job, self.job.clip
        return Finished(
            clips=tuple(
                Clip(
                    prompt=shot.prompt,
                    seed=shot.seed,
                    video_path=shot.output,
                    audio_path=shot.output_audio,
                    exr_path=shot.output_exr,
                    hdr_path=shot.output_hdr,
                )
                for shot in job.shots
            ),
            contact_sheet_path=job.request.contact_sheet,
            width=clip.width,
            height=clip.height,
            frames=clip.frames,
            fps=clip.fps,
            duration=clip.duration,
            sample_rate=job.model.vocoder.sample_rate if job.sound else None,
            seconds=time.perf_counter() - self._started,
            peak_bytes=self._peak,
            reused_steps=self.reused_steps,
            steps=self.steps,
        )
