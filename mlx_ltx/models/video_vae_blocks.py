"""The layers of the convolutional video autoencoder, each with the stage that runs it over a clip.

Reference: ltx_core/model/video_vae/{convolution,resnet,sampling,ops}.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_ltx.models.streaming import Stage, WholeClip, Window
from mlx_ltx.models.timestep import TimestepEmbedder

NORM_EPSILON = 1e-8
GROUP_NORM_EPSILON = 1e-6
PAD_MODES: dict[str, Literal["reflect", "edge"]] = {
    "reflect": "reflect",
    "replicate": "edge",
}  # of mx.pad; zeros need no padded copy

Noise = Callable[[tuple[int, ...]], mx.array]
Factors = tuple[int, int, int]  # time, height, width


class Conditions(NamedTuple):
    """What the layers of one run share.

    Attributes:
        causal: whether convolutions see no later frame.
        timestep: (B,) in the model's units, or None without timestep conditioning.
        noise: draws standard normal values of a given shape; None if nothing draws.
    """

    causal: bool
    timestep: mx.array | None = None
    noise: Noise | None = None


class Modulation(NamedTuple):
    """Scale and shift after a norm, each (B, 1, 1, 1, C) in the dtype of the activations."""

    shift: mx.array
    scale: mx.array


def modulations(table: mx.array, embedding: mx.array) -> list[Modulation]:
    """Rows shift, scale, shift, scale, … of ``table`` (2n, C) plus the embedding (B, 2n * C) of the timestep."""
    rows, channels = table.shape
    values = table.astype(embedding.dtype) + embedding.reshape(-1, rows, channels)
    values = values[:, :, None, None, None, :]
    return [Modulation(values[:, row], values[:, row + 1]) for row in range(0, rows, 2)]


def activate(x: mx.array, modulation: Modulation | None = None) -> mx.array:
    """Normalise each pixel over its channels, modulate, SiLU."""
    x = mx.fast.rms_norm(x, None, NORM_EPSILON)
    if modulation is not None:
        x = x * (1 + modulation.scale) + modulation.shift
    return nn.silu(x)


def depth_to_space(x: mx.array, factors: Factors) -> mx.array:
    """(B, T, H, W, C * p * q * r) to (B, T * p, H * q, W * r, C); of the channels, C is the slowest, r the fastest."""
    B, T, H, W, C = x.shape
    p, q, r = factors
    x = x.reshape(B, T, H, W, C // (p * q * r), p, q, r).transpose(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(B, T * p, H * q, W * r, -1)


def space_to_depth(x: mx.array, factors: Factors) -> mx.array:
    """The inverse of :func:`depth_to_space`."""
    B, T, H, W, C = x.shape
    p, q, r = factors
    x = x.reshape(B, T // p, p, H // q, q, W // r, r, C).transpose(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(B, T // p, H // q, W // r, -1)


def patchify(x: mx.array, size: int) -> mx.array:
    """(B, F, H, W, C) to (B, F, H / size, W / size, C * size²); a patch's columns are slower than its rows."""
    B, F, H, W, C = x.shape
    x = x.reshape(B, F, H // size, size, W // size, size, C).transpose(0, 1, 2, 4, 6, 5, 3)
    return x.reshape(B, F, H // size, W // size, -1)


def unpatchify(x: mx.array, size: int) -> mx.array:
    """The inverse of :func:`patchify`."""
    B, F, H, W, C = x.shape
    x = x.reshape(B, F, H, W, C // size**2, size, size).transpose(0, 1, 2, 6, 3, 5, 4)
    return x.reshape(B, F, H * size, W * size, -1)


class ChannelStatistics(nn.Module):
    """Mean and standard deviation of every latent channel over the training data."""

    def __init__(self, channels: int):
        super().__init__()
        self.mean = mx.zeros(channels)
        self.std = mx.ones(channels)

    def normalize(self, latent: mx.array) -> mx.array:
        """What the encoder computes (..., C) to what the transformer sees, in the dtype of ``latent``."""
        return (latent - self.mean.astype(latent.dtype)) / self.std.astype(latent.dtype)

    def denormalize(self, latent: mx.array) -> mx.array:
        """The inverse of :meth:`normalize`."""
        return latent * self.std.astype(latent.dtype) + self.mean.astype(latent.dtype)


class PaddedConv(nn.Module):
    """A 3x3x3 convolution that pads in space; in time it gets its context from a :class:`Window`.

    Args:
        padding: what surrounds a frame: ``"zeros"``, ``"reflect"`` or ``"replicate"``.
        stride: in time, height and width.
    """

    def __init__(self, channels: int, out_channels: int, padding: str, stride: Factors = (1, 1, 1)):
        super().__init__()
        self.conv = nn.Conv3d(channels, out_channels, 3, stride=stride)
        self.padding = padding

    def __call__(self, x: mx.array) -> mx.array:
        """(B, T + 2, H, W, C) to (B, T, H, W, C'), divided by the stride.

        conv3d, after measuring it with MLX 0.32 beside three conv2d (one per frame of the kernel) and one conv2d over
        the channels of three frames. On CPU it is as fast from 128 channels of 32 x 48 on, and two to three times as
        fast on the small frames of the deep layers, where the others spend their time rearranging weights; all three
        unfold the same amount there (27 copies of the pixels pushed). On Metal, conv3d no longer unfolds since MLX
        0.31 if the channels are a multiple of 16 (ml-explore/mlx#3147), which all but the tests' are.

        The largest array is that unfolded input. Pushed frame by frame it has 2^31 elements only beyond 620,000
        pixels of 128 channels, frames of 3840 x 2590; larger ones need bands of rows.
        """
        edges = (0, 1, 1)
        if self.padding in PAD_MODES:
            x = mx.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1), (0, 0)], mode=PAD_MODES[self.padding])
            edges = (0, 0, 0)
        return mx.conv3d(x, self.conv.weight, stride=self.conv.stride, padding=edges) + self.conv.bias

    def stages(self, conditions: Conditions) -> list[Stage]:
        return [ConvStage(self, conditions.causal)]


