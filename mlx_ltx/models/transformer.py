"""The dual-stream audio-video transformer of LTX-2 (ltx_core/model/transformer).

Two token streams, video and audio, have the same structure at different widths: self-attention, cross-attention to the
text, attention to the other stream, feed-forward. Each sub-layer is modulated by the diffusion timestep (AdaLN). One
class serves both streams; the key map sorts the official names (``attn1``, ``audio_attn1``) under ``video.`` and
``audio.``.
"""

from __future__ import annotations

from collections.abc import Generator, Hashable, Iterable, Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_ltx.models.attention import KeysValues, rms_norm
from mlx_ltx.models.passes import PassInput, Perturbation, StreamInput, StreamRope, shared_passes
from mlx_ltx.models.rope import RopeTable, rope_table
from mlx_ltx.models.step_memory import StepMemory, Streams
from mlx_ltx.models.timestep import TimestepEmbedder
from mlx_ltx.models.transformer_block import Block, Modulation, StreamState
from mlx_ltx.models.transformer_config import StreamConfig, TransformerConfig


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
            context_bias=given.context_bias,
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

    def forward_passes(
        self, passes: Sequence[PassInput], memory: StepMemory | None = None
    ) -> Generator[list[mx.array], None, list[Velocities]]:
        """Forward passes side by side, block after block, stopping after everything that a block computes.

        Each block is asked for once for all passes, and computes once what passes have in common
        (:func:`shared_passes`). In return the hidden states of all passes are in memory, (B, T, dim) each.

        The caller decides when to evaluate what is yielded: lazy evaluation of all blocks at once makes GPU command
        buffers that the macOS watchdog kills.

        Args:
            memory: what :meth:`reuse` needs is put there, another (B, T, dim) per pass and stream.

        Yields:
            The hidden states of the streams, :meth:`evaluations` times.

        Returns:
            The velocities of each pass.
        """
        states = self._prepare(passes)
        before = None if memory is None else list(states)
        source = iter(self.blocks if self._source is None else self._source)
        groups: list[list[int]] = []
        for index, groups in enumerate(shared_passes(passes, self._config.layers)):
            block = next(source)
            if memory is not None and index == 0:
                memory.see_first(block, passes[0])
            # Text is not kept from step to step: for the full model that is 1.2 GB per text and saves 2% of the work.
            texts: dict[Hashable, KeysValues] = {}
            for group in groups:
                first = group[0]
                after = block(*states[first], index, passes[first].perturbations, texts)
                for position in group:
                    states[position] = after
                yield [state.x for state in after if state is not None]
            del block, texts  # a streamed block goes before the next one comes
        if memory is not None and before is not None:
            memory.see_passes(before, states)
        return self._finish(states, groups)

    def reuse(self, passes: Sequence[PassInput], memory: StepMemory) -> list[Velocities]:
        """The velocities of passes like those that left ``memory``, if the blocks added to them what they did then."""
        return self._finish(memory.after(self._prepare(passes)), [[position] for position in range(len(passes))])

    def first_input(self, given: PassInput, memory: StepMemory) -> mx.array:
        """(B, T, dim): what self-attention in the first block is given, of the picture (of the sound without one)."""
        assert memory.table is not None
        video, audio = self._prepare([given])[0]
        state = video if video is not None else audio
        assert state is not None
        shift, scale = state.modulation.rows(memory.table, 0, 2)
        return rms_norm(state.x, self._config.norm_eps) * (1 + scale) + shift

    def _prepare(self, passes: Sequence[PassInput]) -> list[Streams]:
        if any(given.video is None and given.audio is None for given in passes):
            raise ValueError("a forward pass needs at least one stream")
        prepared: dict[Hashable, Streams] = {}
        for video, audio, _ in passes:
            key = id(video), id(audio)
            if key not in prepared:
                prepared[key] = (
                    self.video.prepare(video, audio) if video is not None else None,
                    self.audio.prepare(audio, video) if audio is not None else None,
                )
        return [prepared[id(given.video), id(given.audio)] for given in passes]

    def _finish(self, states: Sequence[Streams], groups: Sequence[Sequence[int]]) -> list[Velocities]:
        results: dict[int, Velocities] = {}
        for group in groups:
            video_state, audio_state = states[group[0]]
            velocities = Velocities(
                self.video.finish(video_state) if video_state is not None else None,
                self.audio.finish(audio_state) if audio_state is not None else None,
            )
            results |= dict.fromkeys(group, velocities)
        return [results[position] for position in range(len(states))]

    def evaluations(self, passes: Sequence[PassInput]) -> int:
        """How many blocks :meth:`forward_passes` computes."""
        return sum(map(len, shared_passes(passes, self._config.layers)))
