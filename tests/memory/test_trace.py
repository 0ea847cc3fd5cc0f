"""What the recorded code says it takes, against what MLX counts while it runs."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_ltx.memory.trace import Value, packed, record, reshaped
from mlx_ltx.models.attention import Attention, FeedForward
from mlx_ltx.models.rope import RopeTable

TOKENS, DIM = 1000, 256
ROTARY = mx.zeros((1, 8, TOKENS, 16))


def measured(module, function, *arrays) -> int:
    mx.eval(module.parameters(), arrays)
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(function(*arrays))
    mx.synchronize()
    return mx.get_peak_memory() - before


CASES = {
    "feed-forward": (lambda: FeedForward(DIM), lambda m, x: m(x), (1, TOKENS, DIM)),
    "attention": (lambda: Attention(DIM, DIM, 8, 32, True), lambda m, x: m(x), (1, TOKENS, DIM)),
    "rotary attention": (
        lambda: Attention(DIM, DIM, 8, 32, True),
        lambda m, x: m(x, rope=RopeTable(ROTARY, ROTARY, False)),
        (1, TOKENS, DIM),
    ),
    "conv1d": (lambda: nn.Conv1d(64, 64, 7, padding=3), lambda m, x: nn.silu(m(x)), (1, 6000, 64)),
    "conv2d": (lambda: nn.Conv2d(64, 64, 3, padding=1), lambda m, x: nn.silu(m(x)), (1, 96, 64, 64)),
    "conv3d": (lambda: nn.Conv3d(32, 32, 3, padding=1), lambda m, x: nn.silu(m(x)), (1, 8, 32, 32, 32)),
}


@pytest.mark.parametrize("name", CASES)
def test_peaks_are_those_that_mlx_counts(name):
    if mx.default_device() != mx.Device(mx.cpu):
        pytest.skip("calibrated on the CPU backend")
    make, call, shape = CASES[name]
    counted = make()
    expected = measured(counted, lambda x: call(counted, x), mx.zeros(shape))
    recorded = make()
    tape = record(lambda x: call(recorded, x), mx.zeros(shape), module=recorded)
    assert tape.peak() == pytest.approx(expected, rel=0.1)


def test_recording_takes_no_memory_whatever_the_sizes():
    model = FeedForward(8192)  # 2 GB of weights
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    tape = record(model, mx.zeros((1, 10**6, 8192)), module=model)
    assert mx.get_peak_memory() - before < 1 << 20
    assert tape.peak() > 10**6 * 8192 * 4 * 2  # two results: in pieces, and put together


def test_more_tokens_take_more():
    def peak(tokens: int) -> int:
        model = FeedForward(64)
        return record(model, mx.zeros((1, tokens, 64)), module=model).peak()

    assert peak(2000) == pytest.approx(2 * peak(1000), rel=0.05)


def test_a_result_takes_over_the_buffer_of_what_nobody_else_needs():
    one = 4 * 1000 * 1000
    x = mx.zeros((1000, 1000))
    assert record(lambda x: -mx.exp(mx.abs(x)), x).peak() == one
    assert record(lambda x: [mx.exp(x), mx.abs(x)], x).peak() == 2 * one
    # turned round and flattened it must be copied
    assert record(lambda x: mx.abs(x).T.reshape(-1), x).peak() == 2 * one


def value(shape, strides) -> Value:
    from mlx_ltx.memory.trace import Buffer

    return Value(Buffer(1), shape, strides, 4)


def test_which_shapes_are_views():
    assert reshaped(value((4, 6), packed((4, 6))), (2, 12)) == (12, 1)
    turned = value((6, 4), (1, 6))
    assert reshaped(turned, (24,)) is None
    assert reshaped(turned, (2, 3, 4)) == (3, 1, 6)
