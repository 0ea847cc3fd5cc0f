"""What the sampler moves from noise to clean: the tokens of one modality, and what is given of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from mlx_ltx.models.attention_bias import GroupBias
from mlx_ltx.sampling.geometry import AudioGrid, VideoGrid
from mlx_ltx.sampling.noise import Noise


@dataclass(frozen=True)
class AttentionGroups:
    """How strongly tokens attend to each other, as two numbers per token instead of a (T, T) table.

    Within a group tokens attend to each other fully. The clip's own tokens and a token of another group attend to each
    other with that token's strength. Groups other than the clip's do not see each other.

    Attributes:
        group: int32 (T,), 0 for the clip's own tokens.
        strength: float32 (T,) in [0, 1], 1 for the clip's own tokens.
    """

    group: np.ndarray
    strength: np.ndarray

    @classmethod
    def before_any(cls, own: int, appended: int) -> AttentionGroups:
        """Full attention: ``own`` tokens of the clip, and what was appended so far as one group."""
        group = np.repeat(np.array([0, 1], np.int32), [own, appended])
        return cls(group, np.ones(own + appended, np.float32))

    def extended(self, strength: np.ndarray) -> AttentionGroups:
        """With one more group, of tokens of this strength."""
        if not ((strength >= 0) & (strength <= 1)).all():
            raise ValueError("attention strengths must lie between 0 and 1")
        group = np.full(len(strength), self.group.max() + 1, np.int32)
        return AttentionGroups(np.append(self.group, group), np.append(self.strength, strength.astype(np.float32)))

    def bias(self, dtype: mx.Dtype) -> GroupBias:
        """For attention of the tokens to each other, in the dtype of activations."""
        return GroupBias.among(mx.array(self.group), mx.array(self.strength), dtype)


@dataclass(frozen=True)
class LatentState:
    """The tokens of one modality during sampling.

    Attributes:
        latent: float32 (B, T, C), noisy tokens; the clip's own come first, appended conditioning tokens after them.
        clean: float32 (B, T, C), what is given (zero where nothing is).
        mask: float32 (T,), 1 where a token is generated, 0 where it is given, between for a strength between.
        positions: float32 (1, axes, T, 2), see :class:`VideoGrid` and :class:`AudioGrid`.
        keyframes: float32 (T,), 1 for tokens that encode a single pixel frame; None for audio.
        groups: how strongly tokens attend to each other; None for fully.
        frozen: the modality is given as a whole; its noise level counts as 0.
    """

    latent: mx.array
    clean: mx.array
    mask: np.ndarray
    positions: np.ndarray
    keyframes: np.ndarray | None = None
    groups: AttentionGroups | None = None
    frozen: bool = False

    @property
    def tokens(self) -> int:
        return self.latent.shape[1]

    def noised(self, noise: mx.array, scale: float = 1.0) -> LatentState:
        """Mix in noise (same shape as ``latent``) where the mask allows it; ``scale`` 1 leaves nothing else."""
        mixed = self.latent + scale * (noise - self.latent) if scale != 1.0 else noise
        return replace(self, latent=self.keep_given(mixed))

    def keep_given(self, latent: mx.array) -> mx.array:
        """Blend generated tokens with given ones by the mask (of a prediction of x0, or of noised tokens)."""
        if (self.mask == 1).all():
            return latent
        mask = mx.array(self.mask)[None, :, None]
        return self.clean + mask * (latent - self.clean)

    def levels(self) -> tuple[np.ndarray, np.ndarray | None]:
        """The distinct values of the mask, and for each token which one it has (None if there is only one)."""
        values, index = np.unique(self.mask, return_inverse=True)
        return values, (index.astype(np.int32) if len(values) > 1 else None)

    def freeze(self) -> LatentState:
        """Given as a whole: nothing is generated, and the other modality sees it as free of noise."""
        return replace(self, latent=self.clean, mask=np.zeros_like(self.mask), frozen=True)

    def appended(
        self,
        clean: mx.array,
        positions: np.ndarray,
        mask: float,
        *,
        latent: mx.array | None = None,
        keyframe: bool = False,
    ) -> LatentState:
        """With tokens after the last one, which every token attends to fully (of a later group only the clip's own).

        Args:
            clean: (B, N, C), what is given.
            positions: float32 (1, axes, N, 2).
            mask: of all new tokens.
            latent: (B, N, C), what noise is mixed into; zeros if None.
            keyframe: they encode single pixel frames that are generated.
        """
        clean = clean.astype(mx.float32)
        count = clean.shape[1]
        latent = mx.zeros_like(clean) if latent is None else latent.astype(mx.float32)
        marks = np.full(count, float(keyframe), np.float32)
        return replace(
            self,
            latent=mx.concatenate([self.latent, latent], axis=1),
            clean=mx.concatenate([self.clean, clean], axis=1),
            mask=np.append(self.mask, np.full(count, mask, np.float32)),
            positions=np.concatenate([self.positions, positions], axis=2),
            keyframes=None if self.keyframes is None else np.append(self.keyframes, marks),
            groups=None if self.groups is None else self.groups.extended(np.ones(count, np.float32)),
        )


class Latents(NamedTuple):
    """One array per modality; None for a modality that is not there."""

    video: mx.array | None
    audio: mx.array | None


class States(NamedTuple):
    """One state per modality; None for a modality that is not there."""

    video: LatentState | None
    audio: LatentState | None


class Conditioning(Protocol):
    """Something given of a clip's picture; see :mod:`mlx_ltx.sampling.conditioning`."""

    def apply(self, state: LatentState, grid: VideoGrid) -> LatentState: ...


class AudioConditioning(Protocol):
    """Something given of a clip's sound; see :mod:`mlx_ltx.sampling.conditioning`."""

    def apply(self, state: LatentState, grid: AudioGrid) -> LatentState: ...


def video_state(
    grid: VideoGrid, conditionings: Sequence[Conditioning] = (), initial: mx.array | None = None
) -> LatentState:
    """The state of a clip's picture before noise.

    Args:
        grid: the clip's latent grid.
        conditionings: given content, applied in order.
        initial: (B, F, H, W, C) latent to refine; zeros if None.
    """
    shape = (1, grid.tokens, grid.channels)
    tokens = mx.zeros(shape) if initial is None else grid.patchify(initial).astype(mx.float32)
    first_frame = (np.arange(grid.tokens) < grid.tokens_per_frame).astype(np.float32)
    state = LatentState(
        latent=tokens,
        clean=tokens,
        mask=np.ones(grid.tokens, np.float32),
        positions=grid.positions(),
        keyframes=first_frame,
    )
    for conditioning in conditionings:
        state = conditioning.apply(state, grid)
    return state


def audio_state(
    grid: AudioGrid, conditionings: Sequence[AudioConditioning] = (), initial: mx.array | None = None
) -> LatentState:
    """The state of a clip's sound before noise.

    Args:
        grid: the clip's latent grid.
        conditionings: given content, applied in order.
        initial: (B, T, M, C) latent to refine; zeros if None.
    """
    shape = (1, grid.frames, grid.channels * grid.bins)
    tokens = mx.zeros(shape) if initial is None else grid.patchify(initial).astype(mx.float32)
    state = LatentState(latent=tokens, clean=tokens, mask=np.ones(grid.frames, np.float32), positions=grid.positions())
    for conditioning in conditionings:
        state = conditioning.apply(state, grid)
    return state


def add_noise(state: LatentState, noise: Noise, scale: float = 1.0) -> LatentState:
    """Draw noise for every token of ``state``, appended ones included, and mix it in."""
    return state.noised(noise(state.latent.shape), scale)
