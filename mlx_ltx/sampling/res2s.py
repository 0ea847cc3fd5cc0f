"""The second-order sampler of the HQ pipeline, res_2s: two predictions per step, with noise at both.

Source: ltx_pipelines/utils/{samplers,res2s}.py and Res2sDiffusionStep in ltx_core/components/diffusion_steps.py. The
reference computes in float64; here arrays are float32 and coefficients float64, with the formulas arranged so that
nothing is divided by the small difference of two noise levels.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_ltx.events import Event
from mlx_ltx.sampling.noise import Noise
from mlx_ltx.sampling.samplers import SEED_OFFSET, Draw, Predict, Sampler, Step, advance, arrive
from mlx_ltx.sampling.state import LatentState, States

# Where a schedule that ends at 0 is left for one last prediction: the logarithm of 0 has no meaning.
LAST_SIGMA = 0.0011
SUBSTEP_ETA = 0.5
# Steps that the anchor is refined in: short ones, and not in the last of the noise.
LONGEST_REFINED, LOWEST_REFINED = 0.5, 0.03
SEEDS = 2**64
REFERENCE_SEED = SEEDS - 1  # -1


class Coefficients(NamedTuple):
    """Of a step of length h in -log(sigma): for the point halfway, and for both predictions."""

    a21: float
    b1: float
    b2: float


def res2s_coefficients(h: float) -> Coefficients:
    """Exponential Runge-Kutta of second order with its second stage at half the step, from phi functions.

    ``a21 = phi1(-h/2) / 2``, ``b2 = 2 phi2(-h)``, ``b1 = phi1(-h) - b2`` with ``phi1(z) = (e^z - 1) / z`` and
    ``phi2(z) = (e^z - 1 - z) / z^2``.
    """
    phi1, phi2 = math.expm1(-h) / -h, (math.expm1(-h) + h) / h**2
    return Coefficients(math.expm1(-h / 2) / -h, phi1 - 2 * phi2, 2 * phi2)


class Res2s(Sampler):
    """Two predictions per step, the second halfway; a last one when the schedule ends at 0.

    Args:
        noise: drawn from at the end of steps, once per modality.
        substep_noise: drawn from halfway.
        eta: share of new noise at the end of steps, 0 for none to 1; halfway it is always 0.5, as in the reference.
        refinements: how often a short step's starting point is made consistent with its noised point halfway
            ("bongmath"); 0 leaves it.
        per_token: noise is mixed in by each token's own noise level. A run that has fully given tokens then has no
            noise at all, as in the reference ("non-legacy"); otherwise given content is blended back after noise.
    """

    def __init__(
        self,
        noise: Draw,
        substep_noise: Draw,
        eta: float = 0.5,
        refinements: int = 100,
        per_token: bool = False,
    ):
        self.noise, self.substep_noise = noise, substep_noise
        self.eta, self.refinements, self.per_token = eta, refinements, per_token

    @classmethod
    def seeded(cls, seed: int = REFERENCE_SEED, eta: float = 0.5, refinements: int = 100) -> Res2s:
        """With its own streams of noise.

        The reference's pipelines leave this seed at -1, so that only the initial noise follows the clip's seed. Do the
        same by leaving it out; the clip's own seed would give the initial noise once more.
        """
        return cls(Noise(seed), Noise((seed + SEED_OFFSET) % SEEDS), eta, refinements)

    def evaluations(self, step: Step) -> int:
        return 3 if step.next_sigma == 0 else 2

    def step(self, states: States, step: Step, predict: Predict) -> Generator[Event, None, States]:
        sigma, end = step.sigma, step.next_sigma or LAST_SIGMA
        middle = math.sqrt(sigma * end)
        h = math.log(sigma / end)
        a21, b1, b2 = res2s_coefficients(h)
        refinements = self.refinements if h < LONGEST_REFINED and sigma > LOWEST_REFINED else 0

        # 1. halfway, by the first prediction, with noise
        first = (yield from predict(states, sigma, step.index)).x0

        def go_halfway(state: LatentState, x0: mx.array) -> mx.array:
            halfway = state.latent + h * a21 * (x0 - state.latent)
            noise = normalised(self.substep_noise(state.latent.shape))
            return self._noised(state, state.latent, halfway, sigma, middle, noise, SUBSTEP_ETA)

        halfway = advance(states, first, go_halfway)

        # 2. from a starting point that agrees with it, to the end, by both predictions, with noise
        second = (yield from predict(halfway, middle, 0)).x0
        moved: list[LatentState | None] = []
        for state, mid, x0_first, x0_second in zip(states, halfway, first, second, strict=True):
            if state is None or mid is None or x0_first is None or x0_second is None:
                moved.append(state)
                continue
            start = refined_anchor(state.latent, mid.latent, x0_first, h * a21, refinements)
            latent = start + h * (b1 * (x0_first - start) + b2 * (x0_second - start))
            noise = normalised(self.noise(latent.shape))
            latent = self._noised(state, start, latent, sigma, end, noise, self.eta)
            moved.append(replace(state, latent=latent))
        ended = States(*moved)

        # 3. what is left of the noise
        if step.next_sigma == 0:
            return arrive(ended, (yield from predict(ended, end, step.index + 1)).x0)
        return ended

    def _noised(
        self,
        state: LatentState,
        start: mx.array,
        latent: mx.array,
        sigma: float,
        next_sigma: float,
        noise: mx.array,
        eta: float,
    ) -> mx.array:
        """Exchange part of the noise that is left in ``latent`` for new noise."""
        if not self.per_token:
            return state.keep_given(sde_step(start, latent, np.array(sigma), np.array(next_sigma), noise, eta))
        mask = state.mask.astype(np.float64)[None, :, None]
        return sde_step(start, latent, mask * sigma, mask * next_sigma, noise, eta)


def refined_anchor(start: mx.array, halfway: mx.array, x0: mx.array, share: float, times: int) -> mx.array:
    """Repeat ``start = halfway - share * (x0 - start)``: the start from which Euler would have come halfway.

    The reference iterates; this is the sum of its geometric series, exactly as far.

    Args:
        start, halfway, x0: float32, alike in shape.
        share: of the way to ``x0`` that is halfway, below 1.
        times: number of repetitions.
    """
    if times == 0:
        return start
    fixed_point = (halfway - share * x0) / (1 - share)
    return fixed_point + share**times * (start - fixed_point)


def sde_step(
    start: mx.array, latent: mx.array, sigma: np.ndarray, next_sigma: np.ndarray, noise: mx.array, eta: float
) -> mx.array:
    """Replace part of the noise of a point by new noise, keeping the variance.

    Args:
        start: where the step began, at ``sigma``.
        latent: where it came to, at ``next_sigma``.
        sigma, next_sigma: float64, scalars or one per token (1, T, 1).
        noise: standard normal.
        eta: share of the next noise level that is new noise, 0 to 1.

    Returns:
        ``latent`` as it is if any of its tokens would get no noise.
    """
    up = np.minimum(next_sigma * eta, next_sigma * 0.9999)
    if (up == 0).any():
        return latent
    left = np.sqrt(next_sigma**2 - up**2)
    scale = (1 - next_sigma) + left
    # scale * (clean + left / scale * eps) + up * noise with eps = (start - latent) / (sigma - next_sigma)
    # and clean = start - sigma * eps.
    ratio = (sigma - left / scale) / (sigma - next_sigma)
    return _single(scale) * (start + _single(ratio) * (latent - start)) + _single(up) * noise


def _single(values: np.ndarray) -> mx.array | float:
    return float(values) if values.ndim == 0 else mx.array(values.astype(np.float32))


def normalised(noise: mx.array) -> mx.array:
    """Shifted and scaled to mean 0 and (unbiased) standard deviation 1, over everything and then over each sample."""
    noise = (noise - mx.mean(noise)) / mx.std(noise, ddof=1)
    return (noise - mx.mean(noise, axis=(-2, -1), keepdims=True)) / mx.std(noise, axis=(-2, -1), keepdims=True, ddof=1)
