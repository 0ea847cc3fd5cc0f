"""Named tensors with seeded random values, and safetensors files with the same bytes every time."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np


class Tensors:
    """The tensors of one file, float32, by their published names and in PyTorch's axis order.

    Every random tensor has its own stream of numbers, seeded by its name: adding a layer changes no other.

    Attributes:
        values: what has been put so far.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self.values: dict[str, np.ndarray] = {}

    def put(self, name: str, value: np.ndarray) -> None:
        if name in self.values:
            raise ValueError(f"{name} is put twice")
        self.values[name] = np.asarray(value, np.float32)

    def draw(self, name: str, *shape: int) -> np.ndarray:
        """Standard normal numbers that belong to ``name``."""
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())]).standard_normal(shape)

    def random(self, name: str, *shape: int, std: float, mean: float = 0.0) -> None:
        self.put(name, mean + std * self.draw(name, *shape))

    def linear(self, name: str, inputs: int, outputs: int, gain: float = 1.0, bias: bool = True) -> None:
        """``name.weight``, whose results have ``gain`` times the standard deviation of its inputs, and a zero bias."""
        self.random(f"{name}.weight", outputs, inputs, std=gain / math.sqrt(inputs))
        if bias:
            self.put(f"{name}.bias", np.zeros(outputs))

    def conv(self, name: str, inputs: int, outputs: int, kernel: tuple[int, ...], gain: float = 1.0) -> None:
        """The same for a convolution."""
        self.random(f"{name}.weight", outputs, inputs, *kernel, std=gain / math.sqrt(inputs * math.prod(kernel)))
        self.put(f"{name}.bias", np.zeros(outputs))


def interpolation(factors: tuple[int, ...]) -> np.ndarray:
    """Three-tap kernels that enlarge a signal linearly: (product of the factors, 3, 3, ...), the last factor fastest.

    Phase ``p`` of ``n`` new samples lies at ``(p + 1/2) / n - 1/2`` between the old ones.
    """
    kernels = np.ones((1,))
    for factor in factors:
        place = (np.arange(factor) + 0.5) / factor - 0.5
        taps = np.stack([np.maximum(-place, 0), 1 - np.abs(place), np.maximum(place, 0)], axis=1)
        rank = kernels.ndim - 1
        kernels = np.multiply.outer(kernels, taps)  # (phases, 3 ..., factor, 3)
        kernels = np.moveaxis(kernels, -2, 1).reshape(-1, *[3] * (rank + 1))
    return kernels


def save(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    keeps_float32: Callable[[str], bool] = lambda name: False,
) -> None:
    """Write bfloat16 tensors, or float32 where ``keeps_float32(name)``.

    The safetensors library orders metadata at random, so that its files differ from run to run; the format is simple:
    https://huggingface.co/docs/safetensors.
    """
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    pieces: list[bytes] = []
    offset = 0
    for name in sorted(tensors):
        wide = keeps_float32(name)
        piece = (tensors[name].astype("<f4") if wide else bfloat16(tensors[name])).tobytes()
        header[name] = {
            "dtype": "F32" if wide else "BF16",
            "shape": list(tensors[name].shape),
            "data_offsets": [offset, offset + len(piece)],
        }
        offset += len(piece)
        pieces.append(piece)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(pieces))


def bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper halves of the nearest bfloat16 values, as uint16; ties go to even."""
    bits = np.ascontiguousarray(values, "<f4").view("<u4")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
