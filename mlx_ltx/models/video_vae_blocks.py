"""The layers of the convolutional video autoencoder, each with the stage that runs it over a clip.

Reference: ltx_core/model/video_vae/{convolution,resnet,sampling,ops}.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_ltx.models.streaming import Patch, Piece, Stage, Window, feed, frames, together
from mlx_ltx.models.timestep import TimestepEmbedder

NORM_EPSILON = 1e-8
GROUP_NORM_EPSILON = 1e-6
PAD_MODES: dict[str, Literal["reflect", "edge"]] = {
    "reflect": "reflect",
    "replicate": "edge",
}  # of mx.pad; zeros need no padded copy

# How many elements an array has at most that a convolution unfolds its input into. On CPU, where it always does, what
# leaves the caches is slow (128 channels: 145 GFLOP/s at 512 pixels, 70 from 1024 on, measured on two cores); on Metal,
# where few do, it must not come near 2^31 elements.
UNFOLDED_ELEMENTS = 1 << 21
LARGEST_ARRAY = 1 << 30

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


class PaddedConv(nn.Module):
    """A 3x3x3 convolution that pads in space; in time it gets its context from a :class:`Window`.

    conv3d, after measuring it with MLX 0.32 beside three conv2d (one per frame of the kernel) and one conv2d over the
    channels of three frames. On CPU it is as fast from 128 channels of 32 x 48 on, and two to three times as fast on
    the small frames of the deep layers, where the others spend their time rearranging weights; all three unfold the
    same amount there (27 copies of the pixels). On Metal, conv3d no longer unfolds since MLX 0.31 if the channels are a
    multiple of 16 (ml-explore/mlx#3147), which all but the tests' are.

    Args:
        padding: what surrounds a frame: ``"zeros"``, ``"reflect"`` or ``"replicate"``.
        stride: in time, height and width.
    """

    def __init__(self, channels: int, out_channels: int, padding: str, stride: Factors = (1, 1, 1)):
        super().__init__()
        self.conv = nn.Conv3d(channels, out_channels, 3, stride=stride)
        self.padding = padding

    def __call__(self, x: mx.array, above: bool = True, below: bool = True) -> mx.array:
        """(B, T + 2, H, W, C) to (B, T, H, W, C'), divided by the stride.

        Where a frame goes on, ``above`` or ``below`` false, there are two more rows in than out, one for either side.
        """
        top, bottom = int(above), int(below)
        if self.padding in PAD_MODES:
            x = mx.pad(x, [(0, 0), (0, 0), (top, bottom), (1, 1), (0, 0)], mode=PAD_MODES[self.padding])
            return convolve(x, self.conv, (0, 0), 0)
        return convolve(x, self.conv, (top, bottom), 1)

    def window(self, causal: bool) -> Window:
        """What feeds it."""
        step, row_step, _ = self.conv.stride
        kernels, *_, channels = self.conv.weight.shape
        return Window(causal, channels, kernels, step=step, row_step=row_step)

    def stages(self, conditions: Conditions) -> list[Stage]:
        return [ConvStage(self, conditions.causal)]


def convolve(x: mx.array, conv: nn.Conv3d, rows: tuple[int, int], columns: int) -> mx.array:
    """The convolution of x (B, T, H, W, C), without padding in time, in bands of frames and rows.

    Each band reads its own rows and those around it from ``x``, so that nothing is computed twice and the
    result is that of one call.

    Args:
        rows: how many rows of zeros are above and below.
        columns: how many columns of zeros are on either side.
    """
    B, T, H, W, _ = x.shape
    step, row_step, column_step = conv.stride
    frames_out = (T - 3) // step + 1
    rows_out = (H + sum(rows) - 3) // row_step + 1
    row_elements = B * ((W + 2 * columns - 3) // column_step + 1) * conv.weight[0].size
    limit = UNFOLDED_ELEMENTS if mx.default_device() == mx.Device(mx.cpu) else LARGEST_ARRAY
    band = min(rows_out, max(1, limit // row_elements))
    band = -(-rows_out // -(-rows_out // band))  # as even as can be
    frames = max(1, limit // (row_elements * rows_out))
    stack = []
    for first in range(0, frames_out, frames):
        last = min(first + frames, frames_out) - 1
        part = x[:, step * first : step * last + 3]
        bands = []
        for top in range(0, rows_out, band):
            bottom = min(top + band, rows_out) - 1
            a, b = row_step * top - rows[0], row_step * bottom - rows[0] + 3
            zeros = ([0, max(0, -a), columns], [0, max(0, b - H), columns])
            y = mx.conv_general(part[:, :, max(0, a) : b], conv.weight, stride=conv.stride, padding=zeros)
            if band < rows_out or frames < frames_out:
                mx.eval(y)  # one after the other, or all would be unfolded at once
            bands.append(y)
        stack.append(together(bands, 2))
    return together(stack, 1) + conv.bias


class ConvStage(Stage):
    """A convolution with something done before to each pixel of its input, and after to its output.

    Args:
        after: makes ``factor`` rows and columns of one.
    """

    def __init__(
        self,
        conv: PaddedConv,
        causal: bool,
        before: Callable[[mx.array], mx.array] | None = None,
        after: Callable[[mx.array], mx.array] | None = None,
        factor: int = 1,
    ):
        self.conv, self.before, self.after, self.factor = conv, before, after, factor
        self.activates = before is not None
        self.window = conv.window(causal)
        step, row_step, column_step = conv.conv.stride
        self.factors = Fraction(1, step), Fraction(factor, row_step), Fraction(factor, column_step)
        made, self.out_channels = conv.conv.weight.shape[0], conv.conv.weight.shape[0] // factor**2
        self.growth = max(1, made / conv.conv.weight.shape[-1])

    def run(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        return map(self._convolve, self.window.patches(pieces))

    def _convolve(self, patch: Patch) -> Piece:
        x = patch.array if self.before is None else self.before(patch.array)
        y = self.conv(x, patch.above, patch.below)
        y = y if self.after is None else self.after(y)
        mx.eval(y)
        self.window.release()
        return patch.piece(y, self.factor)

    def windows(self) -> list[Window]:
        return [self.window]


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
        return [(WholeClipResnetStage if "norm3" in self else ResnetStage)(self, conditions, modulation)]


class ResnetStage(Stage):
    """Keeps four frames: two of its input, from which both the first convolution and the shortcut are served, and two
    before the second convolution. The price is that the input is activated anew for every piece.
    """

    activates = True

    def __init__(self, block: ResnetBlock, conditions: Conditions, modulation: Sequence[Modulation | None]):
        self.block, self.noise, self.modulation = block, conditions.noise, modulation
        self.input, self.hidden = block.conv1.window(conditions.causal), block.conv2.window(conditions.causal)
        self.out_channels = block.conv2.conv.weight.shape[0]
        self.growth = max(1, self.out_channels / self.input.channels)
        self.draws: dict[int, mx.array] = {}

    def run(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        hidden = map(self._to_hidden, self.input.patches(pieces))
        yield from map(self._to_output, self.hidden.patches(hidden))
        self.input.clear()
        self.hidden.clear()

    def _to_hidden(self, patch: Patch) -> Piece:
        """The input of the second convolution."""
        h = self.block.conv1(activate(patch.array, self.modulation[0]), patch.above, patch.below)
        h = activate(self._add_noise(h, 1, patch), self.modulation[1])
        mx.eval(h)
        return patch.piece(h)

    def _to_output(self, patch: Patch) -> Piece:
        h = self.block.conv2(patch.array, patch.above, patch.below)
        y = self.shortcut(patch) + self._add_noise(h, 2, patch)
        mx.eval(y)
        self.hidden.release()
        self.input.release()
        return patch.piece(y)

    def shortcut(self, patch: Patch) -> mx.array:
        """What is added to the output where the patch is; the frames are still in the first window."""
        return self.input.take(patch.first, patch.frames, patch.top, patch.bottom)

    def windows(self) -> list[Window]:
        return [self.input, self.hidden]

    def kept(self) -> list[mx.array]:
        return [*super().kept(), *self.draws.values()]

    def _add_noise(self, h: mx.array, index: int, patch: Patch) -> mx.array:
        name = f"per_channel_scale{index}"
        if name not in self.block:
            return h
        if index not in self.draws:
            assert self.noise is not None
            self.draws[index] = self.noise((patch.rows.height, h.shape[3]))
        draw = self.draws[index][patch.top : patch.bottom].astype(h.dtype)
        return h + draw[:, :, None] * self.block[name].reshape(-1).astype(h.dtype)


class WholeClipResnetStage(ResnetStage):
    """Waits for all frames: the norm before its shortcut's projection takes statistics over the clip."""

    whole_clip = True

    def run(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        clip = mx.concatenate(list(frames(pieces)), axis=1)
        self.clip = self.block.shortcut(clip)
        mx.eval(self.clip)
        yield from super().run(feed([clip]))

    def shortcut(self, patch: Patch) -> mx.array:
        return self.clip[:, patch.first : patch.first + patch.frames]


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
        self.layer, self.window = layer, layer.conv.window(causal)
        time, height, width = map(Fraction, layer.factors)
        self.factors = time, height, width
        self.growth = layer.copies
        self.out_channels = layer.conv.conv.weight.shape[0] // math.prod(layer.factors)

    def run(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        return filter(lambda piece: piece.array.shape[1] > 0, map(self._grow, self.window.patches(pieces)))

    def _grow(self, patch: Patch) -> Piece:
        factors = self.layer.factors
        y = depth_to_space(self.layer.conv(patch.array, patch.above, patch.below), factors)
        if self.layer.residual:
            x = self.window.take(patch.first, patch.frames, patch.top, patch.bottom)
            y = y + mx.tile(depth_to_space(x, factors), (1, 1, 1, 1, self.layer.copies))
        if patch.first == 0 and factors[0] == 2:
            y = mx.contiguous(y[:, 1:])
        mx.eval(y)
        self.window.release()
        return patch.piece(y, factors[1])

    def windows(self) -> list[Window]:
        return [self.window]


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
    """Halving time, it works on pairs of frames, of which the first waits for the second."""

    def __init__(self, layer: Downsample, causal: bool):
        if not causal:
            raise ValueError("a downsampling layer is causal")
        self.layer, self.out_channels = layer, layer.out_channels
        step, row_step, column_step = layer.factors
        self.factors = Fraction(1, step), Fraction(1, row_step), Fraction(1, column_step)
        kernels, *_, channels = layer.conv.conv.weight.shape
        self.window = Window(causal, channels, kernels, step, size=2 + step, copies=1 + step, row_step=row_step)

    def run(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        return map(self._shrink, self.window.patches(pieces))

    def _shrink(self, patch: Patch) -> Piece:
        step, row_step, _ = factors = self.layer.factors
        y = space_to_depth(self.layer.conv(patch.array, patch.above, patch.below), factors)
        first = step * patch.first + 1 - step
        x = self.window.take(first, step * patch.frames, row_step * patch.top, row_step * patch.bottom)
        x = space_to_depth(x, factors)
        y = y + x.reshape(*x.shape[:-1], self.layer.out_channels, -1).mean(axis=-1)
        mx.eval(y)
        self.window.release()
        return patch.piece(y)

    def windows(self) -> list[Window]:
        return [self.window]
