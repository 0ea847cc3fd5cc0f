"""Strict loading: every parameter of a module comes from the checkpoint, and every tensor of it has a place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_ltx.checkpoints.files import SafetensorsFile, TensorInfo
from mlx_ltx.checkpoints.keymaps import KeyMap
from mlx_ltx.errors import UserError

Module = TypeVar("Module", bound=nn.Module)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def published_axes(owner: nn.Module, name: str) -> tuple[int, ...] | None:
    """The axis order that turns a published (PyTorch) tensor into the module's, or None if they agree.

    The type of the module that owns the parameter decides, never the tensor's shape:
    (out, in, *kernel) becomes (out, *kernel, in) for convolutions, (in, out, *kernel) becomes (out, *kernel, in) for
    transposed ones.
    """
    if name != "weight" or not isinstance(owner, CONVOLUTIONS + TRANSPOSED):
        return None
    kernel = tuple(range(2, owner.weight.ndim))
    return (1, *kernel, 0) if isinstance(owner, TRANSPOSED) else (0, *kernel, 1)


def parameter_axes(module: nn.Module) -> dict[str, tuple[int, ...] | None]:
    """For every parameter path of ``module``, the result of :func:`published_axes`."""
    axes: dict[str, tuple[int, ...] | None] = {}
    for prefix, owner in module.named_modules():
        for name, value in owner.items():
            if isinstance(value, mx.array):
                axes[f"{prefix}.{name}" if prefix else name] = published_axes(owner, name)
    for path, _ in _parameters(module):
        axes.setdefault(path, None)
    return axes


def published_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape that each parameter of ``module`` has in a published checkpoint."""
    axes = parameter_axes(module)
    shapes = {}
    for path, parameter in _parameters(module):
        order = axes[path]
        if order is None:
            shapes[path] = tuple(parameter.shape)
        else:
            shapes[path] = tuple(parameter.shape[order.index(axis)] for axis in range(parameter.ndim))
    return shapes


def check_tensors(module: nn.Module, found: Mapping[str, TensorInfo], source: str, name: str) -> None:
    """Compare the tensors of a file (by module path) with the parameters that ``module`` has.

    Raises:
        UserError: tensors are missing, unexpected or of another shape; the message names the first few.
    """
    expected = published_shapes(module)
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    wrong = sorted(p for p in expected.keys() & found.keys() if expected[p] != found[p].shape)
    if not found:
        raise UserError(f"{source}: holds no {name}")
    complaints = []
    if missing:
        complaints.append(f"{len(missing)} missing ({_some(missing)})")
    if unexpected:
        complaints.append(f"{len(unexpected)} unexpected ({_some(unexpected)})")
    if wrong:
        details = [f"{p} is {list(found[p].shape)}, not {list(expected[p])}" for p in wrong]
        complaints.append(f"{len(wrong)} of another shape ({_some(details)})")
    if complaints:
        raise UserError(f"{source}: the {name} does not match its config: tensors {', '.join(complaints)}")


def load_weights(
    module: Module, file: SafetensorsFile, keymap: KeyMap, dtype: mx.Dtype | None = None, skip: Iterable[str] = ()
) -> Module:
    """Give ``module`` its weights from ``file``, lazily, after checking every key and shape.

    Args:
        module: built from the file's own config.
        keymap: where the network's tensors stand in the file.
        dtype: what floating-point tensors become; None keeps the file's dtypes.
        skip: regular expressions; module paths that begin with one are left out on purpose (video only, say).

    Raises:
        UserError: a tensor is missing, left over or of another shape, or has a dtype that is not plain floating point.
    """
    left_out = [re.compile(pattern) for pattern in skip]
    keys = keymap.select(file.tensors)
    keys = {path: key for path, key in keys.items() if not any(pattern.match(path) for pattern in left_out)}
    check_tensors(module, {path: file.tensors[key] for path, key in keys.items()}, str(file.path), keymap.name)
    for key in keys.values():
        if file.tensors[key].dtype not in ("F32", "F16", "BF16"):
            raise UserError(f"{file.path}: tensor {key} is {file.tensors[key].dtype}; this layout is not supported")
    axes = parameter_axes(module)
    weights = []
    for path, key in keys.items():
        array = file.arrays[key]
        order = axes[path]
        if order is not None:
            array = array.transpose(order)
        weights.append((path, array if dtype is None else array.astype(dtype)))
    module.load_weights(weights, strict=True)
    module.eval()
    return module


def _parameters(module: nn.Module) -> list[tuple[str, mx.array]]:
    flat = tree_flatten(module.parameters())
    assert isinstance(flat, list)
    return flat


def _some(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")
