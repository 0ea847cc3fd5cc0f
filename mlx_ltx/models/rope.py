"""Rotary position embeddings over fractional positions (ltx_core/model/transformer/rope.py).

An angle is ``grid[j] * (2 * position / max_position - 1)``. The grid is computed in float64 with NumPy, because MLX's
float64 trigonometry is float32 inside; angles are float32 as in the reference, their cosines exact.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np


class RopeTable(NamedTuple):
    """Cosines and sines for one set of tokens.

    Attributes:
        cos, sin: float32. Split: (B, heads, T, head_dim / 2). Interleaved: (B, T, inner_dim).
        interleaved: whether adjacent channels rotate together (over the whole inner dimension) or the halves of a head.
    """

    cos: mx.array
    sin: mx.array
    interleaved: bool

    def rotate(self, x: mx.array, heads: int) -> mx.array:
        """Rotate queries or keys.

        Args:
            x: (B, T, inner_dim), any dtype.
            heads: how many heads the inner dimension holds.

        Returns:
            (B, heads, T, head_dim) in the dtype of ``x``; the rotation itself is float32.
        """
        B, T, inner = x.shape
        if self.interleaved:
            pairs = x.astype(mx.float32).reshape(B, T, inner // 2, 2)
            turned = mx.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(B, T, inner)
            rotated = x.astype(mx.float32) * self.cos + turned * self.sin
            return rotated.astype(x.dtype).reshape(B, T, heads, inner // heads).transpose(0, 2, 1, 3)
        x = x.reshape(B, T, heads, inner // heads).transpose(0, 2, 1, 3)
        first, second = mx.split(x.astype(mx.float32), 2, axis=-1)
        rotated = mx.concatenate([first * self.cos - second * self.sin, second * self.cos + first * self.sin], axis=-1)
        return rotated.astype(x.dtype)


def frequency_grid(theta: float, axes: int, dim: int, precision: str) -> np.ndarray:
    """``theta ** linspace(0, 1, dim // (2 * axes)) * pi / 2`` as float32.

    Args:
        theta: base of the geometric progression.
        axes: number of position axes that share ``dim``.
        dim: inner dimension (heads times head size).
        precision: ``"float64"`` or ``"float32"``, the arithmetic of the power (``frequencies_precision``).
    """
    count = dim // (2 * axes)
    if precision == "float64":
        exponents = np.linspace(0.0, 1.0, count)
    else:
        # PyTorch's float32 linspace: counted from both ends, each value rounded once. Angles reach 15,000 radians, so
        # one unit in the last place of an exponent would show.
        step, index = np.float64(np.float32(1) / np.float32(max(count - 1, 1))), np.arange(count)
        exponents = np.where(index < count // 2, step * index, 1 - step * (count - 1 - index)).astype(np.float32)
    powers = np.power(np.float64(theta), exponents.astype(np.float64))
    if precision == "float64":
        return (powers * np.pi / 2).astype(np.float32)
    return powers.astype(np.float32) * np.float32(np.pi / 2)


def rope_table(
    positions: np.ndarray,
    max_positions: tuple[float, ...],
    *,
    dim: int,
    heads: int,
    theta: float,
    interleaved: bool,
    precision: str,
) -> RopeTable:
    """Cosines and sines for tokens at the given positions.

    Cosines are computed per distinct coordinate of an axis, then gathered: a video has few of them.

    Args:
        positions: float32, (B, axes, T).
        max_positions: per axis, the position that maps to 1.
        dim: inner dimension that is rotated.
        heads: number of heads in it.
        theta, interleaved, precision: see :func:`frequency_grid` and :class:`RopeTable`.
    """
    B, axes, T = positions.shape
    grid = frequency_grid(theta, axes, dim, precision)
    half = dim // 2
    padding = half - grid.size * axes
    cos = np.ones((B, T, half), np.float32)
    sin = np.zeros((B, T, half), np.float32)
    for axis, max_position in enumerate(max_positions):
        fractions = positions[:, axis].astype(np.float32) / np.float32(max_position)
        distinct, index = np.unique(fractions, return_inverse=True)
        angles = (grid * (2 * distinct[:, None] - 1)).astype(np.float32).astype(np.float64)
        index = index.reshape(B, T)
        # frequency-major, then axis; the padding (cosine 1, sine 0) comes first
        cos[:, :, padding + axis :: axes] = np.cos(angles).astype(np.float32)[index]
        sin[:, :, padding + axis :: axes] = np.sin(angles).astype(np.float32)[index]
    if interleaved:
        return RopeTable(mx.array(np.repeat(cos, 2, axis=-1)), mx.array(np.repeat(sin, 2, axis=-1)), True)
    per_head = (B, T, heads, half // heads)
    return RopeTable(
        mx.array(np.ascontiguousarray(cos.reshape(per_head).transpose(0, 2, 1, 3))),
        mx.array(np.ascontiguousarray(sin.reshape(per_head).transpose(0, 2, 1, 3))),
        False,
    )
