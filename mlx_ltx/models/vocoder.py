"""Vocoders: from stereo log-mel spectrograms to waveforms (ltx_core/model/audio_vae/vocoder.py).

Two generations share one generator: HiFi-GAN (Kong et al., 2020, https://arxiv.org/abs/2010.05646), and BigVGAN
(https://arxiv.org/abs/2206.04658) at 16 kHz followed by a second generator that adds what lies above 8 kHz.
Weights and arithmetic are float32: bfloat16 weights alone are audible.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_ltx.models.anti_alias import AntiAliasedSnake, SincResampler

CHANNELS = 2
MEL_BINS = 64
MEL_RATE = 16_000 // 160
"""Mel frames per second that the audio autoencoder decodes to."""
LOG_FLOOR = 1e-5
LEAK = 0.1
EDGE_KERNEL = 7
CHUNK_FRAMES = 1000
"""Mel frames that a generator works on at a time."""


@dataclass(frozen=True)
class GeneratorConfig:
    """One stack of upsampling stages.

    Attributes:
        width: channels before the first stage; each stage halves them.
        upsample_rates, upsample_kernels: per stage.
        block_kernels, block_dilations: per residual block; every stage has one of each, and their mean goes on.
        anti_aliased: BigVGAN's anti-aliased SnakeBeta activations; otherwise HiFi-GAN's leaky ReLU.
        final: what bounds the waveform: ``"tanh"``, ``"clip"`` or None.
        final_bias: whether the last convolution has a bias.
    """

    width: int
    upsample_rates: tuple[int, ...]
    upsample_kernels: tuple[int, ...]
    block_kernels: tuple[int, ...]
    block_dilations: tuple[tuple[int, ...], ...]
    anti_aliased: bool
    final: str | None
    final_bias: bool

    @classmethod
    def from_section(cls, section: dict[str, Any], final_activation: bool = True) -> GeneratorConfig:
        """Read one generator's flat dict; what is absent has HiFi-GAN's values, as in the reference."""
        anti_aliased = section.get("resblock", "1") == "AMP1"
        if not anti_aliased:
            _require(section, "resblock", "1", "1")
        else:
            _require(section, "activation", None, "snakebeta")
        _require(section, "stereo", None, True)
        _require(section, "apply_final_activation", final_activation, final_activation)
        config = cls(
            width=section.get("upsample_initial_channel", 1024),
            upsample_rates=tuple(section.get("upsample_rates", (6, 5, 2, 2, 2))),
            upsample_kernels=tuple(section.get("upsample_kernel_sizes", (16, 15, 8, 4, 4))),
            block_kernels=tuple(section.get("resblock_kernel_sizes", (3, 7, 11))),
            block_dilations=tuple(tuple(d) for d in section.get("resblock_dilation_sizes", [[1, 3, 5]] * 3)),
            anti_aliased=anti_aliased,
            final=None if not final_activation else "tanh" if section.get("use_tanh_at_final", True) else "clip",
            final_bias=section.get("use_bias_at_final", True),
        )
        if len(config.upsample_rates) != len(config.upsample_kernels):
            raise ValueError(f"vocoder config upsample_kernel_sizes={list(config.upsample_kernels)}: one per stage")
        for rate, kernel in zip(config.upsample_rates, config.upsample_kernels, strict=True):
            if kernel < rate or (kernel - rate) % 2:
                raise ValueError(f"vocoder config upsample_kernel_sizes={kernel} is not supported for rate {rate}")
        if len(config.block_kernels) != len(config.block_dilations) or any(k % 2 == 0 for k in config.block_kernels):
            raise ValueError(f"vocoder config resblock_kernel_sizes={list(config.block_kernels)} is not supported")
        if config.width % 2 ** len(config.upsample_rates):
            raise ValueError(f"vocoder config upsample_initial_channel={config.width} cannot be halved per stage")
        return config

    @property
    def factor(self) -> int:
        """Output samples per mel frame."""
        return math.prod(self.upsample_rates)

    @property
    def reach(self) -> int:
        """Mel frames to each side that an output sample can depend on, edges of the signal aside."""
        activation = AntiAliasedSnake.REACH if self.anti_aliased else 0
        reach = EDGE_KERNEL // 2 + activation
        for rate, kernel in zip(reversed(self.upsample_rates), reversed(self.upsample_kernels), strict=True):
            reach += max(
                sum((size // 2) * (dilation + 1) + 2 * activation for dilation in dilations)
                for size, dilations in zip(self.block_kernels, self.block_dilations, strict=True)
            )
            reach = math.ceil((reach + kernel) / rate)
        return reach + EDGE_KERNEL // 2


@dataclass(frozen=True)
class ExtensionConfig:
    """The bandwidth extension: a log-mel analysis of the low-rate waveform and a generator for what is missing.

    Attributes:
        generator: from that mel spectrogram to a residual at the output rate.
        ratio: output samples per input sample.
        hop_length, n_fft: of the analysis, in input samples.
    """

    generator: GeneratorConfig
    ratio: int
    hop_length: int
    n_fft: int


@dataclass(frozen=True)
class VocoderConfig:
    """A vocoder of either generation.

    Attributes:
        generator: from mel spectrograms to waveforms.
        extension: of the generator's bandwidth, or None.
        sample_rate: of the waveforms that the whole vocoder gives, in Hz.
    """

    generator: GeneratorConfig
    extension: ExtensionConfig | None
    sample_rate: int

    @classmethod
    def from_metadata(cls, config: dict[str, Any]) -> VocoderConfig:
        """Read the ``vocoder`` section of a checkpoint's config, flat (HiFi-GAN) or nested (with ``bwe``).

        Raises:
            ValueError: the section is missing or asks for something that is not implemented; the message names it.
        """
        if "vocoder" not in config:
            raise ValueError("the config has no vocoder section")
        section = config["vocoder"]
        if "bwe" not in section:
            _require(section, "resblock", None, "1")
            generator = GeneratorConfig.from_section(section)
            rate = MEL_RATE * generator.factor
            _require(section, "output_sampling_rate", rate, rate)
            return cls(generator, None, rate)

        bwe = section["bwe"]
        for part in (section.get("vocoder", {}), bwe):
            _require(part, "resblock", None, "AMP1")
        generator = GeneratorConfig.from_section(section["vocoder"])
        residual = GeneratorConfig.from_section(bwe, final_activation=False)
        low_rate = MEL_RATE * generator.factor
        _require(bwe, "input_sampling_rate", None, low_rate)
        _require(bwe, "num_mels", None, MEL_BINS)
        _require(bwe, "win_size", bwe["n_fft"], bwe["n_fft"])
        ratio, rest = divmod(residual.factor, bwe["hop_length"])
        if rest or bwe["hop_length"] > bwe["n_fft"]:
            raise ValueError(f"vocoder config hop_length={bwe['hop_length']} is not supported")
        _require(bwe, "output_sampling_rate", None, low_rate * ratio)
        return cls(generator, ExtensionConfig(residual, ratio, bwe["hop_length"], bwe["n_fft"]), low_rate * ratio)


def build_vocoder(config: VocoderConfig) -> Generator | ExtendedVocoder:
    """The module that ``config`` describes; load its weights as float32.

    Both kinds map float32 mel spectrograms (B, T, 64, 2) to waveforms (B, samples, 2) in [-1, 1].
    """
    if config.extension is None:
        return Generator(config.generator)
    return ExtendedVocoder(config.generator, config.extension)


class DilatedConv1d(nn.Conv1d):
    """A convolution that keeps the length, over samples ``spacing`` apart.

    MLX's own dilation is hundreds of times slower on the CPU backend. Taking every ``spacing``-th sample into a
    sequence of its own makes it a plain convolution; zero padding and result are the same.
    """

    def __init__(self, channels: int, kernel: int, spacing: int = 1):
        super().__init__(channels, channels, kernel, padding=kernel // 2)
        self.spacing = spacing

    def __call__(self, x: mx.array) -> mx.array:
        if self.spacing == 1:
            return super().__call__(x)
        B, T, C = x.shape
        x = mx.pad(x, [(0, 0), (0, -T % self.spacing), (0, 0)])
        x = x.reshape(B, -1, self.spacing, C).transpose(0, 2, 1, 3).reshape(B * self.spacing, -1, C)
        x = super().__call__(x)
        return x.reshape(B, self.spacing, -1, C).transpose(0, 2, 1, 3).reshape(B, -1, C)[:, :T]


class Upsample(nn.ConvTranspose1d):
    """A transposed convolution that makes exactly ``rate`` samples of one.

    Each of the ``rate`` output phases is a plain convolution with every ``rate``-th tap, so all of them are one
    convolution with ``rate`` times the channels; MLX's own is 30 to 50 times slower on the CPU backend.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, rate: int):
        super().__init__(in_channels, out_channels, kernel, stride=rate, padding=(kernel - rate) // 2)
        self.rate = rate

    def __call__(self, x: mx.array) -> mx.array:
        B, T, _ = x.shape
        out, kernel, channels = self.weight.shape
        crop = (kernel - self.rate) // 2
        # y[rate * q + phase] = sum over i of x[q - i] w[phase + crop + rate * i], for i from -side to side.
        side = (crop + self.rate - 1) // self.rate
        taps = 2 * side + 1
        front = side * self.rate - crop
        weight = mx.pad(self.weight, [(0, 0), (front, taps * self.rate - kernel - front), (0, 0)])
        weight = weight.reshape(out, taps, self.rate, channels)[:, ::-1].transpose(2, 0, 1, 3)
        x = mx.conv1d(x, weight.reshape(self.rate * out, taps, channels), padding=side)
        return x.reshape(B, T * self.rate, out) + self.bias


class ResidualBlock(nn.Module):
    """Pairs of an activation and a convolution, twice; dilated first, plain second."""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...], anti_aliased: bool):
        super().__init__()
        self.convs1 = [DilatedConv1d(channels, kernel, dilation) for dilation in dilations]
        self.convs2 = [DilatedConv1d(channels, kernel) for _ in dilations]
        if anti_aliased:
            self.acts1 = [AntiAliasedSnake(channels) for _ in dilations]
            self.acts2 = [AntiAliasedSnake(channels) for _ in dilations]

    def __call__(self, x: mx.array) -> mx.array:
        for index, (conv1, conv2) in enumerate(zip(self.convs1, self.convs2, strict=True)):
            if "acts1" in self:
                h = conv1(self.acts1[index](x))
                h = conv2(self.acts2[index](h))
            else:
                h = conv1(nn.leaky_relu(x, LEAK))
                h = conv2(nn.leaky_relu(h, LEAK))
            x = x + h
        return x