class ConvStage(Stage):
    """A convolution with something done before to each pixel of its input, and after to its output."""

    def __init__(
        self,
        conv: PaddedConv,
        causal: bool,
        before: Callable[[mx.array], mx.array] | None = None,
        after: Callable[[mx.array], mx.array] | None = None,
    ):
        self.conv, self.before, self.after = conv, before, after
        self.window = Window(causal, conv.conv.stride[0])

    def push(self, x: mx.array, last: bool) -> mx.array | None:
        frames = self.window.push(x if self.before is None else self.before(x), last)
        if frames is None:
            return None
        y = self.conv(frames.array)
        return y if self.after is None else self.after(y)

    def kept(self) -> list[mx.array]:
        return self.window.kept()


class ResnetBlock(nn.Module):
    """``x + conv2(activate(conv1(activate(x))))``.

    Args:
        channels, out_channels: if they differ, ``x`` goes through a norm of the whole clip and a 1x1x1 convolution.
        padding: see :class:`PaddedConv`.
        noisy: after each convolution, add one draw per pixel (the same for all frames) times a factor per channel.
        timed: the activations are modulated by the timestep.
    """

    def __init__(self, channels: int, out_channels: int, padding: str, noisy: bool = False, timed: bool = False):
        super().__init__()
        self.conv1 = PaddedConv(channels, out_channels, padding)
        self.conv2 = PaddedConv(out_channels, out_channels, padding)
        if noisy:
            self.per_channel_scale1 = mx.zeros((channels, 1, 1))
            self.per_channel_scale2 = mx.zeros((channels, 1, 1))
        if timed:
            self.scale_shift_table = mx.zeros((4, channels))
        if channels != out_channels:
            self.norm3 = nn.GroupNorm(1, channels, eps=GROUP_NORM_EPSILON, pytorch_compatible=True)
            self.conv_shortcut = nn.Conv3d(channels, out_channels, 1)

    def shortcut(self, x: mx.array) -> mx.array:
        """The clip itself, or its projection to other channels."""
        return self.conv_shortcut(self.norm3(x).astype(x.dtype)) if "norm3" in self else x

    def stages(self, conditions: Conditions, embedding: mx.array | None = None) -> list[Stage]:
        """Fresh stages for one clip; ``embedding`` (B, 4 * channels) of the timestep is for a timed block."""
        modulation: Sequence[Modulation | None] = (None, None)
        if embedding is not None:
            modulation = modulations(self.scale_shift_table, embedding)
        stage = ResnetStage(self, conditions, modulation)
        return [WholeClip(stage) if "norm3" in self else stage]


class ResnetStage(Stage):
    """Keeps four frames: two of its input, from which both the first convolution and the shortcut are served, and two
    before the second convolution. The price is that the input's activation is computed again with every push, about
    an eighth of a block's time on CPU (where MLX's exponential is scalar), nearly nothing on a GPU.
    """

    def __init__(self, block: ResnetBlock, conditions: Conditions, modulation: Sequence[Modulation | None]):
        self.block, self.noise, self.modulation = block, conditions.noise, modulation
        self.input, self.hidden = Window(conditions.causal), Window(conditions.causal)
        self.given = 0
        self.draws: dict[int, mx.array] = {}

    def push(self, x: mx.array, last: bool) -> mx.array | None:
        # 1. first convolution
        frames = self.input.push(x, last)
        if frames is None:
            return None
        h = self._add_noise(self.block.conv1(activate(frames.array, self.modulation[0])), 1)
        # 2. second convolution
        hidden = self.hidden.push(activate(h, self.modulation[1]), last)
        if hidden is None:
            return None
        h = self._add_noise(self.block.conv2(hidden.array), 2)
        # 3. shortcut, from the frames that are still in the first window
        x = frames.at(self.given, h.shape[1])
        self.given += h.shape[1]
        return self.block.shortcut(x) + h

    def kept(self) -> list[mx.array]:
        return [*self.input.kept(), *self.hidden.kept(), *self.draws.values()]

    def _add_noise(self, h: mx.array, index: int) -> mx.array:
        name = f"per_channel_scale{index}"
        if name not in self.block:
            return h
        if index not in self.draws:
            assert self.noise is not None
            self.draws[index] = self.noise((h.shape[2], h.shape[3])).astype(h.dtype)[:, :, None]
        return h + self.draws[index] * self.block[name].reshape(-1).astype(h.dtype)


