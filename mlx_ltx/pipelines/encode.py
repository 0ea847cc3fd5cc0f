"""Part of recipes that start from pictures: frames become latents while they are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import mlx.core as mx
import numpy as np

from mlx_ltx.models.video_vae import VideoEncoder

# How many numbers are read before the encoder sees them, if a frame has no more. Several frames at once are faster
# while they are small (see FRAMES_PER_PIECE in mlx_ltx/models/streaming.py).
ELEMENTS_AT_ONCE = 1 << 22


def frames_at_once(height: int, width: int, most: int) -> int:
    """How many frames of a size are read before the encoder sees them, ``most`` at most."""
    return min(most, max(1, ELEMENTS_AT_ONCE // (3 * height * width)))


def encode_clip(encoder: VideoEncoder, frames: Iterable[np.ndarray]) -> Iterator[mx.array]:
    """Encode frames as they come; no more than :func:`frames_at_once` are held.

    Args:
        frames: (H, W, 3), either uint8 or floating-point in [-1, 1].

    Yields:
        the next latents, (1, n, h, w, C), evaluated, normalised, in the dtype of the weights.

    Raises:
        ValueError: as :meth:`VideoEncoder.stream`.
    """
    return encoder.stream(_pieces(frames, encoder.config.time_scale))


def encode_whole(encoder: VideoEncoder, frames: Iterable[np.ndarray]) -> mx.array:
    """The latents of :func:`encode_clip` as one, (1, F, h, w, C), lazily joined."""
    return mx.concatenate(list(encode_clip(encoder, frames)), axis=1)


def _pieces(frames: Iterable[np.ndarray], time_scale: int) -> Iterator[mx.array]:
    """(1, n, H, W, 3) in [-1, 1]; the first frame by itself, as it has a latent of its own."""
    source = iter(frames)
    first = next(source, None)
    if first is None:
        return
    yield _to_network(first[None])
    height, width, _ = first.shape
    count = frames_at_once(height, width, time_scale)
    del first
    while batch := list(islice(source, count)):
        yield _to_network(np.stack(batch))


def _to_network(frames: np.ndarray) -> mx.array:
    x = mx.array(frames)[None]
    return x.astype(mx.float32) / 127.5 - 1 if frames.dtype == np.uint8 else x
