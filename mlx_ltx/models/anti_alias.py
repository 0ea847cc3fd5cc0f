"""Anti-aliased activations: up to twice the rate, a pointwise nonlinearity, and down again.

From BigVGAN (Lee et al., 2023, https://arxiv.org/abs/2206.04658), as in ltx_core/model/audio_vae/vocoder.py.

The filters are short (12 taps, one for all channels), for which depthwise convolutions are slow in MLX. Here a filter
is a small banded matrix that multiplies blocks of consecutive samples: one matrix product, nothing else.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

TAPS = 12
RATIO = 2
BLOCK = 32
SNAKE_EPSILON = 1e-9


def edge_pad(x: mx.array, left: int, right: int) -> mx.array:
    """Repeat the first and the last sample of (B, T, C) along time."""
    B, _, C = x.shape
    first, last = mx.broadcast_to(x[:, :1], (B, left, C)), mx.broadcast_to(x[:, -1:], (B, right, C))
    return mx.concatenate([first, x, last], axis=1)


def fir_upsample(x: mx.array, taps: mx.array, ratio: int, pad: int, crop: int) -> mx.array:
    """Repeat the edges ``pad`` times, convolve transposed with stride ``ratio``, drop ``crop`` samples in front.

    ``y[m] = ratio * sum_k padded[k] * taps[m + crop - ratio * k]``; the order (pad first) keeps a constant constant.

    Args:
        x: (B, T, C).
        taps: (K,).

    Returns:
        (B, ratio * T, C).
    """
    T = x.shape[1]
    index, first = _upsampling_index(taps.size, ratio, crop)
    return _multiply_blocks(x, _matrix(ratio * taps, index), left=pad - first, step=BLOCK)[:, : ratio * T]


def fir_downsample(x: mx.array, taps: mx.array, ratio: int, left: int) -> mx.array:
    """Repeat the edges (``left`` times in front, as often as needed behind) and convolve with stride ``ratio``.

    ``y[i] = sum_j padded[ratio * i + j] * taps[j]``.

    Args:
        x: (B, T, C), T a multiple of ``ratio``.
        taps: (K,).

    Returns:
        (B, T // ratio, C).
    """
    T = x.shape[1]
    index = _downsampling_index(taps.size, ratio)
    return _multiply_blocks(x, _matrix(taps, index), left=left, step=ratio * BLOCK)[:, : T // ratio]


def _multiply_blocks(x: mx.array, matrix: mx.array, left: int, step: int) -> mx.array:
    """``matrix`` (rows, columns) times the windows of ``columns`` samples, ``step`` apart, of the edge-padded ``x``."""
    B, T, C = x.shape
    rows, columns = matrix.shape
    blocks = math.ceil(T / step)
    length = (blocks - 1) * step + columns
    padded = edge_pad(x, left, max(0, length - left - T))
    windows = mx.as_strided(padded, (B, blocks, columns, C), (padded.shape[1] * C, step * C, C, 1))
    return (matrix @ windows).reshape(B, blocks * rows, C)


def _matrix(taps: mx.array, index: np.ndarray) -> mx.array:
    """``taps[index]``, with zero where the index is one past the last tap."""
    return mx.concatenate([taps, mx.zeros((1,), taps.dtype)])[mx.array(index)]


@lru_cache
def _upsampling_index(taps: int, ratio: int, crop: int) -> tuple[np.ndarray, int]:
    """Which tap stands where in the matrix of :func:`fir_upsample`, and the padded sample of its first column."""
    first = math.ceil((crop - taps + 1) / ratio)
    last = (ratio * BLOCK - 1 + crop) // ratio
    rows, columns = np.arange(ratio * BLOCK)[:, None], np.arange(first, last + 1)
    return _valid(rows + crop - ratio * columns, taps), first


@lru_cache
def _downsampling_index(taps: int, ratio: int) -> np.ndarray:
    rows, columns = np.arange(BLOCK)[:, None], np.arange(ratio * (BLOCK - 1) + taps)
    return _valid(columns - ratio * rows, taps)


def _valid(index: np.ndarray, taps: int) -> np.ndarray:
    return np.where((index >= 0) & (index < taps), index, taps).astype(np.int32)


class Filter(nn.Module):
    """A published filter, (1, 1, 12)."""

    def __init__(self):
        super().__init__()
        self.filter = mx.zeros((1, 1, TAPS))


class Downsampler(nn.Module):
    """Holds the low-pass filter under its published name."""

    def __init__(self):
        super().__init__()
        self.lowpass = Filter()


class SnakeBeta(nn.Module):
    """``x + sin²(x e^alpha) / (e^beta + 1e-9)`` with a learned alpha and beta per channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = mx.zeros((channels,))
        self.beta = mx.zeros((channels,))

    def __call__(self, x: mx.array) -> mx.array:
        return _snake(x, mx.exp(self.alpha), 1 / (mx.exp(self.beta) + SNAKE_EPSILON))


@partial(mx.compile, shapeless=True)
def _snake(x: mx.array, frequency: mx.array, scale: mx.array) -> mx.array:
    return x + scale * mx.square(mx.sin(x * frequency))


class AntiAliasedSnake(nn.Module):
    """SnakeBeta at twice the sampling rate, between an upsampling and a downsampling low-pass filter."""

    REACH = 5
    """How many samples to each side a result depends on."""

    def __init__(self, channels: int):
        super().__init__()
        self.act = SnakeBeta(channels)
        self.upsample = Filter()
        self.downsample = Downsampler()

    def __call__(self, x: mx.array) -> mx.array:
        """(B, T, C) to the same shape."""
        up, down = self.upsample.filter.reshape(-1), self.downsample.lowpass.filter.reshape(-1)
        pad = TAPS // RATIO - 1
        x = fir_upsample(x, up, RATIO, pad, crop=pad * RATIO + (TAPS - RATIO) // 2)
        return fir_downsample(self.act(x), down, RATIO, left=TAPS // 2 - 1)


class SincResampler:
    """Upsampling by a whole ratio with a Hann-windowed sinc: six zero crossings, rolloff 0.99, repeated edges.

    The filter is not in checkpoints; it is that of torchaudio's ``resample``.
    """

    ZERO_CROSSINGS = 6
    ROLLOFF = 0.99

    def __init__(self, ratio: int):
        self.ratio = ratio
        self.width = math.ceil(self.ZERO_CROSSINGS / self.ROLLOFF)
        time = (np.arange(2 * self.width * ratio + 1) / ratio - self.width) * self.ROLLOFF
        window = np.cos(np.clip(time / self.ZERO_CROSSINGS, -1, 1) * np.pi / 2) ** 2
        self.taps = mx.array((np.sinc(time) * window * self.ROLLOFF / ratio).astype(np.float32))

    def __call__(self, x: mx.array) -> mx.array:
        """Float32 (B, T, C) to (B, ratio * T, C)."""
        return fir_upsample(x, self.taps, self.ratio, pad=self.width, crop=2 * self.width * self.ratio)
