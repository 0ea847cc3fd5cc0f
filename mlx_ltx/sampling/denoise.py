"""The denoising loop: a generator of events around the transformer (ltx_pipelines/utils/{denoisers,samplers}.py)."""

from __future__ import annotations

import itertools
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from mlx_ltx.events import Event, Progress, StepDone
from mlx_ltx.models.attention_bias import AttentionBias, GroupBias
from mlx_ltx.models.passes import PassInput, StreamInput, StreamRope
from mlx_ltx.models.step_memory import StepMemory
from mlx_ltx.models.transformer import Transformer, Velocities
from mlx_ltx.sampling.evaluation import EvaluationPolicy
from mlx_ltx.sampling.geometry import AudioGrid, VideoGrid
from mlx_ltx.sampling.guidance import Guidance, GuidanceBySigma, Momentum, Pass
from mlx_ltx.sampling.samplers import Euler, Prediction, Sampler, Step
from mlx_ltx.sampling.state import Latents, LatentState, States
from mlx_ltx.sampling.step_cache import StepCache
from mlx_ltx.sampling.token_tiles import TokenTile, blend


class TextContext(NamedTuple):
    """Text embeddings for both streams, (B, S, dim) each.

    Attributes:
        ends: of a timed text, the second at which each of its parts ends; the parts stand one after another in S, equal
            in length. A token attends to the part that is on at its time.
    """

    video: mx.array
    audio: mx.array
    ends: tuple[float, ...] = ()

    @classmethod
    def timed(cls, parts: Sequence[tuple[TextContext, float]]) -> TextContext:
        """Texts that follow each other, each with its length in seconds."""
        ends = tuple(itertools.accumulate(seconds for _, seconds in parts))
        return cls(
            mx.concatenate([text.video for text, _ in parts], axis=1),
            mx.concatenate([text.audio for text, _ in parts], axis=1),
            ends if len(parts) > 1 else (),
        )

    def bias(self, state: LatentState, dtype: mx.Dtype) -> AttentionBias | None:
        """Which part each token attends to; None if every token attends to the whole text."""
        if not self.ends:
            return None
        middle = state.positions[0, 0].mean(axis=-1)
        on = np.searchsorted(np.array(self.ends[:-1]), middle, side="right")
        parts = np.repeat(np.arange(len(self.ends)), self.video.shape[1] // len(self.ends))
        return GroupBias.own_parts(mx.array(on.astype(np.int32) + 1), mx.array(parts.astype(np.int32) + 1), dtype)


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
    """Predicts clean latents, with guidance; made for one run, whose steps it remembers.

    Args:
        model: the transformer.
        states: tells positions and masks, which do not change during a run; made into tables once.
        positive: text of the prompt.
        guidance: what to steer by.
        negative: text of the negative prompt, needed if guidance uses it.
        policy: when to evaluate.
        tiles: of the picture, to be predicted one after another; None predicts it whole.
        cache: decides which steps reuse an earlier one; None computes all.
    """

    def __init__(
        self,
        model: Transformer,
        states: States,
        positive: TextContext,
        guidance: Guidance | GuidanceBySigma = Guidance(),  # noqa: B008 (frozen)
        negative: TextContext | None = None,
        policy: EvaluationPolicy = EvaluationPolicy(),  # noqa: B008 (frozen)
        tiles: Sequence[TokenTile] | None = None,
        cache: StepCache | None = None,
    ):
        if negative is None and guidance.negative:
            raise ValueError("classifier-free guidance needs the text of a negative prompt")
        self.model, self.guidance, self.policy = model, guidance, policy
        self.positive, self.negative = positive, negative
        self.cache = cache
        self.parts = [Part(tile, self._tables(seen_by(tile, states)), StepMemory()) for tile in tiles or (None,)]
        self.previous = Latents(None, None)
        self.momenta = (Momentum(), Momentum())

    def _tables(self, states: States) -> list[Tables]:
        ropes = self.model.rope(*(None if state is None else state.positions for state in states))
        dtype = self.model.dtype
        return [
            Tables(
                rope,
                None if state is None or state.groups is None else state.groups.bias(dtype),
                None if state is None else self.positive.bias(state, dtype),
            )
            for rope, state in zip(ropes, states, strict=True)
        ]

    def predict(self, states: States, sigma: float, step: int) -> Generator[float, None, Prediction]:
        """Predict x0 of both modalities at one noise level.

        Yields:
            The fraction of the prediction that is done, after every evaluation.

        Returns:
            float32 predictions, (B, T, C).
        """
        guidance = self.guidance.at(sigma)
        params = (guidance.video, guidance.audio)
        skipped = [p.skips(step) for p in params]
        if all(skip or state is None for skip, state in zip(skipped, states, strict=True)):
            return Prediction(self.previous, Latents(None, None))
        kinds = guidance.passes()
        found: list[list[Latents]] = []  # per tile, per pass
        reused, same = False, (tuple(kinds.items()), tuple(skipped))
        for number, part in enumerate(self.parts):
            seen = seen_by(part.tile, states)
            # The same objects for every pass with the same text: so the model knows what passes have in common.
            given = {
                negative: self._inputs(seen, part.tables, sigma, skipped, negative)
                for negative in {self._reads_negative(kind) for kind in kinds}
            }
            passes = [PassInput(*given[self._reads_negative(kind)], (perturbed,)) for kind, perturbed in kinds.items()]
            if self.cache is not None and number == 0:
                reused = self.cache.reuses(self.model, passes[0], part.memory, step, same)
            velocities = yield from self._velocities(passes, part.memory, number, reused)
            if self.cache is not None and not self.cache.begun:
                self.cache.see(self.model, passes[0], part.memory, same)
            found.append(
                [
                    Latents(*map(_to_x0, seen, inputs[:2], predicted))
                    for inputs, predicted in zip(passes, velocities, strict=True)
                ]
            )
        predictions: list[dict[Pass, mx.array]] = [{}, {}]
        for kind, *tiles in zip(kinds, *found, strict=True):
            for each, x0 in zip(predictions, self._blended(tiles, states), strict=True):
                if x0 is not None:
                    each[kind] = x0
        guided = [
            last if skip else (p.combine(found, momentum) if found else None)
            for p, found, momentum, skip, last in zip(
                params, predictions, self.momenta, skipped, self.previous, strict=True
            )
        ]
        self.previous = Latents(*guided)
        return Prediction(self.previous, Latents(*(each.get(Pass.NEGATIVE) for each in predictions)))

    def _velocities(
        self, passes: list[PassInput], memory: StepMemory, part: int, reused: bool
    ) -> Generator[float, None, list[Velocities]]:
        """Of one tile's passes, yielding fractions of the whole prediction."""
        if reused:
            velocities = self.model.reuse(passes, memory)
            mx.eval(velocities)
            yield (part + 1) / len(self.parts)
            return velocities
        units = self.model.evaluations(passes)
        forward = self.model.forward_passes(passes, None if self.cache is None else memory)
        done = 0
        while True:
            try:
                hidden = next(forward)
            except StopIteration as end:
                if self.cache is not None or len(self.parts) > 1:
                    mx.eval(end.value, memory.residuals)
                return end.value
            done += 1
            if self.policy.due(done, units):
                mx.eval(hidden)
                yield (part + done / units) / len(self.parts)

    def _blended(self, tiles: Sequence[Latents], states: States) -> Latents:
        if len(tiles) == 1 and self.parts[0].tile is None:
            return tiles[0]
        videos = [x0.video for x0 in tiles if x0.video is not None]
        audios = [x0.audio for x0 in tiles if x0.audio is not None]
        assert states.video is not None
        video = blend([part.tile for part in self.parts if part.tile is not None], videos, states.video.tokens)
        return Latents(video, mx.mean(mx.stack(audios), axis=0) if audios else None)

    def _reads_negative(self, kind: Pass) -> bool:
        return kind is Pass.NEGATIVE and self.negative is not None

    def _inputs(
        self, states: States, tables: Sequence[Tables], sigma: float, frozen: Sequence[bool], negative: bool
    ) -> tuple[StreamInput | None, StreamInput | None]:
        text = self.negative if negative and self.negative is not None else self.positive
        # A timed text has a bias; the negative one holds all the time.
        tables = [table._replace(context_bias=None) if negative else table for table in tables]
        video, audio = (
            _stream_input(state, sigma, context, table, skip)
            for state, context, table, skip in zip(states, text[:2], tables, frozen, strict=True)
        )
        return video, audio


class Tables(NamedTuple):
    """What a stream is given that stays the same during a run."""

    rope: StreamRope | None
    attention_bias: AttentionBias | None
    context_bias: AttentionBias | None


class Part(NamedTuple):
    """A tile of the picture (None is all of it), what belongs to it, and what its last computed step left."""

    tile: TokenTile | None
    tables: list[Tables]
    memory: StepMemory


def seen_by(tile: TokenTile | None, states: States) -> States:
    """The states as a tile of the picture is predicted with them."""
    return states if tile is None or states.video is None else states._replace(video=tile.of(states.video))


def _stream_input(
    state: LatentState | None, sigma: float, context: mx.array, tables: Tables, frozen: bool
) -> StreamInput | None:
    if state is None or tables.rope is None:
        return None
    values, index = state.levels()
    batch = state.latent.shape[0]
    level = 0.0 if state.frozen else sigma
    return StreamInput(
        latent=state.latent,
        sigma=mx.full((batch,), level),
        timesteps=mx.broadcast_to(mx.array(values * level)[None], (batch, len(values))),
        context=context,
        rope=tables.rope,
        level_of_token=None if index is None else mx.broadcast_to(mx.array(index)[None], (batch, len(index))),
        context_bias=tables.context_bias,
        attention_bias=tables.attention_bias,
        keyframes_mask=None if state.keyframes is None else mx.array(state.keyframes)[None],
        frozen=frozen,
    )


def _to_x0(state: LatentState | None, given: StreamInput | None, velocity: mx.array | None) -> mx.array | None:
    """``x - sigma * v`` in float32 with each token's own noise level."""
    if state is None or given is None or velocity is None:
        return None
    sigma = given.timesteps[..., None]
    if given.level_of_token is not None:
        sigma = mx.take_along_axis(given.timesteps, given.level_of_token, axis=1)[..., None]
    return state.latent - sigma * velocity.astype(mx.float32)


class Predictor(Protocol):
    """What the loop asks for predictions: a :class:`Denoiser`."""

    def predict(self, states: States, sigma: float, step: int) -> Generator[float, None, Prediction]: ...


class _Asking:
    """What a sampler asks during one step, with progress over all that it will ask."""

    def __init__(self, denoiser: Predictor, phase: str, step: Step, total: int, evaluations: int):
        self.denoiser, self.phase = denoiser, phase
        self.step, self.total, self.evaluations = step, total, evaluations
        self.asked = 0
        self.x0 = Latents(None, None)

    def __call__(self, states: States, sigma: float, index: int) -> Generator[Event, None, Prediction]:
        prediction = self.denoiser.predict(states, sigma, index)
        while True:
            try:
                fraction = next(prediction)
            except StopIteration as end:
                x0, negative = end.value
                break
            done = self.step.index + (self.asked + fraction) / self.evaluations
            yield Progress(self.phase, done, self.total)
        self.asked += 1
        self.x0 = Latents(*(_keep_given(state, predicted) for state, predicted in zip(states, x0, strict=True)))
        return Prediction(self.x0, negative)


def denoise(
    denoiser: Predictor,
    states: States,
    sigmas: Sequence[float],
    grids: Grids,
    phase: str,
    sampler: Sampler | None = None,
    cache: StepCache | None = None,
) -> Generator[Event, None, States]:
    """Move both modalities through the schedule.

    Args:
        denoiser: made for these states.
        states: noised to the first sigma.
        sigmas: falling noise levels; the last is normally 0.
        grids: for the predictions in events.
        phase: name of the phase in events.
        sampler: how a step is made, new for this run; :class:`Euler` if None.
        cache: the denoiser's, for events to tell which steps were reused.

    Yields:
        :class:`Progress` at evaluations and :class:`StepDone` after every step.

    Returns:
        The states at the last sigma.
    """
    sampler = Euler() if sampler is None else sampler
    total = len(sigmas) - 1
    for index, (sigma, next_sigma) in enumerate(itertools.pairwise(float(s) for s in sigmas)):
        started, reused = time.perf_counter(), cache.reused if cache else 0
        step = Step(index, sigma, next_sigma)
        asking = _Asking(denoiser, phase, step, total, sampler.evaluations(step))
        states = yield from sampler.step(states, step, asking)
        mx.eval([state.latent for state in states if state is not None])
        latents = grids.unpatchify(asking.x0)
        yield StepDone(
            phase,
            index + 1,
            total,
            next_sigma,
            time.perf_counter() - started,
            latents.video,
            latents.audio,
            reused=cache is not None and cache.reused > reused,
        )
    return states


def _keep_given(state: LatentState | None, predicted: mx.array | None) -> mx.array | None:
    return None if state is None or predicted is None else state.keep_given(predicted)
