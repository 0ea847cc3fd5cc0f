"""Quantised layers: both ways to multiply agree, in every format, whatever the sizes of pieces and threshold."""

from itertools import product

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_ltx.models import quantized
from mlx_ltx.models.quantized import MODES, Limits, QuantizedLinear, WeightFormat, quantize_layers, quantized_layer

FORMATS = [
    WeightFormat(mode, bits, size)
    for mode, (all_bits, sizes) in MODES.items()
    for bits, size in product(all_bits, sizes)
]


def error(actual: mx.array, expected: mx.array) -> float:
    actual, expected = actual.astype(mx.float32), expected.astype(mx.float32)
    return (mx.linalg.norm(actual - expected) / mx.linalg.norm(expected)).item()


def normal(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(sum(shape))).astype(dtype)


def layer(
    weight_format: WeightFormat, bias: bool = True, dtype: mx.Dtype = mx.float32
) -> tuple[QuantizedLinear, mx.array]:
    """A layer of 256 to 40 with weights, and its weight as ``mx.dequantize`` gives it."""
    made = quantized_layer(nn.Linear(256, 40, bias=bias), weight_format)
    assert isinstance(made, QuantizedLinear)
    parts = weight_format.quantize(normal(40, 256, dtype=dtype))
    made.load_weights([*parts.items(), *([("bias", normal(40, dtype=dtype))] if bias else [])], strict=True)
    settings = {"group_size": weight_format.group_size, "bits": weight_format.bits, "mode": weight_format.mode}
    return made, mx.dequantize(parts["weight"], parts["scales"], parts.get("biases"), **settings, dtype=dtype)


@pytest.mark.parametrize("weight_format", FORMATS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_both_ways_multiply_by_the_same_weight(monkeypatch, weight_format, bias):
    made, weight = layer(weight_format, bias)
    x = normal(2, 9, 256)
    expected = x @ weight.T + (made.bias if bias else 0)
    for packed_rows in (0, 18):  # 18 rows: one way, then the other
        monkeypatch.setattr(quantized, "limits", lambda rows=packed_rows: Limits(rows, 1 << 20))
        y = made(x)
        assert (y.shape, y.dtype) == ((2, 9, 40), mx.float32)
        assert error(y, expected) < 1e-6


@pytest.mark.parametrize("weight_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_dequantising_is_that_of_mlx_bit_for_bit(weight_format, dtype):
    made, weight = layer(weight_format, dtype=dtype)
    ours = made.format.dequantize(made.weight, made.scales, made.get("biases"), dtype)
    assert ours.dtype == dtype
    assert mx.array_equal(ours, weight)


@pytest.mark.parametrize("rows", [1, 7, 8, 39, 40, 41])
def test_pieces_of_any_size_give_the_same(monkeypatch, rows):
    made, weight = layer(WeightFormat())
    monkeypatch.setattr(quantized, "limits", lambda: Limits(0, rows))
    assert error(made(normal(5, 256)), normal(5, 256) @ weight.T + made.bias) < 1e-6


def test_the_limit_decides_between_the_ways(monkeypatch):
    made, _ = layer(WeightFormat())
    calls = []
    whole = mx.quantized_matmul
    monkeypatch.setattr(mx, "quantized_matmul", lambda *a, **k: calls.append(a[0].shape) or whole(*a, **k))
    monkeypatch.setattr(quantized, "limits", lambda: Limits(6, 1 << 20))
    made(normal(2, 3, 256))
    made(normal(7, 256))
    assert calls == [(2, 3, 256)]


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
@pytest.mark.parametrize(
    "weight_format", [WeightFormat(), WeightFormat("mxfp8", 8, 32), WeightFormat("nvfp4", 4, 16)], ids=str
)
def test_activations_keep_their_dtype(weight_format, dtype):
    made, _ = layer(weight_format, dtype=dtype)
    for tokens in (1, 64):
        assert made(normal(tokens, 256, dtype=dtype)).dtype == dtype


def test_only_one_piece_is_dense_at_a_time(monkeypatch):
    weight_format = WeightFormat()
    made = quantized_layer(nn.Linear(1024, 8192, bias=False), weight_format)
    made.load_weights(list(weight_format.quantize(normal(8192, 1024)).items()))
    x = normal(4, 1024)
    mx.eval(made.parameters(), x)
    peaks = []
    for pieces in (1, 16):
        monkeypatch.setattr(quantized, "limits", lambda n=pieces: Limits(0, 8192 // n))
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(made(x))
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[0] > 32 << 20  # the whole weight in float32
    assert peaks[1] < peaks[0] / 3


@pytest.mark.parametrize(
    ("bits", "group_size", "limit"),
    [(8, 32, 0.005), (8, 64, 0.006), (6, 64, 0.025), (5, 64, 0.05), (4, 64, 0.1), (4, 32, 0.09)],
)
def test_affine_errors_of_normal_weights(bits, group_size, limit):
    weight_format = WeightFormat("affine", bits, group_size)
    parts = weight_format.quantize(normal(64, 1024))
    assert limit / 2 < error(weight_format.dequantize(**parts), normal(64, 1024)) < limit
    held = sum(
        part.nbytes
        for part in WeightFormat("affine", bits, group_size).quantize(normal(64, 1024, dtype=mx.bfloat16)).values()
    )
    assert held * 8 / (64 * 1024) == weight_format.bits_per_weight


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "dozenal"}, "mode 'dozenal'; the modes are affine"),
        ({"bits": 7}, "bits 7 in mode affine"),
        ({"bits": 4, "group_size": 48}, "group_size 48 in mode affine; it can be 32, 64, 128"),
        ({"mode": "mxfp4", "bits": 8}, "bits 8 in mode mxfp4; it can be 4"),
        ({"mode": "nvfp4", "group_size": 32}, "group_size 32 in mode nvfp4; it can be 16"),
        ({"bits": "4"}, "bits '4'"),
    ],
)
def test_formats_that_mlx_does_not_have(values, message):
    with pytest.raises(ValueError, match=message):
        WeightFormat.from_json(values)


