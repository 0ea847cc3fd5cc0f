"""A running job: where its events, its noise and its memory come together."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import TypeVar

import mlx.core as mx

from mlx_ltx.events import Event, Finished, MemorySeen, PhaseStarted, Planned
from mlx_ltx.pipelines.job import Job
from mlx_ltx.sampling.noise import Noise

T = TypeVar("T")


class Run:
    """What the parts of one running job share.

    Attributes:
        job: what is being made.
        noise: the one stream of random numbers, drawn from in the order of the recipe.
    """

    def __init__(self, job: Job):
        self.job = job
        self.noise = Noise(job.request.seed)
        self._phases = job.phases()
        self._index = -1
        self._started = time.perf_counter()
        self._peak = 0

    def plan(self) -> Event:
        """The first event."""
        return Planned(tuple(self._phases))

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
        request, clip = self.job.request, self.job.clip
        return Finished(
            video_path=request.output,
            audio_path=request.output_audio,
            contact_sheet_path=request.contact_sheet,
            seed=request.seed,
            width=clip.width,
            height=clip.height,
            frames=clip.frames,
            fps=clip.fps,
            duration=clip.duration,
            sample_rate=self.job.vocoder.sample_rate if request.audio else None,
            seconds=time.perf_counter() - self._started,
            peak_bytes=self._peak,
        )
