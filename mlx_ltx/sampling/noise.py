"""Gaussian noise from one seed, drawn in the reference's order and shapes."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx


class Noise:
    """A stream of standard normal draws.

    One stream serves a whole generation, as one generator does in the reference: video tokens, then audio tokens, stage
    after stage, then whatever the decoders draw. The same seed gives the same clip on the same MLX backend; PyTorch's
    numbers cannot be reproduced.
    """

    def __init__(self, seed: int):
        self._key = mx.random.key(seed)

    def __call__(self, shape: Sequence[int]) -> mx.array:
        """The next draw, float32."""
        self._key, key = mx.random.split(self._key)
        return mx.random.normal(tuple(shape), key=key)
