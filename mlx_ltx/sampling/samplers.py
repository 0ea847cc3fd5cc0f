"""How a step goes from one noise level to the next: Euler and its relatives.

A sampler knows the arithmetic of one step; the loop that drives it, with its events, is
:func:`mlx_ltx.sampling.denoise.denoise`. Arrays are float32, coefficients Python's float64. Video goes before audio
wherever noise is drawn. Source: ltx_core/components/diffusion_steps.py and ltx_pipelines/utils/samplers.py.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import mlx.core as mx

from mlx_ltx.events import Event
from mlx_ltx.sampling.noise import Noise
from mlx_ltx.sampling.state import Latents, LatentState, States

# Added to the clip's seed for noise within a run, so that its first draw is not the run's initial noise again.
SEED_OFFSET = 10_000
SMALLEST_ALPHA = 2.0**-23  # keeps sigma / alpha finite at sigma 1


@dataclass(frozen=True)
class Step:
    """One step of a schedule.

    Attributes:
        index: counted from 0.
        sigma, next_sigma: noise levels before and after it.
    """

    index: int
    sigma: float
    next_sigma: float


class Prediction(NamedTuple):
    """What the model predicts at one noise level, float32 tokens (B, T, C).

    Attributes:
        x0: the clean latents, guided.
        negative: the clean latents for the negative prompt; None where that pass was not made.
    """

    x0: Latents
    negative: Latents


Predict = Callable[[States, float, int], Generator[Event, None, Prediction]]
"""Asks the model: states, their noise level, and the index that step skipping goes by. Given content is kept in x0."""

Draw = Callable[[Sequence[int]], mx.array]
"""Gives standard normal noise of a shape, such as :class:`mlx_ltx.sampling.noise.Noise`."""


class Sampler(ABC):
    """The arithmetic of a step; made for one run, since it may remember earlier steps and draws noise."""

    def evaluations(self, step: Step) -> int:
        """How many predictions the step asks for, for progress."""
        return 1

    @abstractmethod
    def step(self, states: States, step: Step, predict: Predict) -> Generator[Event, None, States]:
        """Move the states to the next noise level, asking ``predict`` and passing on its events."""


def euler_step(latent: mx.array, x0: mx.array, sigma: float, next_sigma: float) -> mx.array:
    """From one noise level to the next along the straight line through ``x0``, float32."""
    velocity = (latent - x0) / sigma
    return latent + velocity * (next_sigma - sigma)


class Euler(Sampler):
    """Straight lines."""

    def step(self, states: States, step: Step, predict: Predict) -> Generator[Event, None, States]:
        x0 = (yield from predict(states, step.sigma, step.index)).x0

        def move(state: LatentState, x0: mx.array) -> mx.array:
            return euler_step(state.latent, x0, step.sigma, step.next_sigma)

        return advance(states, x0, move)


class GradientEstimating(Sampler):
    """Euler whose direction is corrected by how it changed since the last step (openreview.net/pdf?id=o2ND9v0CeK).

    Args:
        gamma: how far to follow the change; 1 is plain Euler.
    """

    def __init__(self, gamma: float = 2.0):
        self.gamma = gamma
        self._velocities: dict[int, mx.array] = {}

    def step(self, states: States, step: Step, predict: Predict) -> Generator[Event, None, States]:
        x0 = (yield from predict(states, step.sigma, step.index)).x0
        if step.next_sigma == 0:
            return arrive(states, x0)
        moved: list[LatentState | None] = []
        for modality, (state, clean) in enumerate(zip(states, x0, strict=True)):
            if state is None or clean is None:
                moved.append(state)
                continue
            velocity = (state.latent - clean) / step.sigma
            last = self._velocities.get(modality, velocity)
            self._velocities[modality] = velocity
            estimate = self.gamma * (velocity - last) + last
            moved.append(replace(state, latent=state.latent + estimate * (step.next_sigma - step.sigma)))
        return States(*moved)


class EulerAncestral(Sampler):
    """Euler to below the next noise level, then back up to it with new noise, for rectified flow.

    Args:
        noise: drawn from once per modality and step, but for the last.
        eta: from 0 (plain Euler) to 1 (as much new noise as keeps the variance).
        s_noise: factor of the new noise.
    """

    def __init__(self, noise: Draw, eta: float = 1.0, s_noise: float = 1.0):
        self.noise, self.eta, self.s_noise = noise, eta, s_noise

    @classmethod
    def seeded(cls, seed: int, eta: float = 1.0, s_noise: float = 1.0) -> EulerAncestral:
        """With its own stream of noise for the clip's seed."""
        return cls(Noise(seed + SEED_OFFSET), eta, s_noise)

    def step(self, states: States, step: Step, predict: Predict) -> Generator[Event, None, States]:
        x0 = (yield from predict(states, step.sigma, step.index)).x0
        if step.next_sigma == 0:
            return arrive(states, x0)

        def move(state: LatentState, x0: mx.array) -> mx.array:
            if self.eta == 0:
                return euler_step(state.latent, x0, step.sigma, step.next_sigma)
            noise = self.noise(state.latent.shape)
            return state.keep_given(self.move(state.latent, x0, noise, step.sigma, step.next_sigma))

        return advance(states, x0, move)

    def move(self, latent: mx.array, x0: mx.array, noise: mx.array, sigma: float, next_sigma: float) -> mx.array:
        """The formula: down along the line, scaled to the next level's share of signal, and noise to make up for it."""
        down = next_sigma * (1 + (next_sigma / sigma - 1) * self.eta)
        scale = (1 - next_sigma) / (1 - down)
        up = math.sqrt(max(next_sigma**2 - (down * scale) ** 2, 0.0))
        return scale * (down / sigma * latent + (1 - down / sigma) * x0) + up * self.s_noise * noise