class Generator(nn.Module):
    """Upsampling stages, each a transposed convolution and the mean of residual blocks with different kernels."""

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self._config = config
        widths = [config.width // 2**stage for stage in range(len(config.upsample_rates) + 1)]
        self.conv_pre = nn.Conv1d(CHANNELS * MEL_BINS, config.width, EDGE_KERNEL, padding=EDGE_KERNEL // 2)
        self.ups = [
            Upsample(*sizes)
            for sizes in zip(widths, widths[1:], config.upsample_kernels, config.upsample_rates, strict=False)
        ]
        self.resblocks = [
            ResidualBlock(width, kernel, dilations, config.anti_aliased)
            for width in widths[1:]
            for kernel, dilations in zip(config.block_kernels, config.block_dilations, strict=True)
        ]
        if config.anti_aliased:
            self.act_post = AntiAliasedSnake(widths[-1])
        self.conv_post = nn.Conv1d(widths[-1], CHANNELS, EDGE_KERNEL, padding=EDGE_KERNEL // 2, bias=config.final_bias)

    def __call__(self, mel: mx.array) -> mx.array:
        """Mel spectrogram (B, T, 64, 2) to float32 waveform (B, T * factor, 2), in chunks of bounded memory.

        An output sample depends on finitely many mel frames, so a chunk with that many neighbours gives what the whole
        would. Chunks are evaluated here.

        Raises:
            ValueError: the weights are not float32.
        """
        if self.conv_pre.weight.dtype != mx.float32:
            raise ValueError(f"vocoder weights must be float32, not {self.conv_pre.weight.dtype}")
        B, T, bins, channels = mel.shape
        # Channels come first: all bins of the left channel, then all of the right.
        x = mel.astype(mx.float32).transpose(0, 1, 3, 2).reshape(B, T, channels * bins)
        reach, factor = self._config.reach, self._config.factor
        pieces = []
        for start in range(0, T, CHUNK_FRAMES):
            stop = min(T, start + CHUNK_FRAMES)
            first = max(0, start - reach)
            piece = self._generate(x[:, first : stop + reach])
            piece = piece[:, (start - first) * factor : (stop - first) * factor]
            mx.eval(piece)
            pieces.append(piece)
        return mx.concatenate(pieces, axis=1)

    def _generate(self, x: mx.array) -> mx.array:
        config = self._config
        blocks = len(config.block_kernels)
        x = self.conv_pre(x)
        for stage, upsample in enumerate(self.ups):
            x = upsample(x if config.anti_aliased else nn.leaky_relu(x, LEAK))
            outputs = [block(x) for block in self.resblocks[stage * blocks : (stage + 1) * blocks]]
            x = mx.mean(mx.stack(outputs), axis=0)
            # One stage per submission keeps GPU command buffers short for the macOS watchdog.
            mx.eval(x)
        x = self.conv_post(self.act_post(x) if config.anti_aliased else nn.leaky_relu(x))
        if config.final == "tanh":
            return mx.tanh(x)
        return mx.clip(x, -1, 1) if config.final == "clip" else x


class FourierBasis(nn.Module):
    """The published analysis basis: real rows, then imaginary rows, each with its window, (2 bins, 1, n_fft)."""

    def __init__(self, n_fft: int):
        super().__init__()
        self.forward_basis = mx.zeros((2 * (n_fft // 2 + 1), 1, n_fft))


class CausalMel(nn.Module):
    """Log-mel analysis that sees no future samples, with bases from the checkpoint."""

    def __init__(self, n_fft: int, hop_length: int):
        super().__init__()
        self.n_fft, self.hop_length = n_fft, hop_length
        self.mel_basis = mx.zeros((MEL_BINS, n_fft // 2 + 1))
        self.stft_fn = FourierBasis(n_fft)

    def __call__(self, waveform: mx.array) -> mx.array:
        """Waveform (B, samples, C), a multiple of the hop long, to (B, samples / hop, 64, C)."""
        B, samples, C = waveform.shape
        history = self.n_fft - self.hop_length
        x = mx.pad(waveform.transpose(0, 2, 1), [(0, 0), (0, 0), (history, 0)]).reshape(B * C, history + samples)
        T = samples // self.hop_length
        frames = mx.as_strided(x, (B * C, T, self.n_fft), (history + samples, self.hop_length, 1))
        real, imaginary = mx.split(frames @ self.stft_fn.forward_basis[:, 0].T, 2, axis=-1)
        magnitude = mx.sqrt(mx.square(real) + mx.square(imaginary))
        mel = mx.log(mx.maximum(magnitude @ self.mel_basis.T, LOG_FLOOR))
        return mel.reshape(B, C, T, MEL_BINS).transpose(0, 2, 3, 1)


class ExtendedVocoder(nn.Module):
    """A generator at a low rate, and the extension of its waveform to a higher one.

    The waveform is resampled and a second generator, which hears its mel spectrogram, adds the missing band.
    """

    def __init__(self, generator: GeneratorConfig, extension: ExtensionConfig):
        super().__init__()
        self.vocoder = Generator(generator)
        self.bwe_generator = Generator(extension.generator)
        self.mel_stft = CausalMel(extension.n_fft, extension.hop_length)
        self.resampler = SincResampler(extension.ratio)

    def __call__(self, mel: mx.array) -> mx.array:
        """Mel spectrogram (B, T, 64, 2) to float32 waveform (B, samples, 2) in [-1, 1] at the output rate."""
        low = self.vocoder(mel)
        samples = low.shape[1]
        low = mx.pad(low, [(0, 0), (0, -samples % self.mel_stft.hop_length), (0, 0)])
        residual = self.bwe_generator(self.mel_stft(low))
        return mx.clip(residual + self.resampler(low), -1, 1)[:, : samples * self.resampler.ratio]


def _require(section: dict[str, Any], key: str, absent: Any, required: Any) -> None:
    """Raise ValueError unless ``key`` is ``required``; ``absent`` is what a missing key means."""
    value = section.get(key, absent)
    if value != required:
        raise ValueError(f"vocoder config {key}={value!r} is not supported, only {required!r}")
