"""Noise schedules: falling sequences of sigma, from 1 (noise) to 0 (clean) (ltx_core/components/schedulers.py)."""

from __future__ import annotations

import math

import numpy as np

# Token counts between which the LTX-2 schedule interpolates its shift, and the shifts there.
BASE_TOKENS, MAX_TOKENS = 1024, 4096
BASE_SHIFT, MAX_SHIFT = 0.95, 2.05

# What the distilled models were trained on; no other sigmas work with them.
DISTILLED = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0)
REFINEMENT = (0.909375, 0.725, 0.421875, 0.0)
# Refinement of a clip in overlapping tiles, which starts lower because the tiles must agree.
TILED_REFINEMENT = (0.625, 0.4, 0.0)


def ltx2_schedule(steps: int, tokens: int = MAX_TOKENS, terminal: float | None = 0.1) -> np.ndarray:
    """The schedule of the guided pipelines: linear, shifted by the token count, its last step stretched to a value.

    Args:
        steps: number of denoising steps, at least 1.
        tokens: video tokens; the reference's one-stage and two-stage pipelines use 4096 whatever the size.
        terminal: the last non-zero sigma after stretching, or None not to stretch.

    Returns:
        float32, (steps + 1,), from 1 to 0.

    Raises:
        ValueError: no steps, or so many tokens that the schedule degenerates (above about 45,000 in float32).
    """
    if steps < 1:
        raise ValueError(f"a schedule needs at least one step, not {steps}")
    slope = (MAX_SHIFT - BASE_SHIFT) / (MAX_TOKENS - BASE_TOKENS)
    shift = math.exp(tokens * slope + BASE_SHIFT - slope * BASE_TOKENS)
    linear = np.linspace(1.0, 0.0, steps + 1, dtype=np.float32)[:-1]
    sigmas = (np.float32(shift) / (np.float32(shift) + (1 / linear - 1))).astype(np.float32)
    if terminal is not None and steps == 1:
        sigmas[0] = terminal  # the first sigma is also the last non-zero one, as in the reference
    elif terminal is not None:
        remaining = 1 - sigmas
        if remaining[-1] <= 0:
            raise ValueError(f"the LTX-2 schedule degenerates at {tokens} tokens")
        sigmas = 1 - remaining / (remaining[-1] / np.float32(1 - terminal))
    return np.append(sigmas, 0.0).astype(np.float32)


def linear_quadratic_schedule(steps: int, threshold: float = 0.025, linear_steps: int | None = None) -> np.ndarray:
    """Linear down to ``1 - threshold``, then quadratic to 0; with 8 steps it gives :data:`DISTILLED`.

    Args:
        steps: number of denoising steps, at least 1.
        threshold: how much noise the linear part removes.
        linear_steps: length of the linear part; half of the steps by default.

    Returns:
        float32, (steps + 1,).
    """
    if steps < 1:
        raise ValueError(f"a schedule needs at least one step, not {steps}")
    if steps == 1:
        return np.array([1.0, 0.0], np.float32)
    linear = steps // 2 if linear_steps is None else linear_steps
    quadratic = steps - linear
    gone = [i * threshold / linear for i in range(linear)]
    if quadratic > 0:
        excess = linear - threshold * steps
        square = excess / (linear * quadratic**2)
        slope = threshold / linear - 2 * excess / quadratic**2
        gone += [square * i**2 + slope * i + square * linear**2 for i in range(linear, steps)]
    return np.array([1 - value for value in [*gone, 1.0]], np.float32)


def beta_schedule(steps: int, alpha: float = 0.6, beta: float = 0.6, shift: float = 2.37) -> np.ndarray:
    """Sigmas at quantiles of a beta distribution (https://arxiv.org/abs/2407.12173).

    Returns:
        float32, up to (steps + 1,): timesteps that fall together are taken once.
    """
    if steps < 1:
        raise ValueError(f"a schedule needs at least one step, not {steps}")
    resolution = 10_000
    timesteps = np.arange(1, resolution + 1, dtype=np.float32) / np.float32(resolution)
    shifted = np.float32(math.exp(shift)) / (np.float32(math.exp(shift)) + (1 / timesteps - 1))
    quantiles = beta_quantiles(1 - np.linspace(0, 1, steps, endpoint=False), alpha, beta)
    chosen = dict.fromkeys(np.rint(quantiles * (resolution - 1)).astype(int).tolist())
    return np.array([*(shifted[index] for index in chosen), 0.0], np.float32)


def beta_quantiles(probabilities: np.ndarray, a: float, b: float) -> np.ndarray:
    """Quantiles of the beta distribution in [0, 1], by bisection on :func:`beta_cdf`."""
    low, high = np.zeros_like(probabilities), np.ones_like(probabilities)
    for _ in range(60):
        middle = (low + high) / 2
        below = beta_cdf(middle, a, b) < probabilities
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    # Rounded beyond what bisection resolves, so that the median of a symmetric distribution is exactly 0.5.
    return np.where(probabilities >= 1, 1.0, np.round((low + high) / 2, 12))


def beta_cdf(x: np.ndarray, a: float, b: float) -> np.ndarray:
    """The regularised incomplete beta function by its continued fraction (DLMF 8.17.22), for x in [0, 1]."""
    swap = x > (a + 1) / (a + b + 2)
    x = np.where(swap, 1 - x, x)
    p, q = np.where(swap, b, a), np.where(swap, a, b)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    with np.errstate(divide="ignore"):
        front = np.exp(log_front + p * np.log(x) + q * np.log1p(-x)) / p
    fraction = np.ones_like(x)
    for m in range(80, 0, -1):  # evaluated from its tail
        odd = -(p + m) * (p + q + m) * x / ((p + 2 * m) * (p + 2 * m + 1))
        even = m * (q - m) * x / ((p + 2 * m - 1) * (p + 2 * m))
        fraction = 1 + even / (1 + odd / fraction)
    fraction = 1 + (-p * (p + q) * x / (p * (p + 1))) / fraction
    value = front / fraction
    return np.where(swap, 1 - value, value)
