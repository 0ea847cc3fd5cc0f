"""The dual-stream audio-video transformer of LTX-2 (ltx_core/model/transformer).

Two token streams, video and audio, have the same structure at different widths: self-attention, cross-attention to the
text, attention to the other stream, feed-forward. Each sub-layer is modulated by the diffusion timestep (AdaLN). One
class serves both streams; the key map sorts the official names (``attn1``, ``audio_attn1``) under ``video.`` and
``audio.``.
"""

from __future__ import annotations

from collections.abc import Generator, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_ltx.models.attention import Attention, FeedForward, KeysValues, rms_norm
from mlx_ltx.models.passes import PassInput, Perturbation, StreamInput, StreamRope, shared_passes
from mlx_ltx.models.rope import RopeTable, rope_table
from mlx_ltx.models.timestep import TimestepEmbedder

# What every published checkpoint says and this implementation takes for granted (model_configurator.py).
REQUIRED = {
    "dropout": 0.0, "attention_bias": True, "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000,
    "num_vector_embeds": None, "use_linear_projection": False, "only_cross_attention": False,
    "cross_attention_norm": True, "double_self_attention": False, "upcast_attention": False,
    "standardization_norm": "rms_norm", "norm_elementwise_affine": False, "qk_norm": "rms_norm",
    "positional_embedding_type": "rope", "use_audio_video_cross_attention": True, "share_ff": False,
    "av_cross_ada_norm": True, "use_middle_indices_grid": True, "causal_temporal_positioning": True,
}  # fmt: skip
PRECISIONS = {"float64": "float64", "float32": "float32", False: "float32", None: "float32"}


@dataclass(frozen=True)
class StreamConfig:
    """One modality's sizes.

    Attributes:
        heads, head_dim: self-attention; their product is the stream's width.
        in_channels, out_channels: channels of a latent token.
        context_dim: width of the text tokens that the blocks attend to.
        max_positions: per position axis, what counts as 1 (seconds, pixels, pixels; or seconds).
        ff_bias: whether the feed-forward layers have biases.
        prompt_adaln: whether the timestep also modulates the text tokens.
        caption_channels: width of text embeddings before the stream's own projection, or None without one.
        keyframe_embedding: whether tokens of single pixel frames carry a learned mark.
    """

    heads: int
    head_dim: int
    in_channels: int
    out_channels: int
    context_dim: int
    max_positions: tuple[float, ...]
    ff_bias: bool
    prompt_adaln: bool
    caption_channels: int | None
    keyframe_embedding: bool = False

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim


@dataclass(frozen=True)
class TransformerConfig:
    """The transformer's shape; ``video`` or ``audio`` is None in a model of one modality.

    Attributes:
        text_modulation: cross-attention to the text has its own scale, shift and gate (``cross_attention_adaln``).
        timestep_scale: sigma times this is the timestep of AdaLN.
        gate_timestep_scale: the same for the gates between the streams.
    """

    layers: int
    video: StreamConfig | None
    audio: StreamConfig | None
    norm_eps: float
    rope_theta: float
    rope_interleaved: bool
    rope_precision: str
    timestep_scale: float
    gate_timestep_scale: float
    gated_attention: bool
    text_modulation: bool

    @classmethod
    def from_metadata(cls, config: dict[str, Any], video: bool = True, audio: bool = True) -> TransformerConfig:
        """Read the config of a checkpoint; ``video`` and ``audio`` choose the streams to build.

        Raises:
            ValueError: the config asks for something that is not implemented; the message names it.
        """
        if "transformer" not in config:
            raise ValueError("the config has no transformer section")
        values = config["transformer"]
        for key, required in REQUIRED.items():
            if values.get(key, required) != required:
                raise ValueError(f"transformer config {key}={values[key]!r} is not supported, only {required!r}")
        if values.get("rope_type", "split") not in ("split", "interleaved"):
            raise ValueError(f"transformer config rope_type={values['rope_type']!r} is not supported")
        if values.get("frequencies_precision", False) not in PRECISIONS:
            raise ValueError(
                f"transformer config frequencies_precision={values['frequencies_precision']!r} is not supported"
            )
        heads = values.get("num_attention_heads", 32)
        if video and audio and heads != values.get("audio_num_attention_heads", 32):
            raise ValueError("transformer config: video and audio must have the same number of attention heads")
        text_modulation = values.get("cross_attention_adaln", False)
        prompt_adaln = text_modulation and values.get("use_prompt_adaln_single", True)
        # With the caption projection before the connectors, text arrives at each stream's own width.
        own_projection = not values.get("caption_proj_before_connector", False)
        caption_channels = values.get("caption_channels", 3840) if own_projection else None
        return cls(
            layers=values.get("num_layers", 48),
            video=StreamConfig(
                heads=heads,
                head_dim=values.get("attention_head_dim", 128),
                in_channels=values.get("in_channels", 128),
                out_channels=values.get("out_channels", 128),
                context_dim=values.get("cross_attention_dim", 4096),
                max_positions=tuple(values.get("positional_embedding_max_pos", [20, 2048, 2048])),
                ff_bias=values.get("ff_bias", True),
                prompt_adaln=prompt_adaln,
                caption_channels=caption_channels,
                keyframe_embedding=values.get("use_keyframes_abs_pos_embedding", False),
            )
            if video
            else None,
            audio=StreamConfig(
                heads=values.get("audio_num_attention_heads", 32),
                head_dim=values.get("audio_attention_head_dim", 64),
                in_channels=values.get("audio_in_channels", 128),
                out_channels=values.get("audio_out_channels", 128),
                context_dim=values.get("audio_cross_attention_dim", 2048),
                max_positions=tuple(values.get("audio_positional_embedding_max_pos", [20])),
                ff_bias=values.get("audio_ff_bias", True),
                prompt_adaln=prompt_adaln,
                caption_channels=caption_channels,
            )
            if audio
            else None,
            norm_eps=values.get("norm_eps", 1e-6),
            rope_theta=values.get("positional_embedding_theta", 10_000.0),
            rope_interleaved=values.get("rope_type", "split") == "interleaved",
            rope_precision=PRECISIONS[values.get("frequencies_precision", False)],
            timestep_scale=values.get("timestep_scale_multiplier", 1000),
            gate_timestep_scale=values.get("av_ca_timestep_scale_multiplier", 1),
            gated_attention=values.get("apply_gated_attention", False),
            text_modulation=text_modulation,
        )


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
        flat = self.level_of_token + U * mx.arange(B, dtype=self.level_of_token.dtype)[:, None]
        return mx.take(levels.reshape(B * U, dim), flat, axis=0)


