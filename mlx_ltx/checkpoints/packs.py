"""Saved packs: a whole checkpoint in a folder, its transformer quantised, in the manner of mlx-lm's packs.

A pack is ``config.json`` (the metadata of the checkpoint that it was made from, and ``quantization`` with its
exceptions by key), shards of at most 5 GB, and their index. Tensors keep their published names and axes; a quantised
``X.weight`` is accompanied by ``X.scales`` and, in affine formats, ``X.biases``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_ltx.checkpoints.components import read_config
from mlx_ltx.checkpoints.files import INDEX, SafetensorsFile, SafetensorsFolder, read_json
from mlx_ltx.checkpoints.keymaps import TRANSFORMER
from mlx_ltx.checkpoints.loading import FP8, match_network, read_array
from mlx_ltx.checkpoints.quantize import Quantization, choose_formats, transformer_rules
from mlx_ltx.checkpoints.recognise import what_else
from mlx_ltx.checkpoints.writing import KINDS, write_array, write_header
from mlx_ltx.errors import UserError
from mlx_ltx.media.atomic import atomic_folder, check_output_folder
from mlx_ltx.models.quantized import WeightFormat
from mlx_ltx.models.transformer import Transformer
from mlx_ltx.models.transformer_config import TransformerConfig

CONFIG = "config.json"
MAX_SHARD_BYTES = 5_000_000_000
SPARE_BYTES = 50_000_000  # headers, index and config, and what a file system takes for itself
# As mlx-lm writes them; the second is the name that Hugging Face's libraries look for.
SETTINGS_KEYS = ("quantization", "quantization_config")


class Pack(SafetensorsFolder):
    """A saved pack, to be used like the checkpoint that it was made from.

    Attributes:
        origin: the name of the file that it was made from, if it says it.

    Raises:
        UserError: it is not whole, or its config and its tensors do not agree.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        values = read_json(Path(folder) / CONFIG)
        settings = values.get(SETTINGS_KEYS[0])
        if not isinstance(settings, dict):
            raise UserError(f"{Path(folder) / CONFIG}: says nothing about quantization, so this is not a saved pack")
        super().__init__(folder, settings)
        kept = {key: value for key, value in values.items() if key not in SETTINGS_KEYS}
        self.metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in kept.items()}
        self.origin: str | None = self.metadata.get("origin")
        if not any(key.endswith(".scales") for key in self.tensors):
            raise UserError(f"{self.path}: config.json and tensors disagree: no tensor is quantised")
        promised = read_json(self.path / INDEX).get("weight_map", {}) if (self.path / INDEX).is_file() else {}
        missing = sorted(promised.keys() - self.tensors.keys())
        if missing:
            raise UserError(f"{self.path}: {len(missing)} tensors of its index are missing, first {missing[0]}")


def is_pack_folder(folder: Path) -> bool:
    """Whether ``folder`` holds a pack of an LTX-2 checkpoint, as its ``config.json`` says."""
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(values, dict) or SETTINGS_KEYS[0] not in values:
        return False
    return isinstance(values.get("config"), dict) and "transformer" in values["config"]


def open_checkpoint(path: str | os.PathLike[str]) -> SafetensorsFile:
    """A checkpoint file, or a folder with a saved pack.

    Raises:
        UserError: it is missing, damaged or of another kind.
    """
    return Pack(path) if os.path.isdir(path) else SafetensorsFile(path)


@dataclass(frozen=True)
class PackProgress:
    """How far the writing of a pack has come, in bytes; ``shard`` counts from 1."""

    done: int
    total: int
    shard: int
    shards: int


def write_pack(
    source: SafetensorsFile, destination: str | os.PathLike[str], setting: Quantization
) -> Iterator[PackProgress]:
    """Quantise a checkpoint into a new folder; it appears when it is complete, or not at all.

    Every tensor is read, quantised, written and dropped before the next, so that memory holds one at a time. The bits
    are those of :func:`load_transformer` with the same setting.

    Yields:
        After every tensor.

    Raises:
        UserError: the source is not a whole checkpoint, or is quantised already; the destination exists or cannot be
            written; the disk is too small, or fills up.
    """
    destination = Path(destination)
    if os.path.lexists(destination):
        raise UserError(f"{destination}: already exists; give a new name for the pack")
    check_output_folder(destination, ".safetensors")
    if source.quantization is not None or any(key.endswith(".scales") for key in source.tensors):
        raise UserError(f"{source.path}: is already quantised; make the pack from the published checkpoint")
    if other := what_else(source):
        raise UserError(f"{source.path}: not a whole LTX-2 checkpoint; it looks like {other}")
    formats = _formats_by_key(source, setting)
    tensors = _tensors(source, formats)
    shards = _shards({name: array.nbytes for name, array in tensors.items()})
    total = sum(array.nbytes for array in tensors.values())
    _check_room(destination, total + SPARE_BYTES)
    with atomic_folder(destination, ".safetensors") as folder:
        done = 0
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            with open(folder / name, "xb") as file:
                write_header(file, {each: tensors[each] for each in names})
                for each in names:
                    done += write_array(file, tensors.pop(each))
                    weight_map[each] = name
                    yield PackProgress(done, total, number, len(shards))
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
        _write_json(folder / CONFIG, _config(source, formats, setting))


def _formats_by_key(source: SafetensorsFile, setting: Quantization) -> dict[str, WeightFormat]:
    """By published layer name, how the transformer's layers will be held, after a strict check of the transformer."""
    config = read_config(source, TransformerConfig.from_metadata)
    model = Transformer(config)
    keys = match_network(model, source, TRANSFORMER).keys
    formats = choose_formats(model, transformer_rules(config.layers), setting)
    return {keys[f"{path}.weight"].removesuffix(".weight"): each for path, each in formats.items()}


def _tensors(source: SafetensorsFile, formats: Mapping[str, WeightFormat]) -> dict[str, mx.array]:
    """The pack's tensors by name, lazily. Weights that were fp8 and stay plain become bfloat16."""
    scaled = {key for key, info in source.tensors.items() if info.dtype == FP8}
    scales = {f"{key}_scale" for key in scaled} | {f"{key.removesuffix('weight')}input_scale" for key in scaled}
    tensors = {}
    for key in source.tensors:
        layer = key.removesuffix(".weight")
        if key in scales:
            continue
        array = read_array(source, key)
        if array.dtype not in KINDS:
            raise UserError(f"{source.path}: tensor {key} is {source.tensors[key].dtype}; this layout is not supported")
        if layer != key and layer in formats:
            tensors.update({f"{layer}.{name}": part for name, part in formats[layer].quantize(array).items()})
        else:
            tensors[key] = array
    return tensors


def _shards(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names in order, so many to a shard that none but a single larger tensor is over the limit."""
    shards: list[list[str]] = [[]]
    room = MAX_SHARD_BYTES
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = MAX_SHARD_BYTES
        shards[-1].append(name)
        room -= size
    return shards


def _config(source: SafetensorsFile, formats: Mapping[str, WeightFormat], setting: Quantization) -> dict[str, Any]:
    """The checkpoint's own metadata, and the settings: the usual ones, and those of layers that are held otherwise."""
    metadata = {key: source.json_metadata(key) for key in source.metadata if key not in ("format", *SETTINGS_KEYS)}
    settings = {
        **setting.usual.to_json(),
        **{layer: each.to_json() for layer, each in sorted(formats.items()) if each != setting.usual},
    }
    return {**metadata, "origin": source.path.name, **dict.fromkeys(SETTINGS_KEYS, settings)}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _check_room(destination: Path, needed: int) -> None:
    folder = destination.absolute().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"{destination}: needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free there")
