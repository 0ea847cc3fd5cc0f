"""The denoising loop: a generator of events around the transformer (ltx_pipelines/utils/{denoisers,samplers}.py)."""

from __future__ import annotations

import itertools
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import mlx.core as mx

from mlx_ltx.events import Event, Progress, StepDone
from mlx_ltx.models.transformer import StreamInput, StreamRope, Transformer
from mlx_ltx.sampling.geometry import AudioGrid, VideoGrid
from mlx_ltx.sampling.guidance import Guidance, Pass
from mlx_ltx.sampling.state import LatentState

# The macOS watchdog kills command buffers that keep the GPU busy for seconds; a block of the full model is far below.
BLOCKS_PER_EVALUATION = 1


class TextContext(NamedTuple):
    """Text embeddings for both streams, (B, S, dim) each."""

    video: mx.array
    audio: mx.array


class Latents(NamedTuple):
    """One array per modality; None for a modality that is not there."""

    video: mx.array | None
    audio: mx.array | None


class States(NamedTuple):
    """One state per modality; None for a modality that is not there."""

    video: LatentState | None
    audio: LatentState | None


@dataclass(frozen=True)
class Grids:
    """What turns tokens back into latents."""

    video: VideoGrid | None
    audio: AudioGrid | None

    def unpatchify(self, tokens: Latents) -> Latents:
        return Latents(
            self.video.unpatchify(tokens.video) if self.video and tokens.video is not None else None,
            self.audio.unpatchify(tokens.audio) if self.audio and tokens.audio is not None else None,
        )


class Denoiser:
    """Predicts clean latents, with guidance.

    Args:
        model: the transformer.
        states: tells positions and masks, which do not change during a run; made into tables once.
        positive: text of the prompt.
        guidance: what to steer by.
        negative: text of the negative prompt, needed if guidance uses it.
    """

    def __init__(
        self,
        model: Transformer,
        states: States,
        positive: TextContext,
        guidance: Guidance = Guidance(),  # noqa: B008 (frozen)
        negative: TextContext | None = None,
    ):
        if negative is None and Pass.NEGATIVE in guidance.passes():
            raise ValueError("classifier-free guidance needs the text of a negative prompt")
        self.model, self.guidance = model, guidance
        self.positive, self.negative = positive, negative
        video, audio = states
        self.ropes = model.rope(video.positions if video else None, audio.positions if audio else None)
        self.previous = Latents(None, None)

    @property
    def units(self) -> int:
        """Evaluations per step, for progress."""
        return len(self.guidance.passes()) * self.model.config.layers

    def predict(self, states: States, sigma: float, step: int) -> Generator[float, None, Latents]:
        """Predict x0 of both modalities at one noise level.

        Yields:
            The fraction of the step that is done, after every evaluation.

        Returns:
            float32 predictions, (B, T, C).
        """
        params = (self.guidance.video, self.guidance.audio)
        skipped = [p.skips(step) for p in params]
        if all(skip or state is None for skip, state in zip(skipped, states, strict=True)):
            return self.previous
        predictions: list[dict[Pass, mx.array]] = [{}, {}]
        done = 0
        for kind, perturbation in self.guidance.passes().items():
            text = self.negative if kind is Pass.NEGATIVE and self.negative is not None else self.positive
            inputs = [
                _stream_input(state, sigma, context, rope, frozen)
                for state, context, rope, frozen in zip(states, text, self.ropes, skipped, strict=True)
            ]
            forward = self.model.forward(inputs[0], inputs[1], [perturbation])
            while True:
                try:
                    hidden = next(forward)
                except StopIteration as end:
                    velocities = end.value
                    break
                done += 1
                if done % BLOCKS_PER_EVALUATION == 0:
                    mx.eval(hidden)
                    yield done / self.units
            for found, state, given, velocity in zip(predictions, states, inputs, velocities, strict=True):
                if state is not None and given is not None:
                    found[kind] = _to_x0(state, given, velocity)
        guided = [
            last if skip else (p.combine(found) if found else None)
            for p, found, skip, last in zip(params, predictions, skipped, self.previous, strict=True)
        ]
        self.previous = Latents(*guided)
        return self.previous


def _stream_input(
    state: LatentState | None, sigma: float, context: mx.array, rope: StreamRope | None, frozen: bool
) -> StreamInput | None:
    if state is None or rope is None:
        return None
    values, index = state.levels()
    batch = state.latent.shape[0]
    level = 0.0 if state.frozen else sigma
    return StreamInput(
        latent=state.latent,
        sigma=mx.full((batch,), level),
        timesteps=mx.broadcast_to(mx.array(values * level)[None], (batch, len(values))),
        context=context,
        rope=rope,
        level_of_token=None if index is None else mx.broadcast_to(mx.array(index)[None], (batch, len(index))),
        keyframes_mask=None if state.keyframes is None else mx.array(state.keyframes)[None],
        frozen=frozen,
    )


def _to_x0(state: LatentState, given: StreamInput, velocity: mx.array) -> mx.array:
    """``x - sigma * v`` in float32 with each token's own noise level."""
    sigma = given.timesteps[..., None]
    if given.level_of_token is not None:
        sigma = mx.take_along_axis(given.timesteps, given.level_of_token, axis=1)[..., None]
    return state.latent - sigma * velocity.astype(mx.float32)


def euler_step(latent: mx.array, x0: mx.array, sigma: float, next_sigma: float) -> mx.array:
    """From one noise level to the next along the straight line through ``x0``, float32."""
    velocity = (latent - x0) / sigma
    return latent + velocity * (next_sigma - sigma)


def denoise(
    denoiser: Denoiser, states: States, sigmas: Sequence[float], grids: Grids, phase: str
) -> Generator[Event, None, States]:
    """Move both modalities through the schedule with Euler steps.

    Args:
        denoiser: made for these states.
        states: noised to the first sigma.
        sigmas: falling noise levels; the last is normally 0.
        grids: for the predictions in events.
        phase: name of the phase in events.

    Yields:
        :class:`Progress` at evaluations and :class:`StepDone` after every step.

    Returns:
        The states at the last sigma.
    """
    total = len(sigmas) - 1
    for step, (sigma, next_sigma) in enumerate(itertools.pairwise(float(s) for s in sigmas)):
        started = time.perf_counter()
        prediction = denoiser.predict(states, sigma, step)
        while True:
            try:
                fraction = next(prediction)
            except StopIteration as end:
                x0 = end.value
                break
            yield Progress(phase, step + fraction, total)
        x0 = Latents(*(_keep_given(state, predicted) for state, predicted in zip(states, x0, strict=True)))
        states = States(*(_advance(s, p, sigma, next_sigma) for s, p in zip(states, x0, strict=True)))
        mx.eval([state.latent for state in states if state is not None])
        latents = grids.unpatchify(x0)
        yield StepDone(phase, step + 1, total, next_sigma, time.perf_counter() - started, latents.video, latents.audio)
    return states


def _keep_given(state: LatentState | None, predicted: mx.array | None) -> mx.array | None:
    return None if state is None or predicted is None else state.keep_given(predicted)


def _advance(state: LatentState | None, x0: mx.array | None, sigma: float, next_sigma: float) -> LatentState | None:
    """One step of a modality; one that is absent or was not predicted stays as it is."""
    if state is None or x0 is None:
        return state
    return replace(state, latent=euler_step(state.latent, x0, sigma, next_sigma))