class AdaLayerNormSingle(nn.Module):
    """From noise levels to ``rows`` modulation vectors and the embedding that they come from."""

    def __init__(self, dim: int, rows: int):
        super().__init__()
        self.emb = TimestepEmbedder(dim)
        self.linear = nn.Linear(dim, rows * dim)

    def __call__(self, timesteps: mx.array) -> tuple[mx.array, mx.array]:
        """(B, U) timesteps to (B, U, rows, dim) and (B, U, dim)."""
        embedded = self.emb(timesteps)
        modulation = self.linear(nn.silu(embedded))
        return modulation.reshape(*timesteps.shape, -1, embedded.shape[-1]), embedded


class CaptionProjection(nn.Module):
    """Text embeddings to a stream's width (first generation only; later ones project before the connectors)."""

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(channels, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear_2(nn.gelu_approx(self.linear_1(x)))


class StreamState(NamedTuple):
    """One stream during a forward pass; only ``x`` changes from block to block."""

    x: mx.array
    embedded_timestep: Modulation
    modulation: Modulation
    context: mx.array
    prompt_modulation: mx.array | None
    context_mask: mx.array | None
    attention_bias: mx.array | None
    rope: StreamRope
    cross_modulation: Modulation | None
    cross_gate: Modulation | None
    frozen: bool


class StreamEnds(nn.Module):
    """A stream's layers before and after the blocks."""

    def __init__(self, config: TransformerConfig, stream: StreamConfig, joint: bool):
        super().__init__()
        self._config = config
        dim = stream.dim
        self.patchify_proj = nn.Linear(stream.in_channels, dim)
        self.adaln_single = AdaLayerNormSingle(dim, 9 if config.text_modulation else 6)
        if stream.prompt_adaln:
            self.prompt_adaln_single = AdaLayerNormSingle(dim, 2)
        if stream.caption_channels is not None:
            self.caption_projection = CaptionProjection(stream.caption_channels, dim)
        if stream.keyframe_embedding:
            self.keyframes_abs_pos_embedding = mx.zeros((1, dim))
        if joint:
            self.cross_adaln = AdaLayerNormSingle(dim, 4)
            self.cross_gate_adaln = AdaLayerNormSingle(dim, 1)
        self.scale_shift_table = mx.zeros((2, dim))
        self.proj_out = nn.Linear(dim, stream.out_channels)

    def prepare(self, given: StreamInput, other: StreamInput | None) -> StreamState:
        """Embed the tokens and everything that depends on the noise level but not on the block."""
        config = self._config
        dtype = self.patchify_proj.bias.dtype
        x = self.patchify_proj(given.latent.astype(dtype))
        if "keyframes_abs_pos_embedding" in self and given.keyframes_mask is not None:
            marked = (given.keyframes_mask > 0).astype(x.dtype)
            x = x + marked[..., None] * self.keyframes_abs_pos_embedding.astype(x.dtype)

        timesteps = given.timesteps.astype(mx.float32) * config.timestep_scale
        values, embedded = self.adaln_single(timesteps)
        modulation = Modulation(values, given.level_of_token)
        prompt_modulation = None
        if "prompt_adaln_single" in self:
            sigma = given.sigma.astype(mx.float32) * config.timestep_scale
            prompt_modulation, _ = self.prompt_adaln_single(sigma[:, None])

        cross_modulation = cross_gate = None
        if other is not None:
            # The scales and shifts follow the stream's own noise level, the gate the other stream's.
            cross_modulation = Modulation(self.cross_adaln(timesteps)[0], given.level_of_token)
            gate_timestep = other.sigma.astype(mx.float32) * config.gate_timestep_scale
            cross_gate = Modulation(self.cross_gate_adaln(gate_timestep[:, None])[0], None)

        context = given.context.astype(dtype)
        if "caption_projection" in self:
            context = self.caption_projection(context)
        return StreamState(
            x=x,
            embedded_timestep=Modulation(embedded[:, :, None], given.level_of_token),
            modulation=modulation,
            context=context,
            prompt_modulation=prompt_modulation,
            context_mask=None if given.context_mask is None else _context_bias(given.context_mask, dtype),
            attention_bias=given.attention_bias,
            rope=given.rope,
            cross_modulation=cross_modulation,
            cross_gate=cross_gate,
            frozen=given.frozen,
        )

    def finish(self, state: StreamState) -> mx.array:
        """From hidden states to the predicted velocity, (B, T, out_channels)."""
        (embedded,) = state.embedded_timestep.rows(mx.zeros((1, 1), state.x.dtype), 0, 1)
        table = self.scale_shift_table.astype(state.x.dtype)
        shift, scale = table[0] + embedded, table[1] + embedded
        normed = mx.fast.layer_norm(state.x, None, None, self._config.norm_eps)
        return self.proj_out(normed * (1 + scale) + shift)


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
        x = state.x + self.attn1(normed, rope=state.rope.own, mask=state.attention_bias, keep=keep) * gate

        normed = rms_norm(x, self._eps)
        text = self._text(state, {} if texts is None else texts)
        if "prompt_scale_shift_table" not in self:
            return x + self.attn2.attend_to(normed, text, state.context_mask)
        shift, scale, gate = state.modulation.rows(self.scale_shift_table, 6, 9)
        return x + self.attn2.attend_to(normed * (1 + scale) + shift, text, state.context_mask) * gate

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


class Velocities(NamedTuple):
    """Predicted velocities (noise minus clean), (B, T, out_channels) per stream; None for a stream not given."""

    video: mx.array | None
    audio: mx.array | None


class Transformer(nn.Module):
    """The whole network: noisy latent tokens, noise levels and text in, velocities out."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self._config = config
        joint = config.video is not None and config.audio is not None
        if config.video:
            self.video = StreamEnds(config, config.video, joint)
        if config.audio:
            self.audio = StreamEnds(config, config.audio, joint)
        self.blocks = [Block(config) for _ in range(config.layers)]
        self._source: Iterable[Block] | None = None

    def take_blocks_from(self, source: Iterable[Block]) -> None:
        """Compute with the blocks that ``source`` gives instead of the model's own, whose weights can stay unread.

        Args:
            source: each forward pass iterates over it once, and drops every block before it asks for the next.
        """
        self._source = source

    @property
    def config(self) -> TransformerConfig:
        return self._config

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of weights and activations."""
        ends = self.video if self._config.video else self.audio
        return ends.patchify_proj.bias.dtype

    def rope(self, video: np.ndarray | None, audio: np.ndarray | None) -> tuple[StreamRope | None, StreamRope | None]:
        """Rotary tables, to be made once per run.

        Args:
            video: float32 (B, 3, T, 2), the [start, end) of every token in seconds, pixels, pixels; None without video.
            audio: float32 (B, 1, T, 2), in seconds; None without audio.
        """
        return self._stream_rope(self._config.video, video), self._stream_rope(self._config.audio, audio)

    def attention_bias(self, strengths: mx.array) -> mx.array:
        """What is added to attention logits between tokens of a stream, to be made once per run.

        Args:
            strengths: (B, T, T) in [0, 1], how strongly tokens attend to each other.

        Returns:
            (B, 1, T, T) in the dtype of activations: the logarithm, and the lowest number for 0.
        """
        smallest = float(np.finfo(np.float32).tiny)
        bias = mx.log(mx.maximum(strengths.astype(mx.float32), smallest))
        return mx.where(strengths > 0, bias, mx.finfo(self.dtype).min).astype(self.dtype)[:, None]

    def _stream_rope(self, stream: StreamConfig | None, positions: np.ndarray | None) -> StreamRope | None:
        if positions is None:
            return None
        if stream is None:
            raise ValueError("positions were given for a stream that this model does not have")
        config = self._config
        middle = (positions[..., 0] + positions[..., 1]) / np.float32(2)
        precision, interleaved = config.rope_precision, config.rope_interleaved

        def table(middle: np.ndarray, max_positions: tuple[float, ...], dim: int) -> RopeTable:
            return rope_table(
                middle,
                max_positions,
                dim=dim,
                heads=stream.heads,
                theta=config.rope_theta,
                interleaved=interleaved,
                precision=precision,
            )

        cross = None
        if config.video and config.audio:
            longest = max(config.video.max_positions[0], config.audio.max_positions[0])
            cross = table(middle[:, :1], (longest,), config.audio.dim)
        return StreamRope(table(middle, stream.max_positions, stream.dim), cross)

    def __call__(
        self,
        video: StreamInput | None = None,
        audio: StreamInput | None = None,
        perturbations: Sequence[Perturbation] = (Perturbation(),),
    ) -> Velocities:
        """One forward pass without evaluation points; see :meth:`forward`."""
        steps = self.forward(video, audio, perturbations)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return end.value

    def forward(
        self,
        video: StreamInput | None,
        audio: StreamInput | None,
        perturbations: Sequence[Perturbation] = (Perturbation(),),
    ) -> Generator[list[mx.array], None, Velocities]:
        """A single pass of :meth:`forward_passes`."""
        (velocities,) = yield from self.forward_passes([PassInput(video, audio, perturbations)])
        return velocities

    def forward_passes(self, passes: Sequence[PassInput]) -> Generator[list[mx.array], None, list[Velocities]]:
        """Forward passes side by side, block after block, stopping after everything that a block computes.

        Each block is asked for once for all passes, and computes once what passes have in common
        (:func:`shared_passes`). In return the hidden states of all passes are in memory, (B, T, dim) each.

        The caller decides when to evaluate what is yielded: lazy evaluation of all blocks at once makes GPU command
        buffers that the macOS watchdog kills.

        Yields:
            The hidden states of the streams, :meth:`evaluations` times.

        Returns:
            The velocities of each pass.
        """
        if any(given.video is None and given.audio is None for given in passes):
            raise ValueError("a forward pass needs at least one stream")
        prepared: dict[Hashable, tuple[StreamState | None, StreamState | None]] = {}
        states = []
        for video, audio, _ in passes:
            key = id(video), id(audio)
            if key not in prepared:
                prepared[key] = (
                    self.video.prepare(video, audio) if video is not None else None,
                    self.audio.prepare(audio, video) if audio is not None else None,
                )
            states.append(prepared[key])
        prepared.clear()  # holds the embedded tokens otherwise
        source = iter(self.blocks if self._source is None else self._source)
        groups: list[list[int]] = []
        for index, groups in enumerate(shared_passes(passes, self._config.layers)):
            block = next(source)
            # Text is not kept from step to step: for the full model that is 1.2 GB per text and saves 2% of the work.
            texts: dict[Hashable, KeysValues] = {}
            for group in groups:
                first = group[0]
                after = block(*states[first], index, passes[first].perturbations, texts)
                for position in group:
                    states[position] = after
                yield [state.x for state in after if state is not None]
            del block, texts  # a streamed block goes before the next one comes
        results: dict[int, Velocities] = {}
        for group in groups:
            video_state, audio_state = states[group[0]]
            velocities = Velocities(
                self.video.finish(video_state) if video_state is not None else None,
                self.audio.finish(audio_state) if audio_state is not None else None,
            )
            results |= dict.fromkeys(group, velocities)
        return [results[position] for position in range(len(passes))]

    def evaluations(self, passes: Sequence[PassInput]) -> int:
        """How many blocks :meth:`forward_passes` computes."""
        return sum(map(len, shared_passes(passes, self._config.layers)))


def _keep(kept: list[bool]) -> mx.array | bool:
    """True if all samples keep the sub-layer, False if none does, otherwise (B, 1, 1) ones and zeros."""
    if all(kept):
        return True
    if not any(kept):
        return False
    return mx.array(kept, dtype=mx.float32)[:, None, None]


def _context_bias(mask: mx.array, dtype: mx.Dtype) -> mx.array:
    """(B, S) or (B, T, S) ones and zeros to an additive bias (B, 1, 1 or T, S)."""
    bias = mx.where(mask > 0, 0.0, mx.finfo(dtype).min).astype(dtype)
    return bias[:, None, None] if mask.ndim == 2 else bias[:, None]
