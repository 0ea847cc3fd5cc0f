"""Strict loading: every parameter of a module comes from the checkpoint, and every tensor of it has a place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_ltx.checkpoints.files import SafetensorsFile, TensorInfo
from mlx_ltx.checkpoints.keymaps import KeyMap
from mlx_ltx.errors import UserError
from mlx_ltx.models.quantized import WeightFormat, quantize_layers

Module = TypeVar("Module", bound=nn.Module)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PLAIN = ("F32", "F16", "BF16")
PACKED = ("U32", "U8")  # quantised by MLX: words of codes, and scales that are bytes
FP8 = "F8_E4M3"


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


class Layout(NamedTuple):
    """Where a network's tensors stand in a file, and in what form.

    Attributes:
        keys: module path to key.
        axes: module path to the axis order that makes the tensor the module's, or None.
        packed: the layers that the file holds quantised, by module path.
    """

    keys: dict[str, str]
    axes: dict[str, tuple[int, ...] | None]
    packed: dict[str, WeightFormat]


def match_network(
    module: nn.Module, file: SafetensorsFile, keymap: KeyMap, skip: Iterable[str] = (), own_axes: bool = False
) -> Layout:
    """Find the tensors of ``module`` in ``file`` and check every key, shape and dtype; arguments as below.

    Layers that the file holds quantised become quantised layers.

    Raises:
        UserError: as :func:`load_weights`.
    """
    left_out = [re.compile(pattern) for pattern in skip]
    keys = keymap.select(file.tensors)
    keys = {path: key for path, key in keys.items() if not any(pattern.match(path) for pattern in left_out)}
    keys = _without_fp8_scales(file, keys)
    packed = packed_formats(file, keys)
    _quantize_layers(module, packed, file)
    axes = parameter_axes(module)
    found = {path: file.tensors[key] for path, key in keys.items()}
    if own_axes:
        _accept_own_axes(module, found, axes)
    check_tensors(module, found, str(file.path), keymap.name)
    for path, key in keys.items():
        kind = file.tensors[key].dtype
        if kind not in (*PLAIN, FP8) and not (kind in PACKED and path.rpartition(".")[0] in packed):
            raise UserError(f"{file.path}: tensor {key} is {kind}; this layout is not supported")
    return Layout(keys, axes, packed)


def load_weights(
    module: Module,
    file: SafetensorsFile,
    keymap: KeyMap,
    dtype: mx.Dtype | None = None,
    skip: Iterable[str] = (),
    formats: Mapping[str, WeightFormat] | None = None,
    own_axes: bool = False,
) -> Module:
    """Give ``module`` its weights from ``file``, lazily, after checking every key, shape and dtype.

    Layers that the file holds quantised become quantised layers. Published fp8 weights come out plain.

    Args:
        module: built from the file's own config.
        keymap: where the network's tensors stand in the file.
        dtype: what floating-point tensors become; None keeps the file's dtypes (bfloat16 for fp8).
        skip: regular expressions; module paths that begin with one are left out on purpose (video only, say).
        formats: layers to be quantised now, by module path. Each is made from the weight as the file holds it (fp8: in
            bfloat16), whatever ``dtype`` is, so that a saved pack has the same bits. A weight is read, quantised and
            dropped when its layer is evaluated.
        own_axes: convolutions may also have MLX's own axis order, as in packs that mlx-vlm wrote.

    Raises:
        UserError: a tensor is missing, left over or of another shape, or of a dtype that cannot be read; or the
            weights are to be quantised and already are.
    """
    keys, axes, packed = match_network(module, file, keymap, skip, own_axes)
    if packed and formats:
        raise UserError(f"{file.path}: the {keymap.name} is already quantised ({_summary(packed)})")
    quantize_layers(module, formats or {})
    weights: list[tuple[str, mx.array]] = []
    for path, key in keys.items():
        layer, _, name = path.rpartition(".")
        if formats and name == "weight" and layer in formats:
            parts = formats[layer].quantize(read_array(file, key))
            weights += [(f"{layer}.{part}", _cast(array, dtype)) for part, array in parts.items()]
            continue
        array = read_array(file, key, dtype)
        order = axes[path]
        weights.append((path, array if order is None else array.transpose(order)))
    module.load_weights(weights, strict=True)
    module.eval()
    return module


def _accept_own_axes(module: nn.Module, found: dict[str, TensorInfo], axes: dict[str, tuple[int, ...] | None]) -> None:
    """Note which convolutions need no transposing: those whose published shape does not fit, but whose own does.

    Only for networks whose channels and kernels have different sizes; published checkpoints are never guessed at.
    """
    shapes = published_shapes(module)
    for path, info in found.items():
        order = axes.get(path)
        if order is not None and len(info.shape) == len(order) and info.shape != shapes[path]:
            found[path] = replace(info, shape=tuple(info.shape[order.index(axis)] for axis in range(len(order))))
            axes[path] = None


def read_array(file: SafetensorsFile, key: str, dtype: mx.Dtype | None = None) -> mx.array:
    """One tensor, lazily; a published fp8 weight comes out multiplied by its scale.

    Args:
        dtype: what floating-point numbers become; None keeps the file's dtype (bfloat16 for fp8).
    """
    if file.tensors[key].dtype == FP8:
        scaled = mx.from_fp8(file.arrays[key], mx.float32) * file.arrays[f"{key}_scale"].reshape(())
        return scaled.astype(mx.bfloat16 if dtype is None else dtype)
    return _cast(file.arrays[key], dtype)


def packed_formats(file: SafetensorsFile, keys: Mapping[str, str]) -> dict[str, WeightFormat]:
    """How the layers of a network are held in ``file``, by module path; nothing for plain weights.

    Args:
        keys: module path to key of the network's tensors. A layer is quantised if it has scales; the file's settings
            say how, with exceptions that are named by their keys, as mlx-lm writes them.

    Raises:
        UserError: the settings are missing, do not agree with the tensors, or ask for what MLX does not have.
    """
    packed = {path.removesuffix(".scales"): key.removesuffix(".scales") for path, key in keys.items() if _scales(path)}
    settings = file.quantization or {}
    layers = {key.removesuffix(".weight") for key in keys.values()}
    promised = sorted(key for key in layers & settings.keys() if isinstance(settings[key], dict))
    broken = [key for key in promised if key not in packed.values()]
    if broken:
        raise UserError(
            f"{file.path}: config.json and tensors disagree: {len(broken)} layers are not quantised ({_some(broken)})"
        )
    if not packed:
        return {}
    if "bits" not in settings:
        raise UserError(f"{file.path}: the weights are quantised but config.json has no quantization with its bits")
    formats = {}
    try:
        for path, key in packed.items():
            own = settings.get(key)
            formats[path] = WeightFormat.from_json(own if isinstance(own, dict) else settings)
    except (ValueError, TypeError) as error:
        raise UserError(f"{file.path / 'config.json'}: quantization is not supported: {error}") from None
    return formats


def _scales(path: str) -> bool:
    return path.endswith(".scales")


def _quantize_layers(module: nn.Module, formats: Mapping[str, WeightFormat], file: SafetensorsFile) -> None:
    """Make layers quantised as the file says; one that cannot be is the file's fault."""
    known = dict(module.named_modules())
    try:
        # A layer that the network does not have is reported with all tensors that are left over.
        quantize_layers(module, {path: each for path, each in formats.items() if path in known})
    except ValueError as error:
        raise UserError(f"{file.path}: quantised in a way that does not fit its config: {error}") from None


