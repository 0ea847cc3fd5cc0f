"""Changing the sampling rate of audio (equal to torchaudio.functional.resample with its defaults)."""

from __future__ import annotations

import math

import numpy as np

ZERO_CROSSINGS = 6
ROLLOFF = 0.99


def resample(waveform: np.ndarray, source_rate: int, target_rate: int) -> np.ndarray:
    """Resample audio with a Hann-windowed sinc of six zero crossings, rolled off at 0.99 of the lower Nyquist rate.

    Smith, Digital Audio Resampling (ccrma.stanford.edu/~jos/resample/). Silence is assumed before and after.

    Args:
        waveform: (samples, channels), float32.
        source_rate, target_rate: in Hz, positive.

    Returns:
        (ceil(samples * target_rate / source_rate), channels), float32.
    """
    if waveform.ndim != 2:
        raise ValueError(f"a waveform is (samples, channels), not of shape {waveform.shape}")
    if source_rate <= 0 or target_rate <= 0:
        raise ValueError(f"sampling rates are positive, not {source_rate} and {target_rate}")
    waveform = waveform.astype(np.float32, copy=False)
    if source_rate == target_rate:
        return waveform
    divisor = math.gcd(source_rate, target_rate)
    source, target = source_rate // divisor, target_rate // divisor
    samples, channels = waveform.shape
    length = -(-samples * target // source)
    width = math.ceil(ZERO_CROSSINGS * source / (min(source, target) * ROLLOFF))

    # Every target-th output sample has the same fractional position in the input, so the same filter: one phase.
    padded = np.pad(waveform.T, ((0, 0), (width, width + 2)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * width + 2, axis=1)
    result = np.empty((channels, length), np.float32)
    for phase in range(min(target, length)):
        count = -(-(length - phase) // target)
        first = phase * source // target
        taps = _taps(phase, source, target, width)
        result[:, phase::target] = windows[:, first : first + (count - 1) * source + 1 : source] @ taps
    return np.ascontiguousarray(result.T)


def _taps(phase: int, source: int, target: int, width: int) -> np.ndarray:
    """The filter of one phase, over the ``2 width + 2`` input samples from ``width`` before its position; float32."""
    cutoff = min(source, target) * ROLLOFF
    position = np.arange(-width, width + 2) + phase * source // target
    # Times in zero crossings of the sinc; computed in float64 and rounded once.
    time = np.clip((position / source - phase / target) * cutoff, -ZERO_CROSSINGS, ZERO_CROSSINGS)
    window = np.cos(time * np.pi / ZERO_CROSSINGS / 2) ** 2
    return (np.sinc(time) * window * cutoff / source).astype(np.float32)
