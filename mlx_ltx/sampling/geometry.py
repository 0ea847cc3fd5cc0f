"""Sizes and positions: from a clip in pixels and seconds to latent grids, tokens and their coordinates.

Source: ltx_core/types.py and ltx_core/components/patchifiers.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np


@dataclass(frozen=True)
class ClipShape:
    """A clip as its viewer sees it: frames, pixels, frames per second."""

    frames: int
    height: int
    width: int
    fps: float

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.frames / self.fps

    def halved(self) -> ClipShape:
        """The clip of a first stage at half the size."""
        return ClipShape(self.frames, self.height // 2, self.width // 2, self.fps)


@dataclass(frozen=True)
class VideoGrid:
    """A video latent: (B, frames, height, width, channels), and how it maps to pixels.

    Attributes:
        time_scale, space_scale: pixel frames and pixels that one latent stands for (the first latent frame stands for a
            single pixel frame).
        fps: frames per second of the clip.
    """

    frames: int
    height: int
    width: int
    channels: int
    time_scale: int
    space_scale: int
    fps: float

    @classmethod
    def of_clip(cls, clip: ClipShape, channels: int, time_scale: int = 8, space_scale: int = 32) -> VideoGrid:
        """The latent grid of a clip.

        Raises:
            ValueError: the clip's sizes are not on the grid.
        """
        if (clip.frames - 1) % time_scale or clip.height % space_scale or clip.width % space_scale or clip.frames < 1:
            raise ValueError(f"{clip} is not on a grid of {time_scale}k+1 frames and {space_scale} pixels")
        return cls(
            (clip.frames - 1) // time_scale + 1,
            clip.height // space_scale,
            clip.width // space_scale,
            channels,
            time_scale,
            space_scale,
            clip.fps,
        )

    @property
    def tokens_per_frame(self) -> int:
        return self.height * self.width

    @property
    def tokens(self) -> int:
        return self.frames * self.tokens_per_frame

    def patchify(self, latent: mx.array) -> mx.array:
        """(B, F, H, W, C) to tokens (B, F*H*W, C): frame by frame, row by row."""
        return latent.reshape(latent.shape[0], -1, latent.shape[-1])

    def unpatchify(self, tokens: mx.array) -> mx.array:
        """The first tokens, which are the clip's, back to (B, F, H, W, C)."""
        tokens = tokens[:, : self.tokens]
        return tokens.reshape(tokens.shape[0], self.frames, self.height, self.width, -1)

    def positions(self) -> np.ndarray:
        """float32 (1, 3, tokens, 2): the [start, end) of each token in seconds, pixels and pixels.

        The first latent frame covers one pixel frame, each later one ``time_scale``.
        """
        time = np.arange(self.frames)[:, None] * self.time_scale + [0, self.time_scale]
        time = np.maximum(time + 1 - self.time_scale, 0)
        return self.coordinates(time)

    def coordinates(self, time: np.ndarray) -> np.ndarray:
        """Positions of a grid of this height and width whose frames span ``time``.

        Args:
            time: (frames, 2), the [start, end) of each latent frame in pixel frames.

        Returns:
            float32 (1, 3, frames * height * width, 2), as :meth:`positions`.
        """
        rows = np.arange(self.height)[:, None] * self.space_scale + [0, self.space_scale]
        columns = np.arange(self.width)[:, None] * self.space_scale + [0, self.space_scale]
        grid = np.empty((3, len(time), self.height, self.width, 2), np.float32)
        grid[0] = time.astype(np.float32)[:, None, None] / np.float32(self.fps)
        grid[1] = rows[None, :, None]
        grid[2] = columns[None, None, :]
        return grid.reshape(1, 3, -1, 2)


@dataclass(frozen=True)
class AudioGrid:
    """An audio latent: (B, frames, bins, channels), and how it maps to seconds.

    Attributes:
        rate: samples per second of the waveform that the mel spectrogram is taken from.
        hop: samples per mel frame.
        scale: mel frames per latent frame.
    """

    frames: int
    bins: int
    channels: int
    rate: int = 16_000
    hop: int = 160
    scale: int = 4

    @classmethod
    def of_clip(cls, clip: ClipShape, bins: int, channels: int, rate: int, hop: int, scale: int) -> AudioGrid:
        """The latent of the sound that accompanies a clip; halves are rounded to even, as Python does."""
        return cls(round(clip.duration * (rate / hop / scale)), bins, channels, rate, hop, scale)

    @property
    def tokens(self) -> int:
        return self.frames

    def patchify(self, latent: mx.array) -> mx.array:
        """(B, T, M, C) to tokens (B, T, C*M), channel-major."""
        B, T, M, C = latent.shape
        return latent.transpose(0, 1, 3, 2).reshape(B, T, C * M)

    def unpatchify(self, tokens: mx.array) -> mx.array:
        """The first tokens, which are the clip's, back to (B, T, M, C)."""
        tokens = tokens[:, : self.tokens]
        return tokens.reshape(*tokens.shape[:2], self.channels, self.bins).transpose(0, 1, 3, 2)

    def positions(self) -> np.ndarray:
        """float32 (1, 1, frames, 2): the [start, end) of each token in seconds; the first is the shortest."""
        edges = np.maximum(np.arange(self.frames + 1) * self.scale + 1 - self.scale, 0).astype(np.float32)
        seconds = edges * np.float32(self.hop) / np.float32(self.rate)
        return np.stack([seconds[:-1], seconds[1:]], axis=-1)[None, None]


def nearest_multiples(value: int, step: int) -> tuple[int, ...]:
    """The positive multiples of ``step`` on both sides of ``value`` (one if it is a multiple itself)."""
    below = value // step * step
    return tuple(dict.fromkeys(v for v in (below, below if below == value else below + step) if v > 0))


def nearest_frame_counts(value: int, time_scale: int = 8) -> tuple[int, ...]:
    """The frame counts ``time_scale * k + 1`` on both sides of ``value`` (one if it is such a count itself)."""
    below = (value - 1) // time_scale * time_scale + 1
    return tuple(dict.fromkeys(v for v in (below, below if below == value else below + time_scale) if v > 0))


def frames_for_duration(seconds: float, fps: float, time_scale: int = 8) -> int:
    """The frame count ``time_scale * k + 1`` nearest to a duration, with k at least 1."""
    return max(round((seconds * fps - 1) / time_scale), 1) * time_scale + 1
