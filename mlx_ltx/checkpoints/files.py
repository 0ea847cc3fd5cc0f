"""Safetensors files: their headers, their metadata, and their tensors read lazily.

Format: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, then the data).
"""

from __future__ import annotations

import itertools
import json
import math
import os
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

    Raises:
        UserError: the file is missing, unreadable, not safetensors, or shorter than its header says.
    """

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
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            self.tensors = {
                name: TensorInfo(
                    entry["dtype"], tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0]
                )
                for name, entry in header.items()
            }
        except (AttributeError, KeyError, TypeError, IndexError):
            raise UserError(f"{self.path}: not a safetensors file (its header has an unknown form)") from None
        if 8 + length + end > total:
            missing = 8 + length + end - total
            raise UserError(f"{self.path}: truncated, {missing:,} bytes are missing; download it again")
        for name, info in self.tensors.items():
            if info.dtype in BITS and info.nbytes != math.ceil(info.size * BITS[info.dtype] / 8):
                raise UserError(f"{self.path}: damaged, the size of tensor {name} does not match its shape")

    @cached_property
    def arrays(self) -> dict[str, mx.array]:
        """Every tensor as a lazy array: data is read when an array is evaluated."""
        try:
            loaded = mx.load(str(self.path), format="safetensors")
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{self.path}: cannot be loaded ({error})") from None
        assert isinstance(loaded, dict)
        return loaded

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