class EulerCfgPlusPlus(Sampler):
    """CFG++: Euler that leaves the current point along the negative prediction (https://arxiv.org/abs/2406.08070).

    The guidance must make the negative pass (``cfg_scale`` other than 1, or ``always_negative``).

    Args:
        noise: drawn from once per modality and step, but for the last.
        eta: share of ancestral noise, from 0 to 1.
        s_noise: factor of the new noise.
    """

    def __init__(self, noise: Draw, eta: float = 1.0, s_noise: float = 1.0):
        self.noise, self.eta, self.s_noise = noise, eta, s_noise

    @classmethod
    def seeded(cls, seed: int, eta: float = 1.0, s_noise: float = 1.0) -> EulerCfgPlusPlus:
        """With its own stream of noise for the clip's seed."""
        return cls(Noise(seed + SEED_OFFSET), eta, s_noise)

    def step(self, states: States, step: Step, predict: Predict) -> Generator[Event, None, States]:
        x0, negatives = yield from predict(states, step.sigma, step.index)
        if step.next_sigma == 0:
            return arrive(states, x0)
        moved: list[LatentState | None] = []
        for state, clean, negative in zip(states, x0, negatives, strict=True):
            if state is None or clean is None:
                moved.append(state)
                continue
            if negative is None:
                raise ValueError("CFG++ steps need guidance with a negative pass at every step")
            noise = self.noise(state.latent.shape) if self.eta > 0 and self.s_noise > 0 else None
            latent = self.move(state.latent, clean, negative, noise, step.sigma, step.next_sigma)
            moved.append(replace(state, latent=latent if noise is None else state.keep_given(latent)))
        return States(*moved)

    def move(
        self,
        latent: mx.array,
        x0: mx.array,
        negative: mx.array,
        noise: mx.array | None,
        sigma: float,
        next_sigma: float,
    ) -> mx.array:
        """The formula: an ancestral step in sigma / alpha, where alpha is the share of signal."""
        alpha, next_alpha = max(1 - sigma, SMALLEST_ALPHA), max(1 - next_sigma, SMALLEST_ALPHA)
        start, end = sigma / alpha, next_sigma / next_alpha
        up = min(self.eta * math.sqrt(end**2 * max(start**2 - end**2, 0.0) / start**2), end)
        down = math.sqrt(max(end**2 - up**2, 0.0))
        direction = (latent - alpha * negative) / sigma
        moved = next_alpha * x0 + next_alpha * down * direction
        return moved if noise is None else moved + next_alpha * up * self.s_noise * noise


def advance(states: States, arrays: Latents, move: Callable[[LatentState, mx.array], mx.array]) -> States:
    """Move each modality, video first; one that is absent or has no array stays as it is."""
    return States(
        *(
            state if state is None or array is None else replace(state, latent=move(state, array))
            for state, array in zip(states, arrays, strict=True)
        )
    )


def arrive(states: States, x0: Latents) -> States:
    """End at the prediction."""
    return advance(states, x0, lambda state, clean: clean)
