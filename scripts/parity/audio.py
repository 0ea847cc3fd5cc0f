"""Parity of the audio autoencoder, the mel spectrogram, resampling and both vocoders."""

from __future__ import annotations

import re
from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from mlx_ltx.checkpoints.keymaps import AUDIO_DECODER, AUDIO_ENCODER, VOCODER
from mlx_ltx.checkpoints.loading import load_weights
from mlx_ltx.media.resample import resample
from mlx_ltx.models.audio_vae import AudioDecoder, AudioEncoder, AudioVaeConfig
from mlx_ltx.models.mel import MelSpectrogram
from mlx_ltx.models.vocoder import ExtendedVocoder, VocoderConfig, build_vocoder
from parity import Comparison, GoldenSet, NotCovered, runner


@runner("audio_vae")
def audio_vae(golden: GoldenSet) -> Iterator[Comparison | NotCovered]:
    checkpoint = golden.checkpoint()
    config = AudioVaeConfig.from_metadata(checkpoint.config)
    encoder = load_weights(AudioEncoder(config), checkpoint, AUDIO_ENCODER)
    decoder = load_weights(AudioDecoder(config), checkpoint, AUDIO_DECODER)
    for case in sorted({name.partition(".")[0] for name in golden.names}):
        if case.startswith("encode"):
            yield golden.compare(case, "latent", images_first(encoder(images_last(golden.mx(f"{case}.mel")))))
        elif case.startswith("decode"):
            yield golden.compare(case, "mel", images_first(decoder(images_last(golden.mx(f"{case}.latent")))))
        else:
            yield NotCovered(case)


@runner("audio_mel")
def audio_mel(golden: GoldenSet) -> Iterator[Comparison]:
    """``waveRATE`` in; ``melRATE`` and ``resampled_RATE_to_RATE`` out, with rates written like 16k or 44k1."""
    config = AudioVaeConfig(mel_bins=golden.tensors["mel_filterbank"].shape[1])
    mel = MelSpectrogram.from_config(config)
    yield golden.compare("", "hann_window", mel.window)
    yield golden.compare("", "mel_filterbank", mel.filterbank)
    for name in golden.names:
        if match := re.fullmatch(r"resampled_(\w+)_to_(\w+)", name):
            wave = golden.tensors[f"wave{match[1]}"]
            yield golden.compare("", name, resampled(wave, hertz(match[1]), hertz(match[2])))
        elif match := re.fullmatch(r"mel(\d\w*)", name):
            wave = resampled(golden.tensors[f"wave{match[1]}"], hertz(match[1]), config.sampling_rate)
            yield golden.compare("", name, images_first(mel(mx.array(wave).transpose(0, 2, 1))))


@runner("vocoder_*")
def vocoder(golden: GoldenSet) -> Iterator[Comparison]:
    checkpoint = golden.checkpoint()
    model = load_weights(build_vocoder(VocoderConfig.from_metadata(checkpoint.config)), checkpoint, VOCODER, mx.float32)
    mel = images_last(golden.mx("mel"))
    yield golden.compare("", "wave", model(mel).transpose(0, 2, 1))
    if isinstance(model, ExtendedVocoder) and "vocoder_low" in golden.tensors:
        # Each part gets the recorded input, so that an error shows where it arises.
        low = golden.mx("vocoder_low").transpose(0, 2, 1)
        low = mx.pad(low, [(0, 0), (0, -low.shape[1] % model.mel_stft.hop_length), (0, 0)])
        bwe_mel = golden.mx("bwe_mel").transpose(0, 3, 2, 1)
        yield golden.compare("", "vocoder_low", model.vocoder(mel).transpose(0, 2, 1))
        yield golden.compare("", "bwe_mel", model.mel_stft(low).transpose(0, 3, 2, 1))
        yield golden.compare("", "bwe_residual", model.bwe_generator(bwe_mel).transpose(0, 2, 1))
        yield golden.compare("", "bwe_skip", model.resampler(low).transpose(0, 2, 1))
        yield golden.compare("", "resampler_filter", model.resampler.taps.reshape(1, 1, -1))


def images_last(x: mx.array) -> mx.array:
    """(B, C, T, F) to (B, T, F, C)."""
    return x.transpose(0, 2, 3, 1)


def images_first(x: mx.array) -> mx.array:
    return x.transpose(0, 3, 1, 2)


def resampled(wave: np.ndarray, source_rate: int, target_rate: int) -> np.ndarray:
    """Resample (B, C, samples)."""
    return np.stack([resample(item.T, source_rate, target_rate).T for item in wave])


def hertz(text: str) -> int:
    """``16k`` is 16000, ``44k1`` is 44100."""
    thousands, _, rest = text.partition("k")
    return int(thousands) * 1000 + int((rest + "000")[:3])
