"""Log-mel spectrograms as the audio autoencoder reads them (ltx_core/model/audio_vae/ops.py over torchaudio)."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_ltx.models.audio_vae import AudioVaeConfig

FLOOR = 1e-5


class MelSpectrogram:
    """From waveforms to log-mel spectrograms.

    Magnitudes (not powers) of a short-time Fourier transform with a periodic Hann window over ``n_fft`` samples,
    centred on multiples of ``hop_length`` with the signal mirrored at both ends, weighted by ``bins`` Slaney mel
    filters from 0 to half the sampling rate, and ``log(max(x, 1e-5))`` of that.
    """

    def __init__(self, sampling_rate: int, n_fft: int, hop_length: int, bins: int):
        self.sampling_rate, self.n_fft, self.hop_length = sampling_rate, n_fft, hop_length
        self.window = mx.array(hann_window(n_fft).astype(np.float32))
        self.filterbank = mx.array(slaney_filterbank(sampling_rate, n_fft, bins).astype(np.float32))

    @classmethod
    def from_config(cls, config: AudioVaeConfig) -> MelSpectrogram:
        return cls(config.sampling_rate, config.n_fft, config.hop_length, config.mel_bins)

    def __call__(self, waveform: mx.array) -> mx.array:
        """Transform (B, samples, C) at ``sampling_rate`` to float32 (B, 1 + samples // hop_length, bins, C).

        Raises:
            ValueError: the waveform has no more than ``n_fft / 2`` samples, so it cannot be mirrored.
        """
        B, samples, C = waveform.shape
        half = self.n_fft // 2
        if samples <= half:
            raise ValueError(f"a mel spectrogram needs more than {half} samples, not {samples}")
        x = waveform.astype(mx.float32).transpose(0, 2, 1).reshape(B * C, samples)
        x = mx.concatenate([x[:, half:0:-1], x, x[:, -2 : -half - 2 : -1]], axis=1)
        T = 1 + samples // self.hop_length
        frames = mx.as_strided(x, (B * C, T, self.n_fft), (samples + 2 * half, self.hop_length, 1))
        magnitude = mx.abs(mx.fft.rfft(frames * self.window))
        mel = mx.log(mx.maximum(magnitude @ self.filterbank, FLOOR))
        return mel.reshape(B, C, T, -1).transpose(0, 2, 3, 1)


def hann_window(length: int) -> np.ndarray:
    """The periodic Hann window (``length`` samples of a period of ``length``), float64."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)


def slaney_filterbank(sampling_rate: int, n_fft: int, bins: int) -> np.ndarray:
    """Triangular filters equally spaced on Slaney's mel scale, each of unit area in Hz; (n_fft // 2 + 1, bins) float64.

    Slaney, Auditory Toolbox (1998): linear up to 1 kHz, logarithmic above; as torchaudio's ``melscale_fbanks``.
    """
    frequencies = np.linspace(0, sampling_rate / 2, n_fft // 2 + 1)
    edges = _mel_to_hertz(np.linspace(0, _hertz_to_mel(sampling_rate / 2), bins + 2))
    widths = np.diff(edges)
    distance = edges - frequencies[:, None]
    rising = -distance[:, :-2] / widths[:-1]
    falling = distance[:, 2:] / widths[1:]
    return np.maximum(0, np.minimum(rising, falling)) * 2 / (edges[2:] - edges[:-2])


HERTZ_PER_MEL = 200 / 3
BREAK_HERTZ = 1000.0
BREAK_MEL = BREAK_HERTZ / HERTZ_PER_MEL
LOG_STEP = np.log(6.4) / 27


def _hertz_to_mel(hertz: float) -> float:
    if hertz < BREAK_HERTZ:
        return hertz / HERTZ_PER_MEL
    return BREAK_MEL + float(np.log(hertz / BREAK_HERTZ)) / LOG_STEP


def _mel_to_hertz(mel: np.ndarray) -> np.ndarray:
    above = BREAK_HERTZ * np.exp(LOG_STEP * (mel - BREAK_MEL))
    return np.where(mel < BREAK_MEL, mel * HERTZ_PER_MEL, above)
