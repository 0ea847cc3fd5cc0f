"""The Gemma 3 text model from a Hugging Face folder or an MLX pack of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_ltx.checkpoints.files import SafetensorsFile
from mlx_ltx.checkpoints.keymaps import TEXT_PROJECTION, KeyMap
from mlx_ltx.checkpoints.loading import check_tensors, parameter_axes, published_shapes
from mlx_ltx.checkpoints.tokenizer import PromptTokenizer, load_tokenizer, read_json
from mlx_ltx.errors import UserError
from mlx_ltx.models.gemma import Gemma, GemmaConfig

# Published folders and MLX packs; transformers 5; a decoder by itself. The vision tower, its projector and an output
# head stand elsewhere, or are named here: they are left out on purpose, because encoding does not use them.
GEMMA = KeyMap(
    name="Gemma 3 text model",
    roots=("language_model.model.", "model.language_model.", "model."),
    exclude=("vision_tower.", "multi_modal_projector.", "lm_head."),
    unused=(r".*\.rotary_emb\.inv_freq",),
)
INDEX = "model.safetensors.index.json"
PLAIN = ("F32", "F16", "BF16")
PACKED = ("U32", "U8")
QUANTISED = (nn.QuantizedLinear, nn.QuantizedEmbedding)


class TextModel(NamedTuple):
    """A loaded text model and its tokeniser."""

    model: Gemma
    tokenizer: PromptTokenizer


def load_gemma(folder: Path, dtype: mx.Dtype = mx.bfloat16) -> TextModel:
    """Load the text decoder of a Gemma 3, lazily, after checking every key and shape.

    Args:
        folder: ``config.json``, ``tokenizer.json`` (with ``tokenizer_config.json``) and the weights, in one file or in
            shards; plain, or quantised by mlx-lm or mlx-vlm (``quantization`` in the config).
        dtype: what plain weights become, and the scales of quantised ones: bfloat16 or float32 (the hidden states of
            Gemma 3 leave float16's range).

    Raises:
        UserError: something is missing, damaged, not a Gemma 3, or does not match its config.
        ValueError: another dtype.
    """
    if dtype not in (mx.bfloat16, mx.float32):
        raise ValueError(f"the text model runs in bfloat16 or float32, not {dtype}")
    config, metadata = read_gemma_config(folder)
    tokenizer = load_tokenizer(folder, metadata)
    model = Gemma(config)
    load_folder(model, folder, GEMMA, metadata, dtype)
    return TextModel(model, tokenizer)


def load_folder(module: nn.Module, folder: Path, keymap: KeyMap, metadata: dict[str, Any], dtype: mx.Dtype) -> None:
    """Give one network of a Gemma folder its weights, lazily, after checking every key and shape.

    Args:
        module: built from the folder's config; what the folder holds quantised becomes quantised in it.
        keymap: where its tensors stand.
        metadata: the whole ``config.json``.
        dtype: as in :func:`load_gemma`.

    Raises:
        UserError: as :func:`load_gemma`.
    """
    tensors = folder_tensors(folder)
    keys = keymap.select(tensors)
    _quantize(module, keys, metadata.get("quantization") or metadata.get("quantization_config"), folder)
    axes = parameter_axes(module)
    shapes = published_shapes(module)
    infos = {path: tensors[key].tensors[key] for path, key in keys.items()}
    for path, info in infos.items():
        order = axes.get(path)
        # MLX packs hold convolutions as MLX has them; channels (3) and kernels (14) cannot be taken for each other
        if order is not None and len(info.shape) == len(order) and info.shape != shapes[path]:
            infos[path] = replace(info, shape=tuple(info.shape[order.index(axis)] for axis in range(len(order))))
            axes[path] = None
    check_tensors(module, infos, str(folder), keymap.name)
    quantised = {path for path, part in module.named_modules() if isinstance(part, QUANTISED)}
    weights = []
    for path, key in keys.items():
        kind = infos[path].dtype
        if kind not in PLAIN + PACKED or (kind in PACKED and path.rpartition(".")[0] not in quantised):
            raise UserError(f"{tensors[key].path}: tensor {key} is {kind}; this layout is not supported")
        array, order = tensors[key].arrays[key], axes[path]
        array = array if order is None else array.transpose(order)
        weights.append((path, array.astype(dtype) if kind in PLAIN else array))
    module.load_weights(weights, strict=True)
    module.eval()


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


def folder_tensors(folder: Path) -> dict[str, SafetensorsFile]:
    """For every tensor of a folder, the file that holds it: a shard that the index names, or the single file.

    Raises:
        UserError: a file is missing or damaged, or there are several and no index.
    """
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise UserError(f"{folder / INDEX}: holds no weight_map; download it again")
        names = sorted(set(index.values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{folder}: {len(missing)} of {len(names)} shards are missing, first {missing[0]}")
    else:
        names = sorted(path.name for path in folder.glob("model*.safetensors"))
        if not names:
            raise UserError(f"{folder}: holds no weights (model.safetensors, or shards and {INDEX})")
        if len(names) > 1:
            raise UserError(f"{folder}: holds {len(names)} weight files but no {INDEX}; download it")
    files = [SafetensorsFile(folder / name) for name in names]
    return {key: file for file in files for key in file.tensors}


def _quantize(model: nn.Module, keys: dict[str, str], settings: dict[str, Any] | None, folder: Path) -> None:
    """Make those modules quantised whose scales are in the files, by the config's settings and its exceptions."""
    packed = {path[: -len(".scales")]: key[: -len(".scales")] for path, key in keys.items() if path.endswith(".scales")}
    if not packed:
        return
    if not settings or "bits" not in settings:
        raise UserError(f"{folder}: the weights are quantised but config.json has no quantization with its bits")
    defaults: dict[str, Any] = {name: settings[name] for name in ("group_size", "bits", "mode") if name in settings}

    def choose(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if path not in packed or not hasattr(module, "to_quantized"):
            return False
        own = settings.get(packed[path])
        return own if isinstance(own, dict) else defaults

    try:
        nn.quantize(model, class_predicate=choose)
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder / 'config.json'}: quantization is not supported: {error}") from None
