"""Gemma 3's decoder: as a text encoder it gives the hidden state of every layer.

:mod:`mlx_ltx.models.gemma_generate` writes text with the same module.

Facts: the Gemma 3 report (https://arxiv.org/abs/2503.19786) and Hugging Face's ``Gemma3TextModel``, which the reference
runs. Parameters are named as in those checkpoints and as in mlx-lm's ``gemma3_text``. That module is not used itself
because it adds 1 to the norm weights in bfloat16, rounds the embedding scale to bfloat16 whatever the weights are, does
not read ``rope_parameters`` (it would run without the linear factor of the full layers), knows no padding, and
importing it brings in transformers (1.5 s).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

MODEL_TYPES = ("gemma3", "gemma3_text")
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class RopeSpec:
    """Rotary positions of one kind of layer: ``position / (factor * theta ** (2 i / head_dim))`` radians."""

    theta: float
    factor: float = 1.0


@dataclass(frozen=True)
class GemmaConfig:
    """What the Hugging Face ``config.json`` says of the text decoder. Defaults are those of ``Gemma3TextConfig``."""

    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    layer_types: tuple[str, ...]
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    vocab_size: int = 262_208
    rms_norm_eps: float = 1e-6
    query_pre_attn_scalar: float = 256
    sliding_window: int = 4096
    full_rope: RopeSpec = RopeSpec(1_000_000.0)
    sliding_rope: RopeSpec = RopeSpec(10_000.0)

    @property
    def hidden_states(self) -> int:
        """How many hidden states :func:`all_hidden_states` gives: the embeddings and one per layer."""
        return self.num_hidden_layers + 1

    @classmethod
    def from_metadata(cls, config: dict[str, Any]) -> GemmaConfig:
        """Read a whole ``config.json``: of the multimodal model (with ``text_config``) or of the decoder alone.

        Raises:
            ValueError: not a Gemma 3, a needed value is absent, or a value asks for something that is not built.
        """
        if config.get("model_type") not in MODEL_TYPES:
            raise ValueError(f"model_type is {config.get('model_type')!r}; it must be one of {', '.join(MODEL_TYPES)}")
        text = config.get("text_config", config)
        for key, supported in {
            "hidden_activation": ("gelu_pytorch_tanh",),
            "attention_bias": (False,),
            "attn_logit_softcapping": (None,),
            "use_bidirectional_attention": (False, None),
        }.items():
            if text.get(key, supported[0]) not in supported:
                raise ValueError(f"{key} is {text[key]!r}; only {supported[0]!r} is supported")
        values: dict[str, Any] = {}
        for key in ("hidden_size", "num_hidden_layers", "intermediate_size"):
            if key not in text:
                raise ValueError(f"{key} is absent")
            values[key] = text[key]
        for key in cls.__dataclass_fields__:
            if key not in ("layer_types", "full_rope", "sliding_rope") and text.get(key) is not None:
                values[key] = text[key]
        return cls(
            **values,
            layer_types=_layer_types(text, values["num_hidden_layers"]),
            full_rope=_rope(text, FULL, text.get("rope_theta", 1_000_000.0), text.get("rope_scaling")),
            sliding_rope=_rope(text, SLIDING, text.get("rope_local_base_freq", 10_000.0), None),
        )


def _layer_types(text: dict[str, Any], layers: int) -> tuple[str, ...]:
    pattern = text.get("sliding_window_pattern", text.get("_sliding_window_pattern", 6))
    types = text.get("layer_types") or [SLIDING if (index + 1) % pattern else FULL for index in range(layers)]
    unknown = sorted(set(types) - {FULL, SLIDING})
    if unknown or len(types) != layers:
        raise ValueError(f"layer_types is {types!r}; {layers} of {FULL!r} or {SLIDING!r} are supported")
    return tuple(types)


def _rope(text: dict[str, Any], layer_type: str, theta: float, scaling: dict[str, Any] | None) -> RopeSpec:
    """From ``rope_parameters`` per layer type (transformers 5), or from the flat keys before it."""
    parameters = (text.get("rope_parameters") or {}).get(layer_type, scaling) or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ("default", "linear"):
        raise ValueError(f"rope_type of {layer_type} is {kind!r}; only 'default' and 'linear' are supported")
    return RopeSpec(parameters.get("rope_theta", theta), parameters["factor"] if kind == "linear" else 1.0)


class KeyValues:
    """The keys and values of one layer for all tokens that were read, in room that is made once.

    Args:
        capacity: how many tokens there will be at most.
        window: how many tokens back, its own included, a token of this layer looks; None for all.
    """

    def __init__(self, capacity: int, window: int | None):
        self.capacity, self.window = capacity, window
        self.length = 0
        self._room: tuple[mx.array, mx.array] | None = None

    def append(self, key: mx.array, value: mx.array) -> tuple[mx.array, mx.array]:
        """Add those of the next tokens, (B, heads, T, size); returns all that any of these tokens may look at.

        Raises:
            ValueError: there is no room for them.
        """
        T = key.shape[2]
        end = self.length + T
        if end > self.capacity:
            raise ValueError(f"{end} tokens do not fit into room for {self.capacity}")
        if self._room is None:
            shape = (*key.shape[:2], self.capacity, key.shape[3])
            self._room = mx.zeros(shape, dtype=key.dtype), mx.zeros(shape, dtype=value.dtype)
        keys, values = self._room
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        self.length = end
        first = 0 if self.window is None else max(0, end - T + 1 - self.window)
        return keys[:, :, first:end], values[:, :, first:end]


class GemmaNorm(nn.Module):
    """RMS norm times ``1 + weight``, in float32, given back in the dtype of ``x``."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = mx.zeros((dim,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        # 1 + weight would lose most of a small weight in bfloat16
        return mx.fast.rms_norm(x, 1.0 + self.weight.astype(mx.float32), self.eps).astype(x.dtype)


