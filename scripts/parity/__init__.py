"""Comparing our networks and formulas with recorded outputs of the reference implementation.

A *set* is ``NAME.io.safetensors`` (inputs and expected outputs, PyTorch axis order) with its checkpoint.
A runner takes a set and yields a :class:`Comparison` per expected tensor, or :class:`NotCovered` for a case.
``scripts/check_parity.py`` prints them; the tests assert on them. One module here per part of the package; each
registers its runners with :func:`runner`.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import numpy as np
from safetensors import safe_open

from mlx_ltx.checkpoints.files import SafetensorsFile


@dataclass(frozen=True)
class Comparison:
    """One tensor of ours (``actual``) beside the reference's (``expected``), in the same axis order."""

    case: str
    tensor: str
    actual: np.ndarray
    expected: np.ndarray

    @property
    def error(self) -> float:
        """Relative L2 error; infinite for shapes that differ or values that are not finite."""
        if self.actual.shape != self.expected.shape or not np.isfinite(self.actual).all():
            return float("inf")
        expected = self.expected.astype(np.float64)
        norm = float(np.linalg.norm(expected))
        difference = float(np.linalg.norm(self.actual.astype(np.float64) - expected))
        return difference / norm if norm > 0 else difference


@dataclass(frozen=True)
class NotCovered:
    """A recorded case whose part of the package is not built yet."""

    case: str


class GoldenSet:
    """One ``NAME.io.safetensors`` in a folder, its description of cases, and the checkpoint that it was made with."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        with safe_open(folder / f"{name}.io.safetensors", framework="np") as file:
            self.metadata = file.metadata() or {}
            self.tensors: dict[str, np.ndarray] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.cases = json.loads(self.metadata.get("cases", "{}"))

    def checkpoint(self, name: str | None = None) -> SafetensorsFile:
        """``NAME.ckpt.safetensors`` beside the set; ``name`` for a set that uses another one's."""
        return SafetensorsFile(self.folder / f"{name or self.name}.ckpt.safetensors")

    @cached_property
    def names(self) -> list[str]:
        return sorted(self.tensors)

    def mx(self, key: str) -> mx.array:
        """A recorded tensor as an MLX array (float64 becomes float32, int64 becomes int32)."""
        value = self.tensors[key]
        narrow = {np.dtype(np.float64): np.float32, np.dtype(np.int64): np.int32}
        return mx.array(value.astype(narrow.get(value.dtype, value.dtype)))

    def compare(self, case: str, tensor: str, actual: mx.array | np.ndarray) -> Comparison:
        """Our result beside the recorded tensor ``case.tensor`` (or ``tensor`` alone, for an empty case)."""
        if isinstance(actual, mx.array):
            actual = np.array(actual.astype(mx.float32))
        return Comparison(case or "-", tensor, actual, self.tensors[f"{case}.{tensor}" if case else tensor])


Runner = Callable[[GoldenSet], Iterator[Comparison | NotCovered]]
RUNNERS: list[tuple[str, Runner]] = []


def runner(*patterns: str) -> Callable[[Runner], Runner]:
    """Register a runner for the sets whose names match one of the shell patterns; the first match in order wins."""

    def register(function: Runner) -> Runner:
        RUNNERS.extend((pattern, function) for pattern in patterns)
        return function

    return register


def runner_for(name: str) -> Runner | None:
    return next((function for pattern, function in RUNNERS if fnmatch.fnmatchcase(name, pattern)), None)
