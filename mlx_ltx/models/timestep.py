"""Embedding of diffusion timesteps (ltx_core/model/transformer/timestep_embedding.py)."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np

SINUSOID_DIM = 256
MAX_PERIOD = 10_000.0


def sinusoidal_embedding(timesteps: mx.array, dim: int = SINUSOID_DIM) -> mx.array:
    """Cosines, then sines, of ``timesteps * 10000 ** (-i / (dim / 2))``.

    Args:
        timesteps: any shape S, in the model's units (sigma times the timestep scale).

    Returns:
        float32, S + (dim,).
    """
    half = dim // 2
    # Exactly rounded in NumPy: angles reach 1000 radians, where a float32 exponential on the device would show.
    exponents = (np.float32(-math.log(MAX_PERIOD)) * np.arange(half, dtype=np.float32)) / np.float32(half)
    frequencies = mx.array(np.exp(exponents.astype(np.float64)).astype(np.float32))
    angles = timesteps.astype(mx.float32)[..., None] * frequencies
    return mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=-1)


class TimestepMlp(nn.Module):
    """Two linear layers with SiLU between them, from the sinusoid to the model's width."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(SINUSOID_DIM, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear_2(nn.silu(self.linear_1(x)))


class TimestepEmbedder(nn.Module):
    """From timesteps of any shape S to S + (dim,), in the dtype of the weights."""

    def __init__(self, dim: int):
        super().__init__()
        self.timestep_embedder = TimestepMlp(dim)

    def __call__(self, timesteps: mx.array) -> mx.array:
        sinusoid = sinusoidal_embedding(timesteps)
        return self.timestep_embedder(sinusoid.astype(self.timestep_embedder.linear_1.bias.dtype))
