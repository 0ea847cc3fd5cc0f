"""The demo's vocoder: a BigVGAN that hums, and its extension to 48 kHz.

Steady input makes a generator repeat one pattern per mel frame. The first stage draws that pattern at random, the later
ones interpolate it: tones of 100 Hz and its multiples, whose mixture follows the spectrogram.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from demo_weights.autoencoders import MEL_MEAN
from demo_weights.tensors import Tensors
from mlx_ltx.models.mel import hann_window, slaney_filterbank

MELS = 128  # 64 bins of two channels
TAPS = 12
EDGE = 7
LOUDNESS = 0.12
EXTENSION_LOUDNESS = 0.02


def put_vocoder(t: Tensors, config: dict[str, Any]) -> None:
    """Both generators and the analysis between them, for a config's ``vocoder`` section."""
    bwe = config["bwe"]
    _put_generator(t, "vocoder.vocoder", config["vocoder"], LOUDNESS)
    _put_generator(t, "vocoder.bwe_generator", bwe, EXTENSION_LOUDNESS)
    forward, inverse = fourier_bases(bwe["n_fft"], bwe["hop_length"])
    t.put("vocoder.mel_stft.stft_fn.forward_basis", forward)
    t.put("vocoder.mel_stft.stft_fn.inverse_basis", inverse)
    t.put("vocoder.mel_stft.mel_basis", slaney_filterbank(bwe["input_sampling_rate"], bwe["n_fft"], bwe["num_mels"]).T)


def _put_generator(t: Tensors, name: str, config: dict[str, Any], loudness: float) -> None:
    width = config["upsample_initial_channel"]
    # Spectrograms are taken as deviations from their mean, over EDGE frames at once.
    weight = np.repeat(t.draw(f"{name}.conv_pre.weight", width, MELS, 1), EDGE, axis=2) / math.sqrt(MELS) / EDGE
    t.put(f"{name}.conv_pre.weight", weight)
    t.put(f"{name}.conv_pre.bias", t.draw(f"{name}.conv_pre.bias", width) - MEL_MEAN * weight.sum(axis=(1, 2)))
    for stage, (rate, kernel) in enumerate(zip(config["upsample_rates"], config["upsample_kernel_sizes"], strict=True)):
        _put_upsampling(t, f"{name}.ups.{stage}", width, width // 2, rate, kernel, pattern=stage == 0)
        width //= 2
        for index, (size, dilations) in enumerate(
            zip(config["resblock_kernel_sizes"], config["resblock_dilation_sizes"], strict=True)
        ):
            block = f"{name}.resblocks.{stage * len(config['resblock_kernel_sizes']) + index}"
            for layer in range(len(dilations)):
                for part in ("1", "2"):
                    _put_snake(t, f"{block}.acts{part}.{layer}", width)
                    t.conv(f"{block}.convs{part}.{layer}", width, width, (size,), gain=0.3)
    _put_snake(t, f"{name}.act_post", width)
    mix = t.draw(f"{name}.conv_post.weight", 2, width, 1) / math.sqrt(width)
    t.put(f"{name}.conv_post.weight", loudness * mix * np.hanning(EDGE + 2)[1:-1] / 4)


def _put_upsampling(t: Tensors, name: str, inputs: int, outputs: int, rate: int, kernel: int, pattern: bool) -> None:
    """A transposed convolution, (inputs, outputs, kernel): a random tap per new sample, or a linear interpolation."""
    if pattern:
        weight = t.draw(f"{name}.weight", inputs, outputs, kernel) / math.sqrt(inputs * kernel / rate)
        weight -= weight.mean(axis=2, keepdims=True)  # so that a constant does not become one
    else:
        places = np.arange(kernel) - (kernel - 1) / 2
        ramp = np.maximum(0, 1 - np.abs(places) / rate)
        mix = t.draw(f"{name}.weight", inputs, outputs) / math.sqrt(inputs)
        weight = mix[:, :, None] * (ramp * rate / ramp.sum())
    t.put(f"{name}.weight", weight)
    t.put(f"{name}.bias", np.zeros(outputs))


def _put_snake(t: Tensors, name: str, channels: int) -> None:
    # A low frequency, e^alpha: nearly linear, because squared sines would add a constant.
    t.random(f"{name}.act.alpha", channels, std=0.1, mean=-2.0)
    t.random(f"{name}.act.beta", channels, std=0.1)
    t.put(f"{name}.upsample.filter", low_pass()[None, None])
    t.put(f"{name}.downsample.lowpass.filter", low_pass()[None, None])


def low_pass(cutoff: float = 0.25, half_width: float = 0.3) -> np.ndarray:
    """BigVGAN's anti-aliasing filter: a sinc in a Kaiser window, 12 taps, of sum 1.

    The window's shape follows from the transition's width (Kaiser and Schafer, 1980).
    """
    attenuation = 2.285 * (TAPS / 2 - 1) * math.pi * 4 * half_width + 7.95
    if attenuation > 50:
        beta = 0.1102 * (attenuation - 8.7)
    else:
        beta = 0.5842 * (attenuation - 21) ** 0.4 + 0.07886 * (attenuation - 21)
    time = np.arange(TAPS) - TAPS / 2 + 0.5
    taps = np.sinc(2 * cutoff * time) * np.kaiser(TAPS, beta)
    return taps / taps.sum()


def fourier_bases(n_fft: int, hop: int) -> tuple[np.ndarray, np.ndarray]:
    """Analysis and synthesis bases, (2 * (n_fft / 2 + 1), 1, n_fft): cosines, then minus sines, in a Hann window.

    Published vocoders carry both; the second one is not used.
    """
    angles = 2 * np.pi * np.arange(n_fft // 2 + 1)[:, None] * np.arange(n_fft) / n_fft
    basis = np.concatenate([np.cos(angles), -np.sin(angles)])
    window = hann_window(n_fft)
    # The pseudo-inverse of ``n_fft / hop * basis``: frequencies 0 and n_fft / 2 have one row that is not zero, not two.
    share = np.full(n_fft // 2 + 1, 2.0)
    share[[0, -1]] = 1
    inverse = basis * np.tile(share, 2)[:, None] * hop / n_fft**2
    return (basis * window)[:, None], (inverse * window)[:, None]
