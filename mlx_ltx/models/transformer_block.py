"""A block of the transformer: what both streams go through 48 times (ltx_core/model/transformer/transformer.py)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_ltx.models.attention import Attention, FeedForward, KeysValues, rms_norm
from mlx_ltx.models.attention_bias import AttentionBias
from mlx_ltx.models.passes import Perturbation, StreamRope
from mlx_ltx.models.transformer_config import StreamConfig, TransformerConfig


class Modulation(NamedTuple):
    """AdaLN parameters, computed once per distinct noise level.

    Attributes:
        values: (B, U, rows, dim).
        level_of_token: (B, T) the level of each token, or None if U is 1 or T.
    """

    values: mx.array
    level_of_token: mx.array | None

    def rows(self, table: mx.array, first: int, last: int) -> list[mx.array]:
        """The sums of ``table`` rows and values, each (B, 1 or T, dim), in the dtype of the values."""
        sums = table[first:last].astype(self.values.dtype) + self.values[:, :, first:last]
        return [self._spread(sums[:, :, row]) for row in range(last - first)]

    def _spread(self, levels: mx.array) -> mx.array:
        if self.level_of_token is None:
            return levels
        B, U, dim = levels.shape
        if U == 2:
            # Choosing costs a tenth of gathering with its gradient, which adds row by row.
            return mx.where(self.level_of_token[..., None] == 0, levels[:, :1], levels[:, 1:])
        flat = self.level_of_token + U * mx.arange(B, dtype=self.level_of_token.dtype)[:, None]
        return mx.take(levels.reshape(B * U, dim), flat, axis=0)


class StreamState(NamedTuple):
    """One stream during a forward pass; only ``x`` changes from block to block."""

    x: mx.array
    embedded_timestep: Modulation
    modulation: Modulation
    context: mx.array
    prompt_modulation: mx.array | None
    context_bias: AttentionBias | None
    attention_bias: AttentionBias | None
    rope: StreamRope
    cross_modulation: Modulation | None
    cross_gate: Modulation | None
    frozen: bool


class StreamBlock(nn.Module):
    """One stream's part of a block.

    Args:
        cross_dim: inner width of attention to the other stream, or None in a model of one modality.
        other_dim: width of the other stream.
    """

    def __init__(self, config: TransformerConfig, stream: StreamConfig, cross_dim: int | None, other_dim: int):
        super().__init__()
        dim, heads, gated = stream.dim, stream.heads, config.gated_attention
        self._eps = config.norm_eps
        self.attn1 = Attention(dim, dim, heads, stream.head_dim, gated, config.norm_eps)
        self.attn2 = Attention(dim, stream.context_dim, heads, stream.head_dim, gated, config.norm_eps)
        self.ff = FeedForward(dim, stream.ff_bias)
        self.scale_shift_table = mx.zeros((9 if config.text_modulation else 6, dim))
        if config.text_modulation:
            self.prompt_scale_shift_table = mx.zeros((2, dim))
        if cross_dim is not None:
            self.cross_attn = Attention(dim, other_dim, heads, cross_dim // heads, gated, config.norm_eps)
            self.cross_scale_shift_table = mx.zeros((5, dim))

    def attend_to_self_and_text(
        self, state: StreamState, keep: mx.array | bool, texts: dict[Hashable, KeysValues] | None = None
    ) -> mx.array:
        shift, scale, gate = state.modulation.rows(self.scale_shift_table, 0, 3)
        normed = rms_norm(state.x, self._eps) * (1 + scale) + shift
        x = state.x + self.attn1(normed, rope=state.rope.own, bias=state.attention_bias, keep=keep) * gate

        normed = rms_norm(x, self._eps)
        text = self._text(state, {} if texts is None else texts)
        if "prompt_scale_shift_table" not in self:
            return x + self.attn2.attend_to(normed, text, state.context_bias)
        shift, scale, gate = state.modulation.rows(self.scale_shift_table, 6, 9)
        return x + self.attn2.attend_to(normed * (1 + scale) + shift, text, state.context_bias) * gate

    def _text(self, state: StreamState, texts: dict[Hashable, KeysValues]) -> KeysValues:
        """Keys and values of the text, made once for all passes that read it at the same noise level."""
        key = id(self), id(state.context), id(state.prompt_modulation)
        if key not in texts:
            context = state.context
            if "prompt_scale_shift_table" in self:
                table = self.prompt_scale_shift_table.astype(context.dtype)[None, None]
                if state.prompt_modulation is not None:
                    table = table + state.prompt_modulation
                context = context * (1 + table[:, :, 1]) + table[:, :, 0]
            texts[key] = self.attn2.keys_values(context)
        return texts[key]

    def cross_input(self, state: StreamState, rows: int) -> mx.array:
        """The stream's tokens as they enter attention between the streams; ``rows`` is 0 for a2v and 2 for v2a."""
        assert state.cross_modulation is not None
        scale, shift = state.cross_modulation.rows(self.cross_scale_shift_table[:4], rows, rows + 2)
        return rms_norm(state.x, self._eps) * (1 + scale) + shift

    def attend_to_other(
        self, state: StreamState, query: mx.array, context: mx.array, other: StreamRope, keep: mx.array | bool
    ) -> mx.array:
        assert state.cross_gate is not None
        (gate,) = state.cross_gate.rows(self.cross_scale_shift_table[4:], 0, 1)
        update = self.cross_attn(query, context, rope=state.rope.cross, context_rope=other.cross) * gate
        if isinstance(keep, mx.array):
            update = update * keep[:, 0].astype(update.dtype)[:, None]
        return state.x + update

    def feed_forward(self, state: StreamState) -> mx.array:
        shift, scale, gate = state.modulation.rows(self.scale_shift_table, 3, 6)
        return state.x + self.ff(rms_norm(state.x, self._eps) * (1 + scale) + shift) * gate


