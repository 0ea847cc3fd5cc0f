"""Latent upsamplers: more pixels, or more frames, without leaving the latent space (ltx_core/model/upsampler).

They are not local: their group norms take statistics over the whole clip, so a clip goes through at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_ltx.models.statistics import ChannelStatistics
from mlx_ltx.models.video_vae_blocks import depth_to_space

NORM_GROUPS = 32
BLUR_SIZE = 5
RATIONAL_SCALES = {0.75: Fraction(3, 4), 1.5: Fraction(3, 2), 2.0: Fraction(2), 4.0: Fraction(4)}


@dataclass(frozen=True)
class UpsamplerConfig:
    """What a checkpoint says of its upsampler.

    Attributes:
        spatial_factor: by which height and width grow, 1 for a purely temporal upsampler.
        temporal_factor: 1, or 2: F latent frames become 2 F - 1.
        rational: whether height and width grow by a whole number, are blurred and lose pixels again.
    """

    in_channels: int
    mid_channels: int
    blocks_per_stage: int
    spatial_factor: Fraction
    temporal_factor: int
    rational: bool

    @classmethod
    def from_metadata(cls, config: Mapping[str, Any]) -> UpsamplerConfig:
        """Read an upsampler file's (flat) config.

        Raises:
            ValueError: it asks for something that is not supported.
        """
        spatial = config.get("spatial_upsample", True)
        temporal = config.get("temporal_upsample", False)
        scale = config.get("spatial_scale", 2.0)
        mid_channels = config.get("mid_channels", 512)
        # The resampler is for frames alone; beside or without a temporal factor the reference does not look at it.
        rational = spatial and not temporal and config.get("rational_resampler", False)
        if config.get("dims", 3) != 3:
            raise ValueError(f"dims = {config['dims']!r} is not supported (supported: 3)")
        if not spatial and not temporal:
            raise ValueError("spatial_upsample = False with temporal_upsample = False is not supported")
        if spatial and scale not in (RATIONAL_SCALES if rational else (2.0,)):
            kind = "with a rational resampler" if rational else "without a rational resampler"
            raise ValueError(f"spatial_scale = {scale!r} is not supported {kind}")
        if mid_channels % NORM_GROUPS:
            raise ValueError(f"mid_channels = {mid_channels!r} is not supported, only multiples of {NORM_GROUPS}")
        return cls(
            in_channels=config.get("in_channels", 128),
            mid_channels=mid_channels,
            blocks_per_stage=config.get("num_blocks_per_stage", 4),
            spatial_factor=RATIONAL_SCALES[scale] if spatial else Fraction(1),
            temporal_factor=2 if temporal else 1,
            rational=rational,
        )


def group_norm(channels: int) -> nn.GroupNorm:
    """Over frames, height and width together with the channels of a group; computed in float32 by MLX."""
    return nn.GroupNorm(NORM_GROUPS, channels, pytorch_compatible=True)


class ResBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1)
        self.norm1 = group_norm(channels)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1)
        self.norm2 = group_norm(channels)

    def __call__(self, x: mx.array) -> mx.array:
        h = nn.silu(self.norm1(self.conv1(x)).astype(x.dtype))
        return nn.silu(x + self.norm2(self.conv2(h)).astype(x.dtype))


class BlurDown(nn.Module):
    """A blur of each channel by one 5x5 kernel, then every ``step``-th row and column; nothing if ``step`` is 1."""

    def __init__(self, step: int):
        super().__init__()
        self.step = step
        self.kernel = mx.zeros((1, 1, BLUR_SIZE, BLUR_SIZE))

    def __call__(self, x: mx.array) -> mx.array:
        """(N, H, W, C) to (N, ceil(H / step), ceil(W / step), C)."""
        if self.step == 1:
            return x
        # 25 shifted and strided sums: on CPU as fast as a depthwise convolution, which Metal is said to run up to 83
        # times slower (spatial filters of dmlsrc/LTX-2-MLX).
        _, H, W, _ = x.shape
        edge = BLUR_SIZE // 2
        x = mx.pad(x, [(0, 0), (edge, edge), (edge, edge), (0, 0)])
        kernel = self.kernel.astype(x.dtype)
        taps = [
            kernel[0, 0, row, column] * x[:, row : row + H : self.step, column : column + W : self.step]
            for row in range(BLUR_SIZE)
            for column in range(BLUR_SIZE)
        ]
        return sum(taps[1:], taps[0])


class RationalResampler(nn.Module):
    """Frames to ``factor`` times their size: learned growth by its numerator, blur and steps of its denominator."""

    def __init__(self, channels: int, factor: Fraction):
        super().__init__()
        self.grow = factor.numerator
        self.conv = nn.Conv2d(channels, self.grow**2 * channels, 3, padding=1)
        self.blur_down = BlurDown(factor.denominator)

    def __call__(self, x: mx.array) -> mx.array:
        """(B, F, H, W, C) to (B, F, H', W', C)."""
        B, F, *_ = x.shape
        x = depth_to_space(_per_frame(self.conv, x), (1, self.grow, self.grow))
        x = self.blur_down(x.flatten(0, 1))
        return x.reshape(B, F, *x.shape[1:])


class LatentUpsampler(nn.Module):
    """Latents to latents of more pixels or frames; both sides as the video encoder computes them, not normalised."""

    def __init__(self, config: UpsamplerConfig):
        super().__init__()
        self.config = config
        channels = config.mid_channels
        self.initial_conv = nn.Conv3d(config.in_channels, channels, 3, padding=1)
        self.initial_norm = group_norm(channels)
        self.res_blocks = [ResBlock(channels) for _ in range(config.blocks_per_stage)]
        # The list of one carries the official name, upsampler.0.
        self.upsampler: RationalResampler | list[nn.Conv2d | nn.Conv3d]
        if config.rational:
            self.upsampler = RationalResampler(channels, config.spatial_factor)
        elif config.temporal_factor == 1:
            self.upsampler = [nn.Conv2d(channels, 4 * channels, 3, padding=1)]
        else:
            grown = config.temporal_factor * config.spatial_factor.numerator**2 * channels
            self.upsampler = [nn.Conv3d(channels, grown, 3, padding=1)]
        self.post_upsample_res_blocks = [ResBlock(channels) for _ in range(config.blocks_per_stage)]
        self.final_conv = nn.Conv3d(channels, config.in_channels, 3, padding=1)

    def __call__(self, latent: mx.array) -> mx.array:
        """Upsample a clip.

        Args:
            latent: (B, F, H, W, in_channels), not normalised, of any floating-point dtype.

        Returns:
            (B, F or 2 F - 1, ceil(H * spatial_factor), ceil(W * spatial_factor), in_channels), not normalised, in the
            dtype of the weights.
        """
        # 1. residual blocks at the size of the input
        x = self.initial_conv(latent.astype(self.initial_conv.weight.dtype))
        x = nn.silu(self.initial_norm(x).astype(x.dtype))
        for block in self.res_blocks:
            x = block(x)
        # 2. growth
        x = self._grow(x)
        # 3. residual blocks at the size of the result
        for block in self.post_upsample_res_blocks:
            x = block(x)
        return self.final_conv(x)

    def _grow(self, x: mx.array) -> mx.array:
        if isinstance(self.upsampler, RationalResampler):
            return self.upsampler(x)
        conv, space = self.upsampler[0], self.config.spatial_factor.numerator
        if self.config.temporal_factor == 1:
            return depth_to_space(_per_frame(conv, x), (1, space, space))
        # The clip's first latent frame stands for a single frame, so its first copy goes.
        return depth_to_space(conv(x), (self.config.temporal_factor, space, space))[:, 1:]


def _per_frame(conv: nn.Module, x: mx.array) -> mx.array:
    """A two-dimensional convolution of each frame of (B, F, H, W, C)."""
    y = conv(x.flatten(0, 1))
    return y.reshape(*x.shape[:2], *y.shape[1:])


def upsample_latent(upsampler: LatentUpsampler, latent: mx.array, statistics: ChannelStatistics) -> mx.array:
    """Upsample normalised latents.

    Args:
        latent: (B, F, H, W, C), normalised.
        statistics: those of the video encoder.

    Returns:
        normalised latents in the dtype of ``latent``, their shape as :class:`LatentUpsampler` says.
    """
    return statistics.normalize(upsampler(statistics.denormalize(latent)).astype(latent.dtype))
