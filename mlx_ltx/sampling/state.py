"""What the sampler moves from noise to clean: the tokens of one modality, and what is given of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_ltx.sampling.geometry import AudioGrid, VideoGrid
from mlx_ltx.sampling.noise import Noise


@dataclass(frozen=True)
class LatentState:
    """The tokens of one modality during sampling.

    Attributes:
        latent: float32 (B, T, C), noisy tokens; the clip's own come first, appended conditioning tokens after them.
        clean: float32 (B, T, C), what is given (zero where nothing is).
        mask: float32 (T,), 1 where a token is generated, 0 where it is given, between for a strength between.
        positions: float32 (1, axes, T, 2), see :class:`VideoGrid` and :class:`AudioGrid`.
        keyframes: float32 (T,), 1 for tokens that encode a single pixel frame; None for audio.
        frozen: the modality is given as a whole; its noise level counts as 0.
    """

    latent: mx.array
    clean: mx.array
    mask: np.ndarray
    positions: np.ndarray
    keyframes: np.ndarray | None = None
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


@dataclass(frozen=True)
class ReplacedLatent:
    """Given content for latent frames of the clip itself (an image at frame 0, say).

    Attributes:
        latent: (B, frames, H, W, C) normalised video latent of the clip's height and width.
        frame: the latent frame where it begins.
        strength: 1 keeps it as it is, 0 ignores it.
    """

    latent: mx.array
    frame: int = 0
    strength: float = 1.0

    def apply(self, state: LatentState, grid: VideoGrid) -> LatentState:
        frames, height, width, channels = self.latent.shape[1:]
        if (height, width, channels) != (grid.height, grid.width, grid.channels) or self.frame + frames > grid.frames:
            raise ValueError(f"a latent of shape {self.latent.shape} does not fit frame {self.frame} of {grid}")
        first, last = self.frame * grid.tokens_per_frame, (self.frame + frames) * grid.tokens_per_frame
        tokens = grid.patchify(self.latent).astype(mx.float32)
        mask = state.mask.copy()
        mask[first:last] = 1.0 - self.strength
        clean = mx.concatenate([state.clean[:, :first], tokens, state.clean[:, last:]], axis=1)
        return replace(state, clean=clean, mask=mask)


@dataclass(frozen=True)
class Keyframe:
    """Given content at any pixel frame, as extra tokens that guide the clip's own.

    Attributes:
        latent: (B, frames, H, W, C) normalised video latent.
        frame: index of the pixel frame that it stands at.
        strength: 1 keeps it as it is, 0 ignores it.
        pixel_frames: how many pixel frames the latent encodes; a single one occupies just its own frame's time.
    """

    latent: mx.array
    frame: int
    strength: float = 1.0
    pixel_frames: int = 1

    def apply(self, state: LatentState, grid: VideoGrid) -> LatentState:
        frames, height, width = self.latent.shape[1:4]
        own = replace(grid, frames=frames, height=height, width=width)
        time = np.arange(frames)[:, None] * grid.time_scale + [0, grid.time_scale]
        if self.frame == 0:  # only the clip's first frame has the causal offset
            time = np.maximum(time + 1 - grid.time_scale, 0)
        time = time + self.frame
        if self.pixel_frames == 1:
            time[:, 1] = time[:, 0] + 1
        tokens = own.patchify(self.latent).astype(mx.float32)
        count = tokens.shape[1]
        return replace(
            state,
            latent=mx.concatenate([state.latent, mx.zeros_like(tokens)], axis=1),
            clean=mx.concatenate([state.clean, tokens], axis=1),
            mask=np.append(state.mask, np.full(count, 1.0 - self.strength, np.float32)),
            positions=np.concatenate([state.positions, own.coordinates(time)], axis=2),
            keyframes=None if state.keyframes is None else np.append(state.keyframes, np.zeros(count, np.float32)),
        )


Conditioning = ReplacedLatent | Keyframe


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


def audio_state(grid: AudioGrid, initial: mx.array | None = None) -> LatentState:
    """The state of a clip's sound before noise; ``initial`` is a (B, T, M, C) latent to refine."""
    shape = (1, grid.frames, grid.channels * grid.bins)
    tokens = mx.zeros(shape) if initial is None else grid.patchify(initial).astype(mx.float32)
    return LatentState(latent=tokens, clean=tokens, mask=np.ones(grid.frames, np.float32), positions=grid.positions())


def add_noise(state: LatentState, noise: Noise, scale: float = 1.0) -> LatentState:
    """Draw noise for every token of ``state``, appended ones included, and mix it in."""
    return state.noised(noise(state.latent.shape), scale)
