"""From a checkpoint file to each network, one function per network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import mlx.core as mx

from mlx_ltx.checkpoints import keymaps
from mlx_ltx.checkpoints.files import SafetensorsFile
from mlx_ltx.checkpoints.loading import load_weights
from mlx_ltx.errors import UserError
from mlx_ltx.models.transformer import Transformer, TransformerConfig

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
    file: SafetensorsFile, dtype: mx.Dtype | None = mx.bfloat16, video: bool = True, audio: bool = True
) -> Transformer:
    """The transformer, or only one of its streams."""
    config = read_config(file, lambda values: TransformerConfig.from_metadata(values, video=video, audio=audio))
    skip: tuple[str, ...] = ()
    if not (video and audio):
        skip = (*(() if video else VIDEO_PARTS), *(() if audio else AUDIO_PARTS), *CROSS_PARTS)
    return load_weights(Transformer(config), file, keymaps.TRANSFORMER, dtype, skip)
