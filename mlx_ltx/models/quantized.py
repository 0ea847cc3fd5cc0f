"""Linear layers whose weights are held in few bits, multiplied at the speed of dense ones.

``mx.quantized_matmul`` takes the weights apart again for every few rows of activations. That is right for the single
tokens of a language model; a transformer over thousands of latent tokens loses by it. So a layer that meets many tokens
takes its weight apart once and multiplies it as an ordinary matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

# What mx.quantize offers: bits and group sizes, the default first.
MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((4, 8, 6, 5, 3, 2), (64, 32, 128)),
    "mxfp8": ((8,), (32,)),
    "mxfp4": ((4,), (32,)),
    "nvfp4": ((4,), (16,)),
}


class Limits(NamedTuple):
    """How a quantised layer multiplies on one kind of device.

    Attributes:
        packed_rows: up to so many rows of activations go through ``mx.quantized_matmul``.
        piece_rows: for more, the weight is taken apart in pieces of at most so many rows (outputs) at a time.
    """

    packed_rows: int
    piece_rows: int


# CPU, measured on 2 cores of an AMD EPYC (Zen 5) with OpenBLAS, float32, 4 bits in groups of 64.
# Pieces under 32 MiB (480 rows of 16384) come from memory that the C library keeps; larger ones are given back, and
# faulted in page by page each time, which costs as much as all the arithmetic. Fewer rows make the product slower.
# GPU: not measured. By arithmetic, taking a weight apart costs about as much as some hundred rows of its product; the
# largest layer of LTX-2 (128 MiB in bfloat16) stays in one piece. To be measured with benchmark.py quantize on a Mac.
CPU = Limits(packed_rows=2, piece_rows=480)
GPU = Limits(packed_rows=256, piece_rows=1 << 20)


def limits() -> Limits:
    """Those of MLX's default device."""
    return CPU if mx.default_device().type == mx.cpu else GPU


@dataclass(frozen=True)
class WeightFormat:
    """How one layer's weight is held; the names are those of ``mx.quantize`` and of mlx-lm's ``config.json``.

    Raises:
        ValueError: MLX has no such format.
    """

    mode: str = "affine"
    bits: int = 4
    group_size: int = 64

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode {self.mode!r}; the modes are {', '.join(MODES)}")
        for name, allowed in zip(("bits", "group_size"), MODES[self.mode], strict=True):
            if getattr(self, name) not in allowed:
                options = ", ".join(map(str, sorted(allowed)))
                raise ValueError(f"{name} {getattr(self, name)!r} in mode {self.mode}; it can be {options}")

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> WeightFormat:
        """From an entry of ``config.json``; what is absent is the mode's default.

        Raises:
            ValueError: MLX has no such format.
        """
        mode = values.get("mode", "affine")
        if mode not in MODES:
            raise ValueError(f"mode {mode!r}; the modes are {', '.join(MODES)}")
        bits, group_size = (sizes[0] for sizes in MODES[mode])
        return cls(mode, values.get("bits", bits), values.get("group_size", group_size))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def quantize(self, weight: mx.array) -> dict[str, mx.array]:
        """A weight (outputs, inputs) as the parameters of a quantised layer, lazily.

        Affine scales and biases have the dtype of ``weight``; the scales of the other modes are bytes.
        """
        parts = mx.quantize(weight, self.group_size, self.bits, self.mode)
        return dict(zip(("weight", "scales", "biases"), parts, strict=False))

    def dequantize(
        self, weight: mx.array, scales: mx.array, biases: mx.array | None, dtype: mx.Dtype | None = None
    ) -> mx.array:
        """The dense weight (outputs, inputs), lazily.

        Args:
            dtype: of the result in the modes whose scales are bytes; affine weights come in the dtype of their scales.
        """
        if biases is None:
            return mx.dequantize(weight, scales, None, self.group_size, self.bits, self.mode, dtype=dtype)
        if self.bits in (4, 8) and mx.default_device().type == mx.cpu:
            return _dequantize_bytes(weight, scales, biases, self.bits)
        return mx.dequantize(weight, scales, biases, self.group_size, self.bits, self.mode)

    @property
    def bits_per_weight(self) -> float:
        """With scales and biases, as a 16-bit checkpoint is quantised."""
        return self.bits + (32 if self.mode == "affine" else 8) / self.group_size