class Block(nn.Module):
    """One of the transformer's blocks, over both streams."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        video, audio = config.video, config.audio
        cross_dim = audio.dim if video and audio else None
        if video:
            self.video = StreamBlock(config, video, cross_dim, audio.dim if audio else 0)
        if audio:
            self.audio = StreamBlock(config, audio, cross_dim, video.dim if video else 0)

    def __call__(
        self,
        video: StreamState | None,
        audio: StreamState | None,
        index: int,
        perturbations: Sequence[Perturbation],
        texts: dict[Hashable, KeysValues] | None = None,
    ) -> tuple[StreamState | None, StreamState | None]:
        """The streams after the block.

        Args:
            index: the block's place in the model, for ``perturbations``.
            texts: what passes through this block share; filled here.
        """
        # 1. self-attention and cross-attention to the text
        if video is not None and not video.frozen:
            keep = _keep([index not in p.video_blocks for p in perturbations])
            video = video._replace(x=self.video.attend_to_self_and_text(video, keep, texts))
        if audio is not None and not audio.frozen:
            keep = _keep([index not in p.audio_blocks for p in perturbations])
            audio = audio._replace(x=self.audio.attend_to_self_and_text(audio, keep, texts))

        # 2. attention between the streams, both directions from the same state
        keep = _keep([not p.isolated for p in perturbations])
        if video is not None and audio is not None and keep is not False:
            before_video, before_audio = video, audio
            if not video.frozen:
                query = self.video.cross_input(before_video, 0)
                context = self.audio.cross_input(before_audio, 0)
                x = self.video.attend_to_other(before_video, query, context, audio.rope, keep)
                video = before_video._replace(x=x)
            if not audio.frozen:
                query = self.audio.cross_input(before_audio, 2)
                context = self.video.cross_input(before_video, 2)
                x = self.audio.attend_to_other(before_audio, query, context, video.rope, keep)
                audio = before_audio._replace(x=x)

        # 3. feed-forward
        if video is not None and not video.frozen:
            video = video._replace(x=self.video.feed_forward(video))
        if audio is not None and not audio.frozen:
            audio = audio._replace(x=self.audio.feed_forward(audio))
        return video, audio


def _keep(kept: list[bool]) -> mx.array | bool:
    """True if all samples keep the sub-layer, False if none does, otherwise (B, 1, 1) ones and zeros."""
    if all(kept):
        return True
    if not any(kept):
        return False
    return mx.array(kept, dtype=mx.float32)[:, None, None]
