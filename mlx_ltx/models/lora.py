"""A linear layer with a low-rank change beside it (LoRA, https://arxiv.org/abs/2106.09685)."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


class LoraLinear(nn.Module):
    """``base(x) + (x @ down.T) @ up.T``: the base layer, whatever it is, stays as it is.

    Args:
        base: any layer from (..., inputs) to (..., outputs), such as ``nn.QuantizedLinear``.
        down: (rank, inputs).
        up: (outputs, rank), with the strength multiplied in.
    """

    def __init__(self, base: nn.Module, down: mx.array, up: mx.array):
        super().__init__()
        self.base = base
        self.down = down
        self.up = up

    @property
    def bias(self) -> mx.array:
        """The base's bias, which tells neighbours the dtype of activations."""
        return self.base.bias

    def __call__(self, x: mx.array) -> mx.array:
        y = self.base(x)
        return y + ((x @ self.down.T) @ self.up.T).astype(y.dtype)
