"""Writing safetensors files, tensor by tensor.

Format: https://huggingface.co/docs/safetensors. MLX's own writer would hold all tensors at once, and does not tell
what the system said when a disk is full.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import IO, Any

import mlx.core as mx
import numpy as np

from mlx_ltx.media.atomic import atomic_output

KINDS = {
    mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint32: "U32", mx.int32: "I32", mx.int64: "I64",
    mx.uint64: "U64", mx.uint8: "U8", mx.int8: "I8", mx.bool_: "BOOL",
}  # fmt: skip


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, mx.array],
    metadata: Mapping[str, str] | None = None,
    force: bool = False,
) -> None:
    """Write a file that appears when it is complete, or not at all; lazy tensors are computed one at a time.

    Args:
        metadata: beside the format, which is always there.
        force: an existing file may be replaced.

    Raises:
        UserError: the file exists or cannot be written, or the disk is full.
    """
    with atomic_output(path, force) as partial, open(partial, "wb") as file:
        write_header(file, tensors, metadata)
        for array in tensors.values():
            write_array(file, array)


def write_header(file: IO[bytes], tensors: Mapping[str, mx.array], metadata: Mapping[str, str] | None = None) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "mlx", **(metadata or {})}}
    end = 0
    for name, array in tensors.items():
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": KINDS[array.dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8 bytes
    file.write(len(text).to_bytes(8, "little") + text)


def write_array(file: IO[bytes], array: mx.array) -> int:
    """Compute one tensor and write it; returns its bytes."""
    file.write(np.array(array.reshape(-1).view(mx.uint8), copy=False).data)
    return array.nbytes
