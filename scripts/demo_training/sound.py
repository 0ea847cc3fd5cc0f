"""The demo's audio autoencoder and vocoder, trained on the sound of scenes."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

import demo_scenes
from demo_training.layout import CONFIG
from demo_weights.vocoder import low_pass
from mlx_ltx.models.audio_vae import AudioDecoder, AudioEncoder, AudioVaeConfig
from mlx_ltx.models.mel import MelSpectrogram
from mlx_ltx.models.vocoder import EDGE_KERNEL, MEL_BINS, Generator, VocoderConfig
from mlx_ltx.training.autoencoders import encode_sound
from mlx_ltx.training.sound_losses import spectral_loss

RATE = 16_000
HOP = 160
FRAMES = 101  # mel frames of a training piece: 26 latents
BATCH = 2
NOISE = 0.1
SMALLNESS = 1e-3
SIDES_WEIGHT = 4.0
DIFFERENCE_GAIN = 6.0

VOCODER_FRAMES = 50
CLIP_FRAMES = 201  # mel frames of a clip's 51 latents: that is where sounds end for the vocoder
VOCODER_BATCH = 4
MEL_MEAN = -8.0
EDGE = 8  # mel frames at the ends of a piece in which the vocoder knows too little


class AudioAutoencoder(nn.Module):
    def __init__(self, seed: int = 1):
        super().__init__()
        mx.random.seed(seed)
        config = AudioVaeConfig.from_metadata(CONFIG)
        self.encoder, self.decoder = AudioEncoder(config), AudioDecoder(config)
        for side in (self.encoder, self.decoder):
            side.statistics.freeze()
        first = self.encoder.conv_in.conv
        first.weight = _half_of_differences(first.weight)
        self.decoder.conv_out.conv.bias = mx.full((config.audio_channels,), -9.0)  # most bins are silent


def _half_of_differences(weight: mx.array) -> mx.array:
    """A first layer's weight (outputs, ..., inputs), whose inputs are those of the left and then those of the right.

    Half of its outputs see the mean of the sides, and half what they differ by, enlarged: it is little.
    """
    half, inputs = weight.shape[0] // 2, weight.shape[-1] // 2
    one = weight[..., :inputs]
    mean = mx.concatenate([one[:half]] * 2, axis=-1)
    difference = mx.concatenate([one[half:], -one[half:]], axis=-1)
    return mx.concatenate([mean, DIFFERENCE_GAIN * difference])


def sound_loss(module: AudioAutoencoder, mel: mx.array, key: mx.array) -> dict[str, mx.array]:
    """Of log-mel spectrograms (B, T, bins, 2); noise and smallness as for the video autoencoder.

    What the sides differ by counts by itself and more: it is little, and would be left out.
    """
    latent = encode_sound(module.encoder, mel).mean
    error = module.decoder(latent + NOISE * mx.random.normal(latent.shape, key=key)) - mel
    sound = mx.mean(mx.abs(error)) + 0.5 * mx.mean(mx.square(error))
    sides = SIDES_WEIGHT * mx.mean(mx.abs(error[..., 0] - error[..., 1]))
    return {"sound": sound, "sides": sides, "size": SMALLNESS * mx.mean(mx.square(latent))}


def spectrogram(waveform: np.ndarray) -> mx.array:
    """(B, samples, 2) at 16 kHz to log-mel (B, T, bins, 2)."""
    return MelSpectrogram.from_config(AudioVaeConfig.from_metadata(CONFIG))(mx.array(waveform))


def mel_batch(number: int) -> mx.array:
    """Pieces of the spectrograms of some scenes."""
    pieces = []
    for seed in range(2_000_000 + BATCH * number, 2_000_000 + BATCH * (number + 1)):
        mel = spectrogram(demo_scenes.play(demo_scenes.make_scene(seed), RATE)[None])
        start = int(np.random.default_rng([seed, 73]).integers(mel.shape[1] - FRAMES + 1))
        pieces.append(mel[:, start : start + FRAMES])
    return mx.concatenate(pieces)


class Pair(NamedTuple):
    """What a vocoder is given and what it is to make of it.

    Attributes:
        counted: the mel frames that count; at the other ones the vocoder knows too little of what is around.
    """

    mel: mx.array
    waveform: mx.array
    counted: slice


class Vocoder(nn.Module):
    """The generator at 16 kHz for one side of the sound, of half the width: :func:`both_sides` makes the whole of it.

    Only what a side's own spectrogram says goes into it, so what the sides differ by is kept without being learnt. The
    extension's generator adds nothing: scenes have nothing above 8 kHz.
    """

    def __init__(self, seed: int = 1):
        super().__init__()
        mx.random.seed(seed)
        whole = VocoderConfig.from_metadata(CONFIG).generator
        half = replace(whole, width=whole.width // 2)
        self.generator = Generator(half)
        # Its ends are made for two sides.
        first = nn.Conv1d(MEL_BINS, half.width, EDGE_KERNEL, padding=EDGE_KERNEL // 2)
        first.bias = -MEL_MEAN * first.weight.sum(axis=(1, 2))  # spectrograms as deviations from their mean
        narrow = half.width // 2 ** len(half.upsample_rates)
        last = nn.Conv1d(narrow, 1, EDGE_KERNEL, padding=EDGE_KERNEL // 2, bias=half.final_bias)
        self.generator.conv_pre, self.generator.conv_post = first, last
        # Filters are those of the published vocoder; everything learns but them.
        for _, layer in self.generator.named_modules():
            if "filter" in layer:
                layer.filter = mx.array(low_pass(), mx.float32).reshape(layer.filter.shape)
                layer.freeze()


def both_sides(vocoder: Vocoder) -> Generator:
    """The generator of stereo sound: the same twice, side by side, with nothing in between."""
    whole = Generator(VocoderConfig.from_metadata(CONFIG).generator)

    def twice(path: str, array: mx.array) -> mx.array:
        if path.endswith("filter"):
            return array
        if array.ndim == 1:
            return mx.concatenate([array, array])
        nothing = mx.zeros_like(array)  # (outputs, taps, inputs)
        left, right = mx.concatenate([array, nothing], axis=-1), mx.concatenate([nothing, array], axis=-1)
        return mx.concatenate([left, right])

    weights = tree_flatten(vocoder.generator.parameters())
    whole.load_weights([(path, twice(path, array)) for path, array in weights])
    return whole


def vocoder_loss(module: Vocoder, pair: Pair, key: mx.array) -> dict[str, mx.array]:
    """Spectra at several resolutions, and the waveform itself, which can be told exactly: see ``demo_scenes``."""
    counted = slice(pair.counted.start * HOP, pair.counted.stop * HOP)
    mel, wanted = (mx.concatenate([array[..., :1], array[..., 1:]]) for array in (pair.mel, pair.waveform))
    made, wanted = module.generator(mel)[:, counted], wanted[:, counted]
    return {"spectral": spectral_loss(made, wanted), "wave": 10 * mx.mean(mx.abs(made - wanted))}


def vocoder_batch(number: int) -> Pair:
    """Pieces of scenes' sound with their spectrograms; in half of them something lands.

    Every third batch has beginnings of scenes, and every third one ends.
    """
    mels, waves = [], []
    place = ("somewhere", "beginning", "end")[number % 3]
    for index in range(VOCODER_BATCH):
        seed = 3_000_000 + VOCODER_BATCH * number + index
        scene = demo_scenes.make_scene(seed, motion="bounce" if index % 2 else None)
        wave = demo_scenes.play(scene, RATE)
        mel = spectrogram(wave[None])
        rng, last = np.random.default_rng([seed, 74]), CLIP_FRAMES - VOCODER_FRAMES
        start = int(rng.integers(last))
        if place != "somewhere":
            start = 0 if place == "beginning" else last
        elif len(scene.landings()):
            before = rng.integers(EDGE + 2, VOCODER_FRAMES - EDGE - 6)
            start = int(np.clip(round(rng.choice(scene.landings()) * RATE / HOP) - before, 0, last))
        mels.append(mel[:, start : start + VOCODER_FRAMES])
        waves.append(wave[None, start * HOP : (start + VOCODER_FRAMES) * HOP])
    counted = slice(0 if place == "beginning" else EDGE, VOCODER_FRAMES if place == "end" else VOCODER_FRAMES - EDGE)
    return Pair(mx.concatenate(mels), mx.array(np.concatenate(waves)), counted)