def _dequantize_bytes(weight: mx.array, scales: mx.array, biases: mx.array, bits: int) -> mx.array:
    """``mx.dequantize`` of affine weights, bit for bit, by bytes instead of 32-bit words.

    On the CPU backend that function is composed of 30 operations on words of 32 bits per number; this takes a third of
    its time.
    """
    codes = weight.view(mx.uint8)
    if bits == 4:
        pairs = codes.astype(mx.uint16)
        codes = ((pairs | pairs << 4) & 0x0F0F).view(mx.uint8)  # the lower half of a byte first
    grouped = codes.reshape(*scales.shape, -1).astype(scales.dtype)
    return (grouped * scales[..., None] + biases[..., None]).reshape(weight.shape[0], -1)


class QuantizedLinear(nn.QuantizedLinear):
    """A linear layer with a quantised weight, fast for few tokens and for many.

    The two ways give the same result up to the rounding of sums. On the CPU backend a large layer is evaluated as it
    goes; ``train()`` makes it wholly lazy, as gradients need it.
    """

    def __init__(self, *sizes_and_format: Any) -> None:
        super().__init__(*sizes_and_format)
        self.eval()

    @property
    def format(self) -> WeightFormat:
        return WeightFormat(self.mode, self.bits, self.group_size)

    def __call__(self, x: mx.array) -> mx.array:
        """(..., inputs) to (..., outputs)."""
        device = limits()
        if x.size // x.shape[-1] <= device.packed_rows:
            return super().__call__(x)
        outputs = self.weight.shape[0]
        if self.training or outputs <= device.piece_rows:
            return self._multiply(x, 0, outputs)
        rows = -(-outputs // -(-outputs // device.piece_rows))  # pieces of equal size
        result = mx.zeros((*x.shape[:-1], outputs), x.dtype)
        for first in range(0, outputs, rows):
            result[..., first : first + rows] = self._multiply(x, first, first + rows)
            mx.eval(result)  # so that pieces follow one another through the same memory, warm
        return result

    def _multiply(self, x: mx.array, first: int, last: int) -> mx.array:
        """The outputs ``first`` to ``last``, lazily."""
        biases = self.get("biases")
        biases = None if biases is None else biases[first:last]
        dense = self.format.dequantize(self.weight[first:last], self.scales[first:last], biases, x.dtype).T
        return mx.addmm(self.bias[first:last], x, dense) if "bias" in self else x @ dense


def quantized_layer(layer: nn.Module, weight_format: WeightFormat) -> nn.Module:
    """A quantised layer of the same sizes as ``layer``, still without its weights.

    Raises:
        ValueError: it is neither a linear layer nor an embedding, or the groups do not divide its width.
    """
    mode, bits, group_size = weight_format.mode, weight_format.bits, weight_format.group_size
    if isinstance(layer, nn.Linear):
        outputs, inputs = layer.weight.shape
        return QuantizedLinear(inputs, outputs, "bias" in layer, group_size, bits, mode)
    if isinstance(layer, nn.Embedding):
        entries, width = layer.weight.shape
        return nn.QuantizedEmbedding(entries, width, group_size, bits, mode)
    raise ValueError(f"{type(layer).__name__} cannot be quantised")


def quantize_layers(module: nn.Module, formats: Mapping[str, WeightFormat]) -> None:
    """Replace layers of ``module``, by module path, by quantised ones that still need their weights.

    Raises:
        ValueError: there is no such layer, or it cannot be quantised so.
    """
    layers = dict(module.named_modules())
    unknown = sorted(formats.keys() - layers.keys())
    if unknown:
        raise ValueError(f"no layer {unknown[0]}")
    if formats:
        replaced = tree_unflatten([(path, quantized_layer(layers[path], each)) for path, each in formats.items()])
        assert isinstance(replaced, dict)
        module.update_modules(replaced)
