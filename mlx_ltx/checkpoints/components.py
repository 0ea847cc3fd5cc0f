"""From a checkpoint file to each network, one function per network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn

from mlx_ltx.checkpoints import keymaps
from mlx_ltx.checkpoints.files import SafetensorsFile
from mlx_ltx.checkpoints.loading import load_weights
from mlx_ltx.checkpoints.quantize import Quantization, choose_formats, transformer_rules
from mlx_ltx.errors import UserError
from mlx_ltx.models.audio_vae import AudioDecoder, AudioEncoder, AudioVaeConfig
from mlx_ltx.models.connectors import TextConnectors
from mlx_ltx.models.gemma import GemmaConfig
from mlx_ltx.models.statistics import ChannelStatistics
from mlx_ltx.models.text_features import FeatureConfig, FeatureExtractor
from mlx_ltx.models.transformer import Transformer
from mlx_ltx.models.transformer_config import TransformerConfig
from mlx_ltx.models.upsampler import LatentUpsampler, UpsamplerConfig
from mlx_ltx.models.video_vae import VideoDecoder, VideoEncoder, VideoVaeConfig
from mlx_ltx.models.vocoder import VocoderConfig, build_vocoder

Config = TypeVar("Config")

# What a transformer of one stream leaves out: the other stream, and everything between the two.
VIDEO_PARTS = (r"video\.", r"blocks\.\d+\.video\.")
AUDIO_PARTS = (r"audio\.", r"blocks\.\d+\.audio\.")
CROSS_PARTS = (r"(blocks\.\d+\.)?(video|audio)\.cross_",)


def read_config(file: SafetensorsFile, parse: Callable[[dict[str, Any]], Config]) -> Config:
    """Parse the config that ``file`` carries.

    Raises:
        UserError: the file has no config, or one that asks for something this package does not do.
    """
    try:
        return parse(file.config)
    except (ValueError, KeyError, TypeError) as error:
        detail = f"missing {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{file.path}: {detail}") from None


def load_transformer(
    file: SafetensorsFile,
    dtype: mx.Dtype | None = mx.bfloat16,
    video: bool = True,
    audio: bool = True,
    quantization: Quantization | None = None,
) -> Transformer:
    """The transformer, or only one of its streams; ``quantization`` quantises plain weights while they are read."""
    config = read_config(file, lambda values: TransformerConfig.from_metadata(values, video=video, audio=audio))
    model = Transformer(config)
    formats = choose_formats(model, transformer_rules(config.layers), quantization) if quantization else None
    return load_weights(model, file, keymaps.TRANSFORMER, dtype, left_out(config), formats)


def left_out(config: TransformerConfig) -> tuple[str, ...]:
    """Regular expressions of the module paths that a transformer of one stream lacks; nothing for both streams."""
    if config.video and config.audio:
        return ()
    return (*(() if config.video else VIDEO_PARTS), *(() if config.audio else AUDIO_PARTS), *CROSS_PARTS)


def load_text_features(file: SafetensorsFile, gemma: GemmaConfig, dtype: mx.Dtype) -> FeatureExtractor:
    """The projection of the text model's hidden states."""
    config = read_config(
        file, lambda values: FeatureConfig.from_metadata(values, gemma.hidden_size, gemma.hidden_states)
    )
    return load_weights(FeatureExtractor(config), file, keymaps.TEXT_PROJECTION, dtype)


def load_connectors(file: SafetensorsFile, dtype: mx.Dtype) -> TextConnectors:
    """The connectors that turn text features into what the transformer attends to."""
    return load_weights(read_config(file, TextConnectors.from_metadata), file, keymaps.CONNECTORS, dtype)


def load_video_encoder(file: SafetensorsFile, dtype: mx.Dtype) -> VideoEncoder:
    config = read_config(file, VideoVaeConfig.from_metadata)
    return load_weights(VideoEncoder(config), file, keymaps.VIDEO_ENCODER, dtype)


def load_video_decoder(file: SafetensorsFile, dtype: mx.Dtype) -> VideoDecoder:
    config = read_config(file, VideoVaeConfig.from_metadata)
    return load_weights(VideoDecoder(config), file, keymaps.VIDEO_DECODER, dtype)


def load_audio_encoder(file: SafetensorsFile, dtype: mx.Dtype) -> AudioEncoder:
    config = read_config(file, AudioVaeConfig.from_metadata)
    return load_weights(AudioEncoder(config), file, keymaps.AUDIO_ENCODER, dtype)


def load_audio_decoder(file: SafetensorsFile, dtype: mx.Dtype) -> AudioDecoder:
    config = read_config(file, AudioVaeConfig.from_metadata)
    return load_weights(AudioDecoder(config), file, keymaps.AUDIO_DECODER, dtype)


def load_vocoder(file: SafetensorsFile) -> tuple[nn.Module, VocoderConfig]:
    """The vocoder, always in float32: in bfloat16 its sound is audibly wrong."""
    config = read_config(file, VocoderConfig.from_metadata)
    return load_weights(build_vocoder(config), file, keymaps.VOCODER, mx.float32), config


def load_upsampler(file: SafetensorsFile, dtype: mx.Dtype) -> LatentUpsampler:
    config = read_config(file, UpsamplerConfig.from_metadata)
    return load_weights(LatentUpsampler(config), file, keymaps.UPSAMPLER, dtype)


def load_statistics(file: SafetensorsFile, channels: int) -> ChannelStatistics:
    """The video latent's statistics alone, which the upsamplers work between."""
    return load_weights(ChannelStatistics(channels), file, keymaps.VIDEO_STATISTICS, mx.float32)