def _without_fp8_scales(file: SafetensorsFile, keys: Mapping[str, str]) -> dict[str, str]:
    """Leave out what belongs to fp8 weights: their scale, which :func:`read_array` applies, and that of their inputs,
    which only products in fp8 need.

    Raises:
        UserError: an fp8 weight has no scale, or weights are NVFP4 as Lightricks publishes it.
    """
    kept = dict(keys)
    for path, key in keys.items():
        if path.endswith(".weight_scale_2"):
            raise UserError(
                f"{file.path}: its weights are NVFP4 for NVIDIA GPUs ({key}); use the bf16 or fp8 checkpoint, "
                "with --quantize nvfp4 to hold it so"
            )
        if not (path.endswith(".weight") and file.tensors[key].dtype == FP8):
            continue
        scale = file.tensors.get(f"{key}_scale")
        if scale is None or scale.dtype != "F32" or scale.size != 1:
            raise UserError(
                f"{file.path}: tensor {key} is {FP8} without a scale of its own; this layout is not supported"
            )
        kept.pop(f"{path}_scale", None)
        kept.pop(f"{path.removesuffix('weight')}input_scale", None)
    return kept


def _cast(array: mx.array, dtype: mx.Dtype | None) -> mx.array:
    """Floating-point numbers as ``dtype``; codes and byte scales stay."""
    return array.astype(dtype) if dtype is not None and mx.issubdtype(array.dtype, mx.floating) else array


def _summary(formats: Mapping[str, WeightFormat]) -> str:
    """The commonest format, for messages."""
    found = list(formats.values())
    usual = max(found, key=found.count)
    return f"{usual.bits} bits, {usual.mode}"


def _parameters(module: nn.Module) -> list[tuple[str, mx.array]]:
    flat = tree_flatten(module.parameters())
    assert isinstance(flat, list)
    return flat


def _some(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")
