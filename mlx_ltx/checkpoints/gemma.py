"""The Gemma 3 text model from a Hugging Face folder or an MLX pack of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_ltx.checkpoints.files import SafetensorsFile, SafetensorsFolder, read_json
from mlx_ltx.checkpoints.keymaps import TEXT_PROJECTION, KeyMap
from mlx_ltx.checkpoints.loading import load_weights
from mlx_ltx.checkpoints.quantize import GEMMA_RULES, Quantization, choose_formats
from mlx_ltx.checkpoints.tokenizer import PromptTokenizer, load_tokenizer
from mlx_ltx.errors import UserError
from mlx_ltx.models.gemma import Gemma, GemmaConfig
from mlx_ltx.models.quantized import WeightFormat

# Published folders and MLX packs; transformers 5; a decoder by itself. The vision tower, its projector and an output
# head stand elsewhere, or are named here: they are left out on purpose, because encoding does not use them.
GEMMA = KeyMap(
    name="Gemma 3 text model",
    roots=("language_model.model.", "model.language_model.", "model."),
    exclude=("vision_tower.", "multi_modal_projector.", "lm_head."),
    unused=(r".*\.rotary_emb\.inv_freq",),
)


class TextModel(NamedTuple):
    """A loaded text model and its tokeniser."""

    model: Gemma
    tokenizer: PromptTokenizer


def load_gemma(folder: Path, dtype: mx.Dtype = mx.bfloat16, quantization: Quantization | None = None) -> TextModel:
    """Load the text decoder of a Gemma 3, lazily, after checking every key and shape.

    Args:
        folder: ``config.json``, ``tokenizer.json`` (with ``tokenizer_config.json``) and the weights, in one file or in
            shards; plain, or quantised by mlx-lm or mlx-vlm (``quantization`` in the config).
        dtype: what plain weights become, and the scales of quantised ones: bfloat16 or float32 (the hidden states of
            Gemma 3 leave float16's range).
        quantization: quantise plain weights while they are read.

    Raises:
        UserError: something is missing, damaged, not a Gemma 3, or does not match its config; or the weights are to be
            quantised and already are.
        ValueError: another dtype.
    """
    if dtype not in (mx.bfloat16, mx.float32):
        raise ValueError(f"the text model runs in bfloat16 or float32, not {dtype}")
    config, metadata = read_gemma_config(folder)
    tokenizer = load_tokenizer(folder, metadata)
    model = Gemma(config)
    formats = choose_formats(model, GEMMA_RULES, quantization) if quantization else None
    load_folder(model, folder, GEMMA, metadata, dtype, formats)
    return TextModel(model, tokenizer)


def load_folder(
    module: nn.Module,
    folder: Path,
    keymap: KeyMap,
    metadata: dict[str, Any],
    dtype: mx.Dtype,
    formats: Mapping[str, WeightFormat] | None = None,
) -> None:
    """Give one network of a Gemma folder its weights, lazily, after checking every key and shape.

    Args:
        module: built from the folder's config; what the folder holds quantised becomes quantised in it.
        keymap: where its tensors stand.
        metadata: the whole ``config.json``.
        dtype: as in :func:`load_gemma`.
        formats: layers to be quantised now, by module path.

    Raises:
        UserError: as :func:`load_gemma`.
    """
    load_weights(
        module, SafetensorsFolder(folder, gemma_quantization(metadata)), keymap, dtype, formats=formats, own_axes=True
    )


def gemma_quantization(metadata: dict[str, Any]) -> dict[str, Any] | None:
    """How a Gemma folder's weights were quantised, from its whole ``config.json``; None for plain weights."""
    return metadata.get("quantization") or metadata.get("quantization_config")


def read_gemma_config(folder: Path) -> tuple[GemmaConfig, dict[str, Any]]:
    """The decoder's config and the whole ``config.json``, without touching the weights.

    Raises:
        UserError: the folder or its config is missing, or it is not a Gemma 3 that is supported.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; the text model is a folder with config.json and its weights")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: config.json is missing, so it is not a text model's folder")
    metadata = read_json(folder / "config.json")
    try:
        return GemmaConfig.from_metadata(metadata), metadata
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'config.json'}: not a Gemma 3 text model that is supported: {error}") from None


def check_text_width(config: GemmaConfig, checkpoint: SafetensorsFile) -> None:
    """Refuse a text model whose hidden states do not fit the text projection of an LTX-2 checkpoint.

    Raises:
        UserError: they do not, or the checkpoint holds no text projection.
    """
    keys = TEXT_PROJECTION.select(checkpoint.tensors)
    widths = {checkpoint.tensors[key].shape[-1] for path, key in keys.items() if path.endswith("weight")}
    given = config.hidden_states * config.hidden_size
    if not widths:
        raise UserError(f"{checkpoint.path}: holds no {TEXT_PROJECTION.name}")
    if widths != {given}:
        raise UserError(
            f"text model of the wrong width: {checkpoint.path} reads {max(widths):,} values per token, this text model "
            f"gives {given:,} ({config.hidden_states} hidden states of {config.hidden_size}); use Gemma 3 12B"
        )
