"""Given content: frames, keyframes, references, regions to keep, and empty slots for generated keyframes.

Every item is applied to a state before noise. Some replace what is given of the clip's own tokens; others append tokens
that the clip's tokens attend to and that are dropped at the end. Source: ltx_core/conditioning/types.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_ltx.sampling.geometry import AudioGrid, VideoGrid
from mlx_ltx.sampling.state import AttentionGroups, Conditioning, LatentState


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
class MaskedLatent:
    """Given content for some of the clip's own tokens, wherever they lie (inpainting, outpainting).

    Attributes:
        latent: (B, F, H, W, C) normalised video latent of the clip's size.
        given: (F, H, W) in [0, 1], 1 where the latent is given, 0 where the clip stays as it was.
        strength: 1 keeps what is given as it is, 0 ignores it.
    """

    latent: mx.array
    given: np.ndarray
    strength: float = 1.0

    def apply(self, state: LatentState, grid: VideoGrid) -> LatentState:
        size = (grid.frames, grid.height, grid.width)
        if self.latent.shape[1:] != (*size, grid.channels) or self.given.shape != size:
            raise ValueError(f"a latent of shape {self.latent.shape} masked by {self.given.shape} does not fit {grid}")
        given = self.given.reshape(-1).astype(np.float32)
        own, appended = state.clean[:, : grid.tokens], state.clean[:, grid.tokens :]
        tokens = grid.patchify(self.latent).astype(mx.float32)
        mask = state.mask.copy()
        mask[: grid.tokens] = mask[: grid.tokens] * (1 - given) + (1 - self.strength) * given
        clean = mx.concatenate([own + mx.array(given)[None, :, None] * (tokens - own), appended], axis=1)
        return replace(state, clean=clean, mask=mask)


@dataclass(frozen=True)
class TemporalRegion:
    """Generate only a time range of a given clip, picture or sound; the rest of the initial latent is kept.

    It decides about all of the clip's own tokens: those that overlap the range are generated, all others are given.

    Attributes:
        start, end: seconds; the end is not part of the range.
        outside: the range is what is kept, and all tokens that reach beyond it are generated.
    """

    start: float
    end: float
    outside: bool = False

    def apply(self, state: LatentState, grid: VideoGrid | AudioGrid) -> LatentState:
        begins, ends = grid.positions()[0, 0].T
        if self.outside:
            rounding = 1e-4  # positions are float32
            generated = (begins < self.start - rounding) | (ends > self.end + rounding)
        else:
            generated = (ends > self.start) & (begins < self.end)
        if self.start >= self.end or not generated.any():
            side = "outside of" if self.outside else "between"
            raise ValueError(f"no part of {grid} lies {side} {self.start} and {self.end} seconds")
        return replace(state, mask=np.append(generated.astype(np.float32), state.mask[grid.tokens :]))


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
        return state.appended(own.patchify(self.latent), own.coordinates(time), 1.0 - self.strength)


@dataclass(frozen=True)
class Reference:
    """A whole video as extra tokens that the clip follows, for LoRAs trained on such pairs (IC-LoRA).

    Attributes:
        latent: (B, frames, H, W, C) normalised video latent.
        strength: 1 keeps it as it is, 0 ignores it.
        downscale: how many times smaller than the clip it is, as its LoRA was trained.
        temporal_scale: how many times fewer frames per second than the clip it has. Its frames then stand at the end of
            the time that they summarise.
    """

    latent: mx.array
    strength: float = 1.0
    downscale: int = 1
    temporal_scale: int = 1

    def apply(self, state: LatentState, grid: VideoGrid) -> LatentState:
        frames, height, width = self.latent.shape[1:4]
        own = replace(grid, frames=frames, height=height, width=width, fps=grid.fps / self.temporal_scale)
        positions = own.positions()
        # The first frame of both ends after one frame of its own rate; moved so that the clip's rate holds for it.
        one_frame = np.float32(1) / np.float32(grid.fps)
        positions[:, 0] = np.maximum(positions[:, 0] - (self.temporal_scale - 1) * one_frame, 0)
        positions[:, 1:] *= self.downscale
        return state.appended(own.patchify(self.latent), positions, 1.0 - self.strength)


@dataclass(frozen=True)
class AudioReference:
    """A sound as extra tokens that the clip's sound follows (a voice, for a LoRA trained on it).

    Attributes:
        latent: (B, T, M, C) normalised audio latent.
        positions: float32 (1, 1, T, 2), where its tokens stand, in seconds; before the clip they are negative.
        strength: 1 keeps it as it is, 0 ignores it.
    """

    latent: mx.array
    positions: np.ndarray
    strength: float = 1.0

    @classmethod
    def preceding(cls, latent: mx.array, grid: AudioGrid, strength: float = 1.0, gap: float = 0.04) -> AudioReference:
        """A sound that ends ``gap`` seconds before the clip begins (ltx_pipelines/dubit.py)."""
        positions = replace(grid, frames=latent.shape[1]).positions()
        return cls(latent, positions - positions[0, 0, -1, 1] - np.float32(gap), strength)

    def apply(self, state: LatentState, grid: AudioGrid) -> LatentState:
        if self.positions.shape != (1, 1, self.latent.shape[1], 2):
            raise ValueError(f"positions of shape {self.positions.shape} for a sound of shape {self.latent.shape}")
        return state.appended(grid.patchify(self.latent), self.positions.astype(np.float32), 1.0 - self.strength)


@dataclass(frozen=True)
class AttentionStrength:
    """An item that appends tokens, seen by the clip more weakly (and seeing it more weakly).

    From the first such item on, appended items do not see each other.

    Attributes:
        item: what appends the tokens.
        strength: 1 for full attention, 0 for none; one number, or one per appended token in any shape of their count
            (frame by frame, row by row).
    """

    item: Conditioning
    strength: float | np.ndarray

    def apply(self, state: LatentState, grid: VideoGrid) -> LatentState:
        after = self.item.apply(state, grid)
        count = after.tokens - state.tokens
        if count == 0:
            raise ValueError(f"{type(self.item).__name__} appends no tokens whose attention could be weaker")
        strength = np.asarray(self.strength, np.float32).reshape(-1)
        if len(strength) not in (1, count):
            raise ValueError(f"{len(strength)} attention strengths for {count} tokens")
        groups = state.groups or AttentionGroups.before_any(grid.tokens, state.tokens - grid.tokens)
        return replace(after, groups=groups.extended(np.broadcast_to(strength, (count,))))


@dataclass(frozen=True)
class GeneratedKeyframes:
    """Slots for single pixel frames that are generated beside the clip and guide it.

    They need a transformer with ``keyframe_embedding``, which marks them; one item per clip.

    Attributes:
        frames: indices of pixel frames inside the clip, rising; see :func:`evenly_spaced_frames`.
        initial: (B, len(frames), H, W, C) latents to refine; None starts from noise alone.
    """

    frames: tuple[int, ...]
    initial: mx.array | None = None

    def apply(self, state: LatentState, grid: VideoGrid) -> LatentState:
        last = (grid.frames - 1) * grid.time_scale
        if not self.frames or list(self.frames) != sorted({f for f in self.frames if 0 <= f <= last}):
            raise ValueError(f"keyframes {self.frames} are not rising frame numbers from 0 to {last}")
        shape = (state.latent.shape[0], len(self.frames), grid.height, grid.width, grid.channels)
        if self.initial is not None and self.initial.shape != shape:
            raise ValueError(f"initial keyframes of shape {self.initial.shape} instead of {shape}")
        if _slots(state, grid).any():
            raise ValueError("keyframe slots can be appended once only")
        time = np.array(self.frames)[:, None] + [0, 1]
        empty = mx.zeros((shape[0], len(self.frames) * grid.tokens_per_frame, grid.channels))
        latent = None if self.initial is None else grid.patchify(self.initial)
        return state.appended(empty, grid.coordinates(time), 1.0, latent=latent, keyframe=True)


def generated_keyframes(state: LatentState, grid: VideoGrid) -> mx.array | None:
    """What was generated in the slots of :class:`GeneratedKeyframes`, (B, K, H, W, C); None without slots."""
    slots = np.flatnonzero(_slots(state, grid))
    if not len(slots):
        return None
    tokens = state.latent[:, slots[0] : slots[-1] + 1]
    return tokens.reshape(tokens.shape[0], -1, grid.height, grid.width, grid.channels)


def _slots(state: LatentState, grid: VideoGrid) -> np.ndarray:
    """Which tokens are slots: given content is never marked, so the appended marks are theirs."""
    if state.keyframes is None:
        raise ValueError("only a picture can have keyframes")
    return (state.keyframes > 0) & (np.arange(state.tokens) >= grid.tokens)


def evenly_spaced_frames(count: int, clip_frames: int) -> tuple[int, ...]:
    """Pixel frames for ``count`` keyframes inside a clip, without its ends; halves are rounded to even."""
    if not 0 <= count <= clip_frames - 2:
        raise ValueError(f"a clip of {clip_frames} frames has no room for {count} keyframes inside")
    return tuple(int(frame) for frame in np.rint(np.linspace(0, clip_frames - 1, count + 2))[1:-1])