@pytest.mark.parametrize("weight_format", FORMATS, ids=str)
def test_formats_survive_json(weight_format):
    assert WeightFormat.from_json(weight_format.to_json()) == weight_format


def test_what_is_absent_is_the_default_of_the_mode():
    assert WeightFormat.from_json({}) == WeightFormat("affine", 4, 64)
    assert WeightFormat.from_json({"mode": "mxfp8"}) == WeightFormat("mxfp8", 8, 32)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = [nn.Linear(64, 64), nn.Linear(64, 32, bias=False)]
        self.words = nn.Embedding(10, 64)
        self.norm = nn.RMSNorm(64)


def test_layers_are_replaced_by_path():
    net = Net()
    quantize_layers(net, {"blocks.1": WeightFormat(), "words": WeightFormat("affine", 8, 32)})
    assert type(net.blocks[0]) is nn.Linear
    assert isinstance(net.blocks[1], QuantizedLinear)
    assert isinstance(net.blocks[1], nn.QuantizedLinear)
    assert "bias" not in net.blocks[1]
    assert (net.words.bits, net.words.group_size) == (8, 32)
    assert type(net.norm) is nn.RMSNorm
    quantize_layers(net, {})


@pytest.mark.parametrize("path", ["norm", "blocks.2", "words.weight"])
def test_what_cannot_be_quantised_is_a_mistake(path):
    with pytest.raises(ValueError, match=r"RMSNorm|no layer"):
        quantize_layers(Net(), {path: WeightFormat()})


def test_groups_must_divide_the_width():
    with pytest.raises(ValueError):
        quantized_layer(nn.Linear(96, 8), WeightFormat("affine", 4, 64))