class GemmaAttention(nn.Module):
    """Grouped-query attention with per-head norms before the rotary positions."""

    def __init__(self, config: GemmaConfig, rope: RopeSpec):
        super().__init__()
        dim, size = config.hidden_size, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.scale = config.query_pre_attn_scalar**-0.5
        self.q_proj = nn.Linear(dim, self.heads * size, bias=False)
        self.k_proj = nn.Linear(dim, self.kv_heads * size, bias=False)
        self.v_proj = nn.Linear(dim, self.kv_heads * size, bias=False)
        self.o_proj = nn.Linear(self.heads * size, dim, bias=False)
        self.q_norm = GemmaNorm(size, config.rms_norm_eps)
        self.k_norm = GemmaNorm(size, config.rms_norm_eps)
        # wavelengths / 2 pi, from float64; the underscore keeps the table out of the parameters
        periods = rope.factor * np.power(rope.theta, np.arange(0, size, 2, dtype=np.float64) / size)
        self._periods = mx.array(periods.astype(np.float32))

    def __call__(
        self, x: mx.array, mask: mx.array | None, first_position: int, past: KeyValues | None = None
    ) -> mx.array:
        B, T, _ = x.shape
        query = self.q_norm(self.q_proj(x).reshape(B, T, self.heads, -1)).transpose(0, 2, 1, 3)
        key = self.k_norm(self.k_proj(x).reshape(B, T, self.kv_heads, -1)).transpose(0, 2, 1, 3)
        value = self.v_proj(x).reshape(B, T, self.kv_heads, -1).transpose(0, 2, 1, 3)
        query, key = self._rotate(query, first_position), self._rotate(key, first_position)
        if past is not None:
            key, value = past.append(key, value)
        result = mx.fast.scaled_dot_product_attention(query, key, value, scale=self.scale, mask=mask)
        return self.o_proj(result.transpose(0, 2, 1, 3).reshape(B, T, -1))

    def _rotate(self, x: mx.array, first_position: int) -> mx.array:
        # float32 inside, also for bfloat16
        return mx.fast.rope(
            x, x.shape[-1], traditional=False, base=None, scale=1.0, offset=first_position, freqs=self._periods
        )


class GemmaMlp(nn.Module):
    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(dim, inner, bias=False)
        self.up_proj = nn.Linear(dim, inner, bias=False)
        self.down_proj = nn.Linear(inner, dim, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.gelu_approx(self.gate_proj(x)) * self.up_proj(x))


class GemmaLayer(nn.Module):
    """Attention and feed-forward, each with a norm before and after."""

    def __init__(self, config: GemmaConfig, layer_type: str):
        super().__init__()
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = GemmaAttention(config, config.full_rope if layer_type == FULL else config.sliding_rope)
        self.mlp = GemmaMlp(dim, config.intermediate_size)
        self.input_layernorm = GemmaNorm(dim, eps)
        self.post_attention_layernorm = GemmaNorm(dim, eps)
        self.pre_feedforward_layernorm = GemmaNorm(dim, eps)
        self.post_feedforward_layernorm = GemmaNorm(dim, eps)

    def __call__(
        self, x: mx.array, mask: mx.array | None, first_position: int, past: KeyValues | None = None
    ) -> mx.array:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), mask, first_position, past))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Gemma(nn.Module):
    """The text decoder without its head; run it with :func:`all_hidden_states`."""

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [GemmaLayer(config, layer_type) for layer_type in config.layer_types]
        self.norm = GemmaNorm(config.hidden_size, config.rms_norm_eps)

    def embed(self, input_ids: mx.array) -> mx.array:
        """(B, S) to the scaled embeddings, (B, S, hidden_size)."""
        h = self.embed_tokens(input_ids)
        return h * mx.array(math.sqrt(self.config.hidden_size)).astype(h.dtype)


def all_hidden_states(
    model: Gemma, input_ids: mx.array, attention_mask: mx.array, first_position: int = 0
) -> Iterator[mx.array]:
    """Every hidden state of the text: the scaled embeddings, then the residual stream after each layer.

    The states come one by one and lazily: the caller evaluates each before it asks for the next, so that no GPU command
    buffer grows long. The last one has gone through the final norm, the others are raw.

    Args:
        input_ids: (B, S), integers.
        attention_mask: (B, S), 1 for tokens and 0 for padding, which is never attended to. Rows of padding hold finite
            numbers without meaning.
        first_position: rotary position of column 0; the others count on from it, over padding too.

    Yields:
        ``model.config.hidden_states`` arrays (B, S, hidden_size) in the dtype of the embedding.
    """
    config = model.config
    full = causal_mask(attention_mask, None)
    sliding = causal_mask(attention_mask, config.sliding_window)
    h = model.embed(input_ids)
    yield h
    last = config.num_hidden_layers - 1
    for index, (layer, layer_type) in enumerate(zip(model.layers, config.layer_types, strict=True)):
        h = layer(h, full if layer_type == FULL else sliding, first_position)
        yield model.norm(h) if index == last else h


def causal_mask(attention_mask: mx.array, window: int | None) -> mx.array:
    """Boolean (B, 1, S, S): what each token may look at, itself always (so that no row is empty and no softmax NaN)."""
    place = mx.arange(attention_mask.shape[1])
    distance = place[:, None] - place[None, :]
    allowed = distance >= 0
    if window is not None:
        allowed = allowed & (distance < window)
    allowed = allowed[None] & attention_mask.astype(mx.bool_)[:, None, :]
    return (allowed | (distance == 0)[None])[:, None]
