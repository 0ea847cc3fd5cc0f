"""Safetensors files: their headers, their metadata, and their tensors read lazily.

Format: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, then the data).
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_ltx.errors import UserError

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of one tensor: its safetensors dtype name (``"BF16"``), shape and size."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class SafetensorsFile:
    """One safetensors file whose header has been read and checked against the file's size.

    Attributes:
        path: the file.
        metadata: the header's ``__metadata__``.
        tensors: what the header says of each tensor.
        quantization: how the weights were quantised, in the words of mlx-lm's ``config.json``; a single file cannot
            say it, a folder can.

    Raises:
        UserError: the file is missing, unreadable, not safetensors, or shorter than its header says.
    """

    quantization: dict[str, Any] | None = None

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                total = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                if total < 8 or length > min(total - 8, MAX_HEADER_BYTES):
                    raise UserError(f"{self.path}: not a safetensors file, or its download was cut off")
                header = json.loads(file.read(length))
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from None
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise UserError(f"{self.path}: not a safetensors file (its header is not JSON)") from None
        try:
            metadata = header.pop("__metadata__", None) or {}
            self.metadata: dict[str, str] = {key: str(value) for key, value in metadata.items()}
            spans = {name: _span(entry) for name, entry in header.items()}
            self.tensors = {
                name: TensorInfo(str(entry["dtype"]), tuple(map(int, entry["shape"])), spans[name][1] - spans[name][0])
                for name, entry in header.items()
            }
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
            raise UserError(f"{self.path}: not a safetensors file (its header has an unknown form)") from None
        missing = 8 + length + max((end for _, end in spans.values()), default=0) - total
        if missing > 0:
            raise UserError(f"{self.path}: truncated, {missing:,} bytes are missing; download it again")
        for name, info in self.tensors.items():
            expected = math.ceil(info.size * BITS[info.dtype] / 8) if info.dtype in BITS else info.nbytes
            if info.nbytes != expected or info.nbytes < 0 or spans[name][0] < 0 or min(info.shape, default=0) < 0:
                raise UserError(f"{self.path}: damaged, the size of tensor {name} does not match its shape")

    @cached_property
    def arrays(self) -> Mapping[str, mx.array]:
        """Every tensor as a lazy array: data is read when an array is evaluated.

        The mapping keeps no array that it has given out, so memory is free again when its user drops it.

        Raises:
            UserError: on access, if MLX cannot read the file (a dtype that it does not know).
        """
        return _LazyArrays(self)

    @property
    def config(self) -> dict[str, Any]:
        """The model config that the file carries in its own metadata.

        Raises:
            UserError: the file carries none.
        """
        config = self.json_metadata("config")
        if not isinstance(config, dict):
            raise UserError(f"{self.path}: carries no model config in its metadata, so it is not an LTX-2 checkpoint")
        return config

    @property
    def version(self) -> tuple[int, ...]:
        """The model version, ``(2, 3, 0)`` for "2.3.0"; files of the first generation may lack it: ``(2, 0)``."""
        text = str(self.json_metadata("model_version") or "2.0").replace("-", ".")
        return tuple(int(part) for part in itertools.takewhile(str.isdigit, text.split(".")))

    def json_metadata(self, key: str) -> Any:
        """The metadata entry ``key`` decoded from JSON, the plain string if it is not JSON, or None."""
        value = self.metadata.get(key)
        if value is None:
            return None
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value


class SafetensorsFolder(SafetensorsFile):
    """The weights of a folder, in shards that an index names or in one file, as if they lay in a single file.

    Attributes:
        path: the folder.
        shards: the files.

    Raises:
        UserError: there are no weights, shards are missing, or one of them is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str], quantization: dict[str, Any] | None = None):
        self.path = Path(folder)
        self.metadata = {}
        self.quantization = quantization
        self.shards = [SafetensorsFile(self.path / name) for name in _shard_names(self.path)]
        self.tensors = {key: info for shard in self.shards for key, info in shard.tensors.items()}

    @cached_property
    def arrays(self) -> Mapping[str, mx.array]:
        """As of a single file."""
        return _ShardArrays(self.shards)


class _ShardArrays(Mapping[str, mx.array]):
    """The arrays of several files, each handed out as its file does."""

    def __init__(self, shards: list[SafetensorsFile]):
        self.owners = {key: shard for shard in shards for key in shard.tensors}

    def __getitem__(self, key: str) -> mx.array:
        return self.owners[key].arrays[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.owners)

    def __len__(self) -> int:
        return len(self.owners)


class _LazyArrays(Mapping[str, mx.array]):
    """The arrays of a file, each handed out once per opening of it.

    A plain dictionary would hold on to every array after its evaluation: a checkpoint cast to another dtype would lie
    in memory twice, and a network that has done its work could not be freed.
    """

    def __init__(self, file: SafetensorsFile):
        self.file = file
        self.pending: dict[str, mx.array] = {}

    def __getitem__(self, key: str) -> mx.array:
        if key not in self.file.tensors:
            raise KeyError(key)
        if key not in self.pending:
            self.pending = self.open()
        return self.pending.pop(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.file.tensors)

    def __len__(self) -> int:
        return len(self.file.tensors)

    def open(self) -> dict[str, mx.array]:
        try:
            loaded = mx.load(str(self.file.path), format="safetensors")
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{self.file.path}: cannot be loaded ({error})") from None
        assert isinstance(loaded, dict)
        return loaded


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise UserError(f"{path}: not JSON; download it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object; download it again")
    return value


def _shard_names(folder: Path) -> list[str]:
    """The shards that the folder's index names, or its only file."""
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise UserError(f"{folder / INDEX}: holds no weight_map; download it again")
        names = sorted(set(index.values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{folder}: {len(missing)} of {len(names)} shards are missing, first {missing[0]}")
        return names
    names = sorted(path.name for path in folder.glob("model*.safetensors"))
    if not names:
        raise UserError(f"{folder}: holds no weights (model.safetensors, or shards and {INDEX})")
    if len(names) > 1:
        raise UserError(f"{folder}: holds {len(names)} weight files but no {INDEX}; download it")
    return names


def _span(entry: dict[str, Any]) -> tuple[int, int]:
    """Where a tensor's data begin and end, from its header entry."""
    start, end = entry["data_offsets"]
    return int(start), int(end)
