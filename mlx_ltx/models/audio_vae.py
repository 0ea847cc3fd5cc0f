"""The audio autoencoder: between log-mel spectrograms and audio latents (ltx_core/model/audio_vae/).

A causal 2-D convolutional network over (time, mel bin). Four mel frames and four bins become one latent position, the
first mel frame alone makes the first latent frame: ``T = 4 A - 3``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_ltx.models.attention import rms_norm
from mlx_ltx.models.statistics import ChannelStatistics

DOWNSAMPLING = 4

# Keys of ``audio_vae.model.params.ddconfig``: the only value that is implemented, and what the reference assumes when
# the key is absent.
REQUIRED: dict[str, tuple[Any, Any]] = {
    "double_z": (True, True),
    "norm_type": ("pixel", "pixel"),
    "causality_axis": ("height", "height"),
    "attn_resolutions": ([], [8, 16, 32]),
    "mid_block_add_attention": (False, True),
    "resamp_with_conv": (True, True),
}


@dataclass(frozen=True)
class AudioVaeConfig:
    """Sizes of the audio autoencoder and of the mel spectrograms that it reads.

    Attributes:
        channels: width at full resolution; ``multipliers`` gives the width of each of the three levels over it.
        blocks: residual blocks per level of the encoder; the decoder has one more.
        z_channels: latent channels.
        audio_channels: channels of the waveform and of the spectrogram.
        mel_bins: bins of the spectrogram.
        sampling_rate: of the waveform that the spectrogram is made from, in Hz.
        hop_length: samples from one mel frame to the next.
        n_fft: samples that one mel frame sees.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4)
    blocks: int = 2
    z_channels: int = 8
    audio_channels: int = 2
    mel_bins: int = 64
    sampling_rate: int = 16_000
    hop_length: int = 160
    n_fft: int = 1024

    @classmethod
    def from_metadata(cls, config: dict[str, Any]) -> AudioVaeConfig:
        """Read the ``audio_vae`` section of a checkpoint's config.

        Raises:
            ValueError: the section is missing or asks for something that is not implemented; the message names it.
        """
        if "audio_vae" not in config:
            raise ValueError("the config has no audio_vae section")
        section = config["audio_vae"]
        params = section.get("model", {}).get("params", {})
        network = params.get("ddconfig", {})
        preprocessing = section.get("preprocessing", {})
        stft, mel = preprocessing.get("stft", {}), preprocessing.get("mel", {})
        for key, (required, absent) in REQUIRED.items():
            _require(key, network.get(key, absent), required)

        audio_channels = network.get("in_channels", cls.audio_channels)
        _require("out_ch", network.get("out_ch", audio_channels), audio_channels)
        multipliers = tuple(network.get("ch_mult", cls.multipliers))
        if len(multipliers) != 3:
            raise ValueError(f"audio_vae config ch_mult={list(multipliers)} is not supported, only three levels")
        mel_bins = network.get("mel_bins") or mel.get("n_mel_channels") or cls.mel_bins
        if mel_bins % DOWNSAMPLING:
            raise ValueError(f"audio_vae config mel_bins={mel_bins} is not supported, only multiples of {DOWNSAMPLING}")

        sampling_rate = params.get("sampling_rate", cls.sampling_rate)
        n_fft = stft.get("filter_length", cls.n_fft)
        _require("causal", stft.get("causal", True), True)
        _require("win_length", stft.get("win_length", n_fft), n_fft)
        _require("n_mel_channels", mel.get("n_mel_channels", mel_bins), mel_bins)
        _require("mel_fmin", mel.get("mel_fmin", 0), 0)
        _require("mel_fmax", mel.get("mel_fmax", sampling_rate / 2), sampling_rate / 2)
        _require("sampling_rate", preprocessing.get("audio", {}).get("sampling_rate", sampling_rate), sampling_rate)
        return cls(
            channels=network.get("ch", cls.channels),
            multipliers=multipliers,
            blocks=network.get("num_res_blocks", cls.blocks),
            z_channels=network.get("z_channels", cls.z_channels),
            audio_channels=audio_channels,
            mel_bins=mel_bins,
            sampling_rate=sampling_rate,
            hop_length=stft.get("hop_length", cls.hop_length),
            n_fft=n_fft,
        )

    @property
    def widths(self) -> list[int]:
        """Channels of each level, full resolution first."""
        return [self.channels * multiplier for multiplier in self.multipliers]

    @property
    def latent_bins(self) -> int:
        return self.mel_bins // DOWNSAMPLING

    @property
    def latents_per_second(self) -> float:
        return self.sampling_rate / self.hop_length / DOWNSAMPLING