class ResnetGroup(nn.Module):
    """Several residual blocks of the same width, with one embedding of the timestep for all if ``timed``."""

    def __init__(self, channels: int, layers: int, padding: str, noisy: bool = False, timed: bool = False):
        super().__init__()
        self.res_blocks = [ResnetBlock(channels, channels, padding, noisy, timed) for _ in range(layers)]
        if timed:
            self.time_embedder = TimestepEmbedder(4 * channels)

    def stages(self, conditions: Conditions) -> list[Stage]:
        embedding = None
        if "time_embedder" in self:
            assert conditions.timestep is not None
            embedding = self.time_embedder(conditions.timestep)
        return [stage for block in self.res_blocks for stage in block.stages(conditions, embedding)]


class Upsample(nn.Module):
    """A convolution to more channels, which then become pixels and frames.

    Doubling time leaves out the first frame: the clip's first latent frame stands for a single frame.

    Args:
        factors: how often a pixel is repeated in time, height and width.
        reduction: by how much the channels shrink.
        residual: add the input, its own channels turned into pixels and frames.
    """

    def __init__(self, channels: int, factors: Factors, reduction: int, padding: str, residual: bool = False):
        super().__init__()
        self.conv = PaddedConv(channels, math.prod(factors) * channels // reduction, padding)
        self.factors, self.residual = factors, residual
        self.copies = math.prod(factors) // reduction

    def stages(self, conditions: Conditions) -> list[Stage]:
        return [UpsampleStage(self, conditions.causal)]


class UpsampleStage(Stage):
    def __init__(self, layer: Upsample, causal: bool):
        self.layer, self.window = layer, Window(causal)
        self.given = 0

    def push(self, x: mx.array, last: bool) -> mx.array | None:
        frames = self.window.push(x, last)
        if frames is None:
            return None
        y = self.layer.conv(frames.array)
        first, n = self.given, y.shape[1]
        y = depth_to_space(y, self.layer.factors)
        if self.layer.residual:
            x = depth_to_space(frames.at(first, n), self.layer.factors)
            y = y + mx.tile(x, (1, 1, 1, 1, self.layer.copies))
        self.given += n
        return y[:, 1:] if first == 0 and self.layer.factors[0] == 2 else y

    def kept(self) -> list[mx.array]:
        return self.window.kept()


class Downsample(nn.Module):
    """A convolution whose pixels and frames become channels, plus the input's, averaged in groups to as many channels.

    Halving time puts a copy of the first frame before the clip, so that 2k + 1 frames give k + 1.

    Args:
        factors: how many frames, rows and columns become one.
    """

    def __init__(self, channels: int, out_channels: int, factors: Factors, padding: str):
        super().__init__()
        self.conv = PaddedConv(channels, out_channels // math.prod(factors), padding)
        self.factors, self.out_channels = factors, out_channels

    def stages(self, conditions: Conditions) -> list[Stage]:
        return [DownsampleStage(self, conditions.causal)]


class DownsampleStage(Stage):
    """Works on pairs of frames, so a single one waits for the next."""

    def __init__(self, layer: Downsample, causal: bool):
        if not causal:
            raise ValueError("a downsampling layer is causal")
        self.layer, self.window = layer, Window(causal)
        self.started = False
        self.single: mx.array | None = None

    def push(self, x: mx.array, last: bool) -> mx.array | None:
        step = self.layer.factors[0]
        before = [x[:, :1]] * (0 if self.started else step - 1) if self.single is None else [self.single]
        x = mx.concatenate([*before, x], axis=1)
        self.started = True
        pairs = x.shape[1] // step * step
        self.single = mx.contiguous(x[:, pairs:]) if pairs < x.shape[1] else None
        if pairs == 0:
            return None
        x = x[:, :pairs]
        frames = self.window.push(x, last)
        assert frames is not None  # a causal window is never short of frames
        y = space_to_depth(self.layer.conv(frames.array), self.layer.factors)
        x = space_to_depth(x, self.layer.factors)
        return y + x.reshape(*x.shape[:-1], self.layer.out_channels, -1).mean(axis=-1)

    def kept(self) -> list[mx.array]:
        return self.window.kept() + ([] if self.single is None else [self.single])
