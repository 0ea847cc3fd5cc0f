"""Mean and standard deviation of latents, one pair per channel, as the autoencoders' checkpoints carry them."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


class ChannelStatistics(nn.Module):
    """Between an autoencoder's own latents and the normalised ones that diffusion works on.

    The last axis of every array is the channel axis; results keep the dtype of the input.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.mean = mx.zeros((channels,))
        self.std = mx.ones((channels,))

    def normalize(self, x: mx.array) -> mx.array:
        """``(x - mean) / std``."""
        return (x - self.mean.astype(x.dtype)) / self.std.astype(x.dtype)

    def denormalize(self, x: mx.array) -> mx.array:
        """``x * std + mean``."""
        return x * self.std.astype(x.dtype) + self.mean.astype(x.dtype)
