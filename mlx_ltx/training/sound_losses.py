"""Losses between waveforms that compare what is heard: magnitudes of short-time Fourier transforms.

Several window lengths at once, as in Parallel WaveGAN (Yamamoto et al., 2020, https://arxiv.org/abs/1910.11480): long
windows tell tones apart, short ones tell when something happens.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_ltx.models.mel import hann_window

WINDOWS = (128, 512, 2048)
SMALLEST = 1e-4


def magnitudes(waveform: mx.array, window: int) -> mx.array:
    """Magnitudes of frames a quarter of a window apart: (B, samples, C) to (B, C, frames, window // 2 + 1).

    Frames begin at the first sample; what is left at the end is not looked at. Scaled so that a sine of amplitude 1 has
    a peak of about 1 for any window.

    Raises:
        ValueError: the waveform is shorter than the window.
    """
    B, samples, C = waveform.shape
    if samples < window:
        raise ValueError(f"{samples} samples are fewer than a window of {window}")
    hop = window // 4
    count = (samples - window) // hop + 1
    x = waveform.transpose(0, 2, 1)
    # Four quarters of every frame, instead of a strided view, whose gradient is slow.
    quarters = x[..., : (count + 3) * hop].reshape(B, C, count + 3, hop)
    frames = mx.concatenate([quarters[:, :, index : index + count] for index in range(4)], axis=-1)
    weights = hann_window(window)
    spectrum = mx.fft.rfft(frames * mx.array((weights * 2 / weights.sum()).astype(np.float32)))
    # The gradient of a magnitude has no value at 0.
    return mx.sqrt(mx.square(mx.real(spectrum)) + mx.square(mx.imag(spectrum)) + SMALLEST**2)


def spectral_loss(made: mx.array, wanted: mx.array, windows: tuple[int, ...] = WINDOWS) -> mx.array:
    """The mean over windows of spectral convergence and of the difference of logarithms, of (B, samples, C)."""
    total = mx.array(0.0)
    for window in windows:
        a, b = magnitudes(made, window), magnitudes(wanted, window)
        convergence = mx.sqrt(mx.sum(mx.square(a - b)) / (mx.sum(mx.square(b)) + SMALLEST))
        total = total + convergence + mx.mean(mx.abs(mx.log(a) - mx.log(b)))
    return total / len(windows)
