"""Attention and feed-forward, shared by the transformer and the text connectors (ltx_core .../attention.py)."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_ltx.models.attention_bias import AttentionBias
from mlx_ltx.models.rope import RopeTable

EPSILON = 1e-6
# Sizes of heads for which MLX has attention on the GPU that makes no array of queries by keys.
FUSED_HEADS = (64, 80, 128)
# What may be made of queries by keys at a time, in all heads together, and of the wide layer of a feed-forward.
LOGITS_AT_ONCE = 1 << 25
WIDE_AT_ONCE = 1 << 28
# Fewer queries at a time would be slow; with as many, what is made at a time grows with the number of keys only.
FEWEST_QUERIES = 64


def rms_norm(x: mx.array, eps: float = EPSILON) -> mx.array:
    """Root-mean-square normalisation over the last axis without a weight; keeps the dtype of ``x``."""
    return mx.fast.rms_norm(x, None, eps)


class KeysValues(NamedTuple):
    """A context as attention uses it: keys and values, each (B, heads, S, head_dim)."""

    keys: mx.array
    values: mx.array


def attend(query: mx.array, context: KeysValues, scale: float, bias: AttentionBias | None = None) -> mx.array:
    """Softmax attention in memory that grows with the number of tokens, not with its square.

    Args:
        query: (B, heads, T, head_dim).
        scale: factor of the logits.
        bias: added to them.

    Returns:
        (B, heads, T, head_dim).
    """
    B, heads, T, head_dim = query.shape
    columns = context.keys.shape[2]
    if not (mx.default_device().type == mx.gpu and head_dim in FUSED_HEADS):
        columns *= B * heads
    elif bias is None:
        columns = 1
    size = max(LOGITS_AT_ONCE // columns, FEWEST_QUERIES)
    parts = [
        mx.fast.scaled_dot_product_attention(
            query[:, :, first : first + size],
            *context,
            scale=scale,
            mask=None if bias is None else bias.rows(first, min(first + size, T)),
        )
        for first in range(0, T, size)
    ]
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)


class Attention(nn.Module):
    """Multi-head attention with RMS-normalised queries and keys, optional rotary positions and optional gates.

    Args:
        query_dim: width of the tokens that ask (and of the result).
        context_dim: width of the tokens that are asked.
        heads, head_dim: their product is the inner width.
        gated: multiply each head by ``2 * sigmoid`` of a projection of the query tokens.
    """

    def __init__(self, query_dim: int, context_dim: int, heads: int, head_dim: int, gated: bool, eps: float = EPSILON):
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.scale = head_dim**-0.5
        self.q_norm = nn.RMSNorm(inner, eps)
        self.k_norm = nn.RMSNorm(inner, eps)
        self.to_q = nn.Linear(query_dim, inner)
        self.to_k = nn.Linear(context_dim, inner)
        self.to_v = nn.Linear(context_dim, inner)
        self.to_out = nn.Linear(inner, query_dim)
        if gated:
            self.to_gate_logits = nn.Linear(query_dim, heads)

    def __call__(
        self,
        x: mx.array,
        context: mx.array | None = None,
        *,
        rope: RopeTable | None = None,
        context_rope: RopeTable | None = None,
        bias: AttentionBias | None = None,
        keep: mx.array | bool = True,
    ) -> mx.array:
        """Attend from ``x`` to ``context`` (to itself if None).

        Args:
            x: (B, T, query_dim).
            context: (B, S, context_dim).
            rope: positions of ``x``; of the context too unless ``context_rope`` is given.
            bias: added to the logits.
            keep: False replaces what attention gives by the value projection (a perturbed pass of spatio-temporal
                guidance; self-attention only). An array (B, 1, 1) of ones and zeros decides per sample.

        Returns:
            (B, T, query_dim).
        """
        context = x if context is None else context
        value = self.to_v(context)
        if keep is False:
            return self._output(x, value)
        key = self._heads(self.k_norm(self.to_k(context)), rope if context_rope is None else context_rope)
        result = self._attend(x, rope, KeysValues(key, self._heads(value, None)), bias)
        if isinstance(keep, mx.array):
            keep = keep.astype(result.dtype)
            result = result * keep + value * (1 - keep)
        return self._output(x, result)

    def keys_values(self, context: mx.array) -> KeysValues:
        """Of a context (B, S, context_dim) without positions, for :meth:`attend_to`."""
        return KeysValues(self._heads(self.k_norm(self.to_k(context)), None), self._heads(self.to_v(context), None))

    def attend_to(self, x: mx.array, context: KeysValues, bias: AttentionBias | None = None) -> mx.array:
        """What calling the layer with a context gives, from keys and values that several calls share."""
        return self._output(x, self._attend(x, None, context, bias))

    def _attend(self, x: mx.array, rope: RopeTable | None, context: KeysValues, bias: AttentionBias | None) -> mx.array:
        """(B, T, inner), before gates and output projection."""
        B, T, _ = x.shape
        query = self._heads(self.q_norm(self.to_q(x)), rope)
        result = attend(query, context, self.scale, bias)
        return result.transpose(0, 2, 1, 3).reshape(B, T, -1)

    def _output(self, x: mx.array, result: mx.array) -> mx.array:
        if "to_gate_logits" in self:
            B, T, _ = x.shape
            gate = 2 * mx.sigmoid(self.to_gate_logits(x))
            result = (result.reshape(B, T, self.heads, -1) * gate[..., None]).reshape(B, T, -1)
        return self.to_out(result)

    def _heads(self, x: mx.array, rope: RopeTable | None) -> mx.array:
        if rope is not None:
            return rope.rotate(x, self.heads)
        B, T, inner = x.shape
        return x.reshape(B, T, self.heads, inner // self.heads).transpose(0, 2, 1, 3)


class FeedForward(nn.Module):
    """Linear to four times the width, tanh-approximated GELU, and back; many tokens in pieces."""

    def __init__(self, dim: int, bias: bool = True):
        super().__init__()
        self.up = nn.Linear(dim, 4 * dim, bias=bias)
        self.down = nn.Linear(4 * dim, dim, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        T, size = x.shape[1], WIDE_AT_ONCE // (4 * x.shape[0] * x.shape[-1])
        parts = [self.down(nn.gelu_approx(self.up(x[:, first : first + size]))) for first in range(0, T, size)]
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)
