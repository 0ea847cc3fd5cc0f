"""Connectors: small transformers between the text features and each modality's cross-attention.

Padding is replaced by learned registers, so that their result has no padding left
(ltx_core/text_encoders/gemma/{embeddings_connector,embeddings_processor}.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_ltx.models.attention import Attention, FeedForward, rms_norm
from mlx_ltx.models.rope import RopeTable, rope_table

THETA = 10_000.0
REGISTERS = 128


class TextEmbeddings(NamedTuple):
    """What the transformer attends to.

    Attributes:
        video: (B, S, video connector width).
        audio: (B, S, audio connector width). Every position counts: there is no padding left, hence no mask.
    """

    video: mx.array
    audio: mx.array


@dataclass(frozen=True)
class ConnectorConfig:
    """Sizes of one modality's connector.

    Attributes:
        heads, head_dim, layers: of the transformer; its width is ``heads * head_dim``.
        max_position: the position that rotary embeddings map to 1.
        interleaved, precision: see :mod:`mlx_ltx.models.rope`.
        gated: gates on the attention heads.
        ff_bias: biases in the feed-forward layers.
    """

    heads: int
    head_dim: int
    layers: int
    max_position: float
    interleaved: bool
    precision: str
    gated: bool
    ff_bias: bool

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    @classmethod
    def from_metadata(cls, config: dict[str, Any], modality: str) -> ConnectorConfig:
        """Read the checkpoint's config for ``"video"`` or ``"audio"``; audio sizes default to those of video.

        Raises:
            ValueError: a value asks for something that is not built.
        """
        transformer = config["transformer"]
        for key, supported in {
            "use_embeddings_connector": True,
            "connector_num_learnable_registers": REGISTERS,
            "connector_norm_output": True,
        }.items():
            if transformer.get(key, supported) != supported:
                raise ValueError(f"{key} is {transformer[key]!r}; only {supported!r} is supported")
        rope_type = transformer.get("rope_type", "split")
        if rope_type not in ("split", "interleaved"):
            raise ValueError(f"rope_type is {rope_type!r}; only 'split' and 'interleaved' are supported")
        max_positions = transformer.get("connector_positional_embedding_max_pos", [1])
        if len(max_positions) != 1:
            raise ValueError(f"connector_positional_embedding_max_pos is {max_positions!r}; only one axis is supported")

        def size(name: str, default: int) -> int:
            video = transformer.get(f"connector_{name}", default)
            return transformer.get(f"audio_connector_{name}", video) if modality == "audio" else video

        return cls(
            heads=size("num_attention_heads", 30),
            head_dim=size("attention_head_dim", 128),
            layers=size("num_layers", 2),
            max_position=max_positions[0],
            interleaved=rope_type == "interleaved",
            precision="float64" if transformer.get("frequencies_precision") == "float64" else "float32",
            gated=transformer.get("connector_apply_gated_attention", False),
            ff_bias=transformer.get("connector_ff_bias", True),
        )


class ConnectorBlock(nn.Module):
    """Self-attention and feed-forward, each on normalised tokens."""

    def __init__(self, config: ConnectorConfig):
        super().__init__()
        self.attn1 = Attention(config.dim, config.dim, config.heads, config.head_dim, config.gated)
        self.ff = FeedForward(config.dim, bias=config.ff_bias)

    def __call__(self, x: mx.array, rope: RopeTable) -> mx.array:
        x = x + self.attn1(rms_norm(x), rope=rope)
        return x + self.ff(rms_norm(x))


class Connector(nn.Module):
    """One modality's connector."""

    def __init__(self, config: ConnectorConfig):
        super().__init__()
        self.config = config
        self.learnable_registers = mx.zeros((REGISTERS, config.dim))
        self.transformer_1d_blocks = [ConnectorBlock(config) for _ in range(config.layers)]

    def blocks(self, features: mx.array, mask: mx.array) -> Iterator[mx.array]:
        """The tokens after each block, lazily; the last ones have gone through the final norm.

        The caller may evaluate each before it asks for the next, which keeps GPU command buffers short.

        Args:
            features: (B, S, dim) with the padding last; S is a multiple of 128.
            mask: (B, S), 1 for tokens and 0 for padding.

        Yields:
            (B, S, dim) in the dtype of the registers.

        Raises:
            ValueError: S is not a multiple of the number of registers.
        """
        S = features.shape[1]
        if S % REGISTERS:
            raise ValueError(f"{S} text tokens cannot be filled with {REGISTERS} registers; a multiple is needed")
        # 1. a register in every place of padding: the one of that place modulo their number
        registers = mx.tile(self.learnable_registers, (S // REGISTERS, 1))
        x = mx.where(mask.astype(mx.bool_)[..., None], features.astype(registers.dtype), registers)
        # 2. transformer over all places
        rope = self._rope(S)
        last = len(self.transformer_1d_blocks) - 1
        for index, block in enumerate(self.transformer_1d_blocks):
            x = block(x, rope)
            yield rms_norm(x) if index == last else x

    def __call__(self, features: mx.array, mask: mx.array) -> mx.array:
        """The result of the last of :meth:`blocks`."""
        result = features
        for x in self.blocks(features, mask):
            result = x
        return result

    def _rope(self, tokens: int) -> RopeTable:
        config = self.config
        return rope_table(
            np.arange(tokens, dtype=np.float32)[None, None],
            (config.max_position,),
            dim=config.dim,
            heads=config.heads,
            theta=THETA,
            interleaved=config.interleaved,
            precision=config.precision,
        )


class TextConnectors(nn.Module):
    """Both modalities' connectors."""

    def __init__(self, video: ConnectorConfig, audio: ConnectorConfig):
        super().__init__()
        self.video = Connector(video)
        self.audio = Connector(audio)

    @classmethod
    def from_metadata(cls, config: dict[str, Any]) -> TextConnectors:
        """Built from the checkpoint's whole config; errors as for :meth:`ConnectorConfig.from_metadata`."""
        return cls(ConnectorConfig.from_metadata(config, "video"), ConnectorConfig.from_metadata(config, "audio"))

    def __call__(self, video_features: mx.array, audio_features: mx.array, mask: mx.array) -> TextEmbeddings:
        """Connect features whose padding stands anywhere.

        Args:
            video_features, audio_features: (B, S, width of that connector).
            mask: (B, S), 1 for tokens and 0 for padding.

        Returns:
            (B, S, ...) with the tokens first, then what the registers became.
        """
        order = right_padded_order(mask)
        mask = mx.take_along_axis(mask, order, axis=1)
        order = order[..., None]
        # The reference multiplies video by a mask of what is still padding; the registers left none.
        return TextEmbeddings(
            self.video(mx.take_along_axis(video_features, order, axis=1), mask),
            self.audio(mx.take_along_axis(audio_features, order, axis=1), mask),
        )


def right_padded_order(mask: mx.array) -> mx.array:
    """Indices (B, S) that put the tokens of each row first and keep their order."""
    S = mask.shape[1]
    # distinct keys, because argsort does not promise to be stable
    return mx.argsort(mx.arange(S) + S * (1 - mask.astype(mx.int32)), axis=1)