class CausalConv2d(nn.Module):
    """A square convolution over (time, bin) whose zero padding lies before the first frame and around the bins."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel)
        self.history = kernel - 1

    def __call__(self, x: mx.array) -> mx.array:
        side = self.history // 2
        return self.conv(mx.pad(x, [(0, 0), (self.history, 0), (side, self.history - side), (0, 0)]))


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice, beside a 1×1 convolution if the width changes."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv1 = CausalConv2d(in_channels, out_channels)
        self.conv2 = CausalConv2d(out_channels, out_channels)
        if in_channels != out_channels:
            self.nin_shortcut = CausalConv2d(in_channels, out_channels, kernel=1)

    def __call__(self, x: mx.array) -> mx.array:
        h = self.conv1(nn.silu(rms_norm(x)))
        h = self.conv2(nn.silu(rms_norm(h)))
        if "nin_shortcut" in self:
            x = self.nin_shortcut(x)
        return x + h


class Downsample(nn.Module):
    """Half the frames (rounded up) and half the bins; the padding is causal in time and behind the last bin."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def __call__(self, x: mx.array) -> mx.array:
        return self.conv(mx.pad(x, [(0, 0), (2, 0), (0, 1), (0, 0)]))


class Upsample(nn.Module):
    """Every frame and bin twice, a causal convolution, and the first frame dropped: T becomes 2 T - 1."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = CausalConv2d(channels, channels)

    def __call__(self, x: mx.array) -> mx.array:
        return self.conv(mx.repeat(mx.repeat(x, 2, axis=1), 2, axis=2))[:, 1:]


class Level(nn.Module):
    """The residual blocks of one resolution, then the step to the next one (none after the last)."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int):
        super().__init__()
        self.block = [ResidualBlock(in_channels if i == 0 else out_channels, out_channels) for i in range(blocks)]

    def __call__(self, x: mx.array) -> mx.array:
        for block in self.block:
            x = block(x)
        if "downsample" in self:
            x = self.downsample(x)
        if "upsample" in self:
            x = self.upsample(x)
        return x


class Middle(nn.Module):
    """Two residual blocks at the lowest resolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.block_2 = ResidualBlock(channels, channels)

    def __call__(self, x: mx.array) -> mx.array:
        return self.block_2(self.block_1(x))


class AudioEncoder(nn.Module):
    """From log-mel spectrograms to normalised latents."""

    def __init__(self, config: AudioVaeConfig):
        super().__init__()
        widths = config.widths
        self.z_channels = config.z_channels
        self.statistics = ChannelStatistics(config.z_channels * config.latent_bins)
        self.conv_in = CausalConv2d(config.audio_channels, config.channels)
        self.down = [
            Level(before, width, config.blocks)
            for before, width in zip([config.channels, *widths], widths, strict=False)
        ]
        for level in self.down[:-1]:
            level.downsample = Downsample(level.block[-1].conv2.conv.weight.shape[0])
        self.mid = Middle(widths[-1])
        # The network predicts a mean and a log-variance; only the mean is used.
        self.conv_out = CausalConv2d(widths[-1], 2 * config.z_channels)

    def __call__(self, mel: mx.array) -> mx.array:
        """Encode (B, T, mel bins, audio channels) to (B, ceil(T / 4), latent bins, z_channels), in the same dtype."""
        x = self.conv_in(mel)
        for level in self.down:
            x = level(x)
        x = self.conv_out(nn.silu(rms_norm(self.mid(x))))
        return _from_tokens(self.statistics.normalize(_to_tokens(x[..., : self.z_channels])), self.z_channels)


class AudioDecoder(nn.Module):
    """From normalised latents to log-mel spectrograms."""

    def __init__(self, config: AudioVaeConfig):
        super().__init__()
        widths = config.widths
        self.z_channels = config.z_channels
        self.statistics = ChannelStatistics(config.z_channels * config.latent_bins)
        self.conv_in = CausalConv2d(config.z_channels, widths[-1])
        self.mid = Middle(widths[-1])
        # Level 0 is the full resolution, so the levels run in reverse.
        self.up = [
            Level(before, width, config.blocks + 1)
            for before, width in zip([*widths[1:], widths[-1]], widths, strict=True)
        ]
        for level, width in zip(self.up[1:], widths[1:], strict=True):
            level.upsample = Upsample(width)
        self.conv_out = CausalConv2d(widths[0], config.audio_channels)

    def __call__(self, latent: mx.array) -> mx.array:
        """Decode (B, A, latent bins, z_channels) to (B, 4 A - 3, mel bins, audio channels), in the same dtype."""
        x = _from_tokens(self.statistics.denormalize(_to_tokens(latent)), self.z_channels)
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(nn.silu(rms_norm(x)))


def _to_tokens(latent: mx.array) -> mx.array:
    """(B, A, F, Z) to (B, A, Z F): the statistics run channel by channel, bins within a channel."""
    B, A, F, Z = latent.shape
    return latent.transpose(0, 1, 3, 2).reshape(B, A, Z * F)


def _from_tokens(tokens: mx.array, z_channels: int) -> mx.array:
    B, A, _ = tokens.shape
    return tokens.reshape(B, A, z_channels, -1).transpose(0, 1, 3, 2)


def _require(key: str, value: Any, required: Any) -> None:
    if value != required:
        raise ValueError(f"audio_vae config {key}={value!r} is not supported, only {required!r}")
