"""What the transformer is given for a forward pass, and what several passes have in common."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from mlx_ltx.models.attention_bias import AttentionBias
from mlx_ltx.models.rope import RopeTable


class StreamRope(NamedTuple):
    """Rotary tables of one stream: for its self-attention, and for attention between the streams (time only)."""

    own: RopeTable
    cross: RopeTable | None


@dataclass(frozen=True)
class StreamInput:
    """What one stream is given in a forward pass.

    Attributes:
        latent: (B, T, in_channels) noisy tokens.
        sigma: (B,) float32, the noise level of the modality.
        timesteps: (B, U) float32, noise levels of tokens. U is 1 (all alike), T (one each), or the number of distinct
            levels that ``level_of_token`` points into.
        context: (B, S, context_dim or caption_channels) text embeddings.
        rope: from :meth:`mlx_ltx.models.transformer.Transformer.rope`.
        level_of_token: (B, T) int32 index into ``timesteps``, or None.
        context_bias: which text a token attends to; None attends to all.
        attention_bias: how strongly tokens attend to each other; None is fully.
        keyframes_mask: (B, T), positive for tokens that encode a single pixel frame; None marks none.
        frozen: the stream stays as it is and only serves the other one as context.
    """

    latent: mx.array
    sigma: mx.array
    timesteps: mx.array
    context: mx.array
    rope: StreamRope
    level_of_token: mx.array | None = None
    context_bias: AttentionBias | None = None
    attention_bias: AttentionBias | None = None
    keyframes_mask: mx.array | None = None
    frozen: bool = False


@dataclass(frozen=True)
class Perturbation:
    """What one sample's pass leaves out, for guidance.

    Attributes:
        video_blocks, audio_blocks: blocks whose self-attention gives its value projection instead (STG).
        isolated: the streams do not attend to each other, in any block.
    """

    video_blocks: frozenset[int] = frozenset()
    audio_blocks: frozenset[int] = frozenset()
    isolated: bool = False


class PassInput(NamedTuple):
    """One forward pass of several that are made together.

    Attributes:
        video, audio: the streams; at least one.
        perturbations: one per sample, or a single one for all.
    """

    video: StreamInput | None
    audio: StreamInput | None
    perturbations: Sequence[Perturbation] = (Perturbation(),)

    def effect(self, block: int) -> Hashable:
        """What the perturbations change in one block; passes of equal input and equal effect give the same."""
        return tuple(
            (
                _perturbs(self.video, block, perturbation.video_blocks),
                _perturbs(self.audio, block, perturbation.audio_blocks),
                perturbation.isolated and self.video is not None and self.audio is not None,
            )
            for perturbation in self.perturbations
        )


def _perturbs(stream: StreamInput | None, block: int, blocks: frozenset[int]) -> bool:
    return stream is not None and not stream.frozen and block in blocks


def shared_passes(passes: Sequence[PassInput], layers: int) -> list[list[list[int]]]:
    """Which passes are still the same at every block.

    Passes that are given the very same streams start together, and part at the first block that one of them perturbs
    and the other does not (STG: the perturbed pass is the conditional one up to there). What has parted stays apart.

    Returns:
        For each block, groups of positions in ``passes``; a block is computed once per group.
    """
    starts: dict[Hashable, list[int]] = {}
    for position, given in enumerate(passes):
        starts.setdefault((id(given.video), id(given.audio)), []).append(position)
    groups = list(starts.values())
    of_blocks = []
    for block in range(layers):
        parted: list[list[int]] = []
        for group in groups:
            effects: dict[Hashable, list[int]] = {}
            for position in group:
                effects.setdefault(passes[position].effect(block), []).append(position)
            parted += effects.values()
        groups = parted
        of_blocks.append(groups)
    return of_blocks
