"""Attention and feed-forward in pieces: the numbers of the whole, in memory that grows with the tokens."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_ltx.memory import networks
from mlx_ltx.memory.networks import Tokens, denoising_work
from mlx_ltx.models import attention
from mlx_ltx.models.attention import FeedForward, KeysValues, attend
from mlx_ltx.models.attention_bias import GroupBias, logits_of
from mlx_ltx.models.transformer_config import TransformerConfig

CONFIGS = Path(__file__).parents[1] / "golden" / "real_configs.json"
TOKENS, TEXT = 77, 40


def drawn(*shape, key):
    return mx.random.normal(shape, key=mx.random.key(key))


def biases():
    """Of a clip with two references, and of a text in parts."""
    group = mx.array([0] * 40 + [1] * 20 + [2] * 17)
    strength = mx.where(group == 0, 1.0, mx.random.uniform(shape=(TOKENS,), key=mx.random.key(9)))
    strength[45] = 0.0
    parts = mx.array([1] * 30 + [2] * 47)
    return {
        "none": (TOKENS, None),
        "groups": (TOKENS, GroupBias.among(group, strength, mx.float32)),
        "parts": (TEXT, GroupBias.own_parts(parts, mx.array([1] * 20 + [2] * 20), mx.float32)),
    }


def plain(query, context, scale, bias):
    """Softmax attention as it is written, over everything at once."""
    logits = scale * query @ context.keys.swapaxes(-1, -2)
    if bias is not None:
        logits = logits + bias.rows(0, query.shape[2])
    return mx.softmax(logits, axis=-1) @ context.values


@pytest.mark.parametrize("name", ["none", "groups", "parts"])
@pytest.mark.parametrize("at_once", [1 << 25, 10_000, 1])
def test_attention_in_pieces_is_attention(name, at_once, monkeypatch):
    monkeypatch.setattr(attention, "LOGITS_AT_ONCE", at_once)
    keys, bias = biases()[name]
    query = drawn(2, 3, TOKENS, 16, key=0)
    context = KeysValues(drawn(2, 3, keys, 16, key=1), drawn(2, 3, keys, 16, key=2))
    expected = plain(query, context, 0.25, bias)
    assert mx.allclose(attend(query, context, 0.25, bias), expected, atol=1e-5)


def test_a_bias_is_asked_for_a_few_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(attention, "LOGITS_AT_ONCE", 1)
    asked = []

    @dataclass
    class Spy:
        bias: GroupBias

        def rows(self, first, last):
            asked.append((first, last))
            return self.bias.rows(first, last)

    context = KeysValues(drawn(1, 1, TOKENS, 16, key=1), drawn(1, 1, TOKENS, 16, key=2))
    attend(drawn(1, 1, TOKENS, 16, key=0), context, 0.25, Spy(biases()["groups"][1]))
    assert asked == [(0, 64), (64, TOKENS)]


@pytest.mark.parametrize(("gpu", "head_dim", "pieces"), [(True, 128, 1), (True, 64, 1), (True, 16, 2), (False, 128, 2)])
def test_what_the_gpu_does_without_a_table_is_left_to_it(gpu, head_dim, pieces, monkeypatch):
    class Device:
        type = mx.gpu if gpu else mx.cpu

    calls = []
    call = mx.fast.scaled_dot_product_attention
    monkeypatch.setattr(attention, "LOGITS_AT_ONCE", 32 * TOKENS)
    monkeypatch.setattr(mx, "default_device", Device)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", lambda *a, **k: (calls.append(1), call(*a, **k))[1])
    context = KeysValues(*[drawn(1, 2, TOKENS, head_dim, key=1)] * 2)
    attend(drawn(1, 2, TOKENS, head_dim, key=0), context, 1.0)
    assert len(calls) == pieces


def test_strengths_become_logits():
    logits = logits_of(mx.array([1.0, 0.5, 0.0]), mx.bfloat16)
    assert logits.dtype == mx.bfloat16
    assert logits[:2].tolist() == pytest.approx([0, -0.693], abs=1e-2)
    assert logits[2].item() < -1e38


def test_feed_forward_in_pieces_is_feed_forward(monkeypatch):
    layer = FeedForward(8)
    x = drawn(2, TOKENS, 8, key=0)
    whole = layer(x)
    monkeypatch.setattr(attention, "WIDE_AT_ONCE", 2 * 4 * 8 * 10)
    assert mx.allclose(layer(x), whole, atol=1e-6)


MIXED = Tokens(0, levels=2, grouped=True, timed=True)


@pytest.mark.parametrize(
    ("given", "frames"),
    [(Tokens(0), (4, 8, 17)), (MIXED, (2, 4, 8)), pytest.param(MIXED, (4, 8, 17), marks=pytest.mark.slow)],
)
def test_memory_grows_with_the_tokens_up_to_4k(given, frames, monkeypatch):
    """The recorded peak of a block at LTX-2.3's widths, for so many latent frames of 3840x2176.

    No array has 2^31 elements, since MLX's kernels may index with 32 bits; at 129 frames of 4K the feed-forward's wide
    layer alone would have more.
    """
    tapes = []
    record = networks.record
    monkeypatch.setattr(networks, "record", lambda *given, **more: (tapes.append(record(*given, **more)), tapes[-1])[1])
    config = TransformerConfig.from_metadata(json.loads(CONFIGS.read_text())["2.3"])
    numbers = [3840 // 32 * 2176 // 32 * count for count in frames]
    small, middle, large = (
        denoising_work(config, given._replace(number=number), Tokens(126), 1024, 1, mx.bfloat16) for number in numbers
    )
    rise = (numbers[2] - numbers[1]) / (numbers[1] - numbers[0])
    assert large - middle == pytest.approx(rise * (middle - small), rel=0.02)
    assert (numbers[2] * 4 * config.video.dim > 1 << 31) == (frames[2] == 17)
    steps = tapes[-1].steps
    assert max(math.prod(shape) for step in steps for _, shape, _ in [*step["inputs"], *step["outputs"]]) < 1 << 31
