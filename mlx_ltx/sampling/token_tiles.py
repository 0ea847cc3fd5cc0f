"""The picture's tokens in overlapping tiles, for sequences that do not fit (ltx_core/modality_tiling.py).

Every prediction is made tile by tile, each as if it were a picture of its own, and blended where tiles overlap. That
is an approximation: a tile does not see the others. The sound goes along with every tile, and is the mean of what comes
of it, as in the reference (ltx_core/multigpu/transformer/tiled_data_parallel.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_ltx.models.video_tiling import ByCount, weights
from mlx_ltx.sampling.geometry import VideoGrid
from mlx_ltx.sampling.state import AttentionGroups, LatentState

LARGEST_OVERLAP = 5  # latents


class TokenTile(NamedTuple):
    """A tile of a picture's tokens.

    Attributes:
        tokens: int32 (N,), which tokens of the state are in it, rising: the clip's own, then appended ones.
        weights: float32 (N,), how much of the whole's prediction is this tile's; they add up to 1 over all tiles.
        origin: float32 (axes,), where the tile begins; it is moved to 0.
    """

    tokens: np.ndarray
    weights: np.ndarray
    origin: np.ndarray

    def of(self, state: LatentState) -> LatentState:
        """The tile's part of a state."""
        groups = state.groups
        tokens = mx.array(self.tokens)
        return replace(
            state,
            latent=mx.take(state.latent, tokens, axis=1),
            clean=mx.take(state.clean, tokens, axis=1),
            mask=state.mask[self.tokens],
            positions=state.positions[:, :, self.tokens] - self.origin[None, :, None, None],
            keyframes=None if state.keyframes is None else state.keyframes[self.tokens],
            groups=groups and AttentionGroups(groups.group[self.tokens], groups.strength[self.tokens]),
        )

    def spread(self, predicted: mx.array, count: int) -> mx.array:
        """(B, N, C) of the tile, weighted, to (B, count, C) with zeros everywhere else."""
        places = np.full(count, len(self.tokens), np.int32)
        places[self.tokens] = np.arange(len(self.tokens))
        weighted = predicted * mx.array(self.weights)[None, :, None]
        return mx.take(mx.pad(weighted, [(0, 0), (0, 1), (0, 0)]), mx.array(places), axis=1)


def tile_spans(length: int, count: int) -> list[tuple[slice, np.ndarray]]:
    """One axis of a latent in ``count`` parts: their places and weights.

    Parts overlap by 5, or by less where more than two of them would meet.

    Raises:
        ValueError: there are more parts than latents.
    """
    overlap = max(n for n in range(LARGEST_OVERLAP + 1) if n == 0 or (length + n * (count - 1)) // count >= 2 * n)
    spans = ByCount(count, overlap).spans(length, 1)
    return [
        (slice(start, stop), weights(stop - start, fade_in, fade_out, from_zero=False))
        for start, stop, fade_in, fade_out in spans
    ]


def token_tiles(state: LatentState, grid: VideoGrid, rows: int, columns: int) -> list[TokenTile]:
    """Split a picture into ``rows`` times ``columns`` tiles of all its frames.

    Appended tokens are in every tile that they overlap in time and space, and in all if they begin before the clip;
    their predictions count equally.
    """
    own = np.arange(grid.tokens, dtype=np.int32).reshape(grid.frames, grid.height, grid.width)
    starts, ends = state.positions[0, :, :, 0], state.positions[0, :, :, 1]
    parts = []
    for down, falling in tile_spans(grid.height, rows):
        for along, fading in tile_spans(grid.width, columns):
            tokens = own[:, down, along].reshape(-1)
            weight = np.broadcast_to(falling[:, None] * fading, (grid.frames, len(falling), len(fading))).reshape(-1)
            parts.append((tokens, weight, starts[:, tokens].min(axis=1), ends[:, tokens].max(axis=1)))
    after = np.arange(grid.tokens, state.tokens, dtype=np.int32)
    meets = [
        ((starts[:, after] < end[:, None]) & (ends[:, after] > start[:, None])).all(axis=0) | (starts[0, after] < 0)
        for _, _, start, end in parts
    ]
    shared = np.maximum(np.sum(meets, axis=0), 1).astype(np.float32)
    return [
        TokenTile(np.append(tokens, after[met]), np.append(weight, 1 / shared[met]).astype(np.float32), start)
        for (tokens, weight, start, _), met in zip(parts, meets, strict=True)
    ]


def largest_tile(height: int, width: int, rows: int, columns: int) -> int:
    """How many tokens of a frame the largest tile has."""
    down, along = (
        max(place.stop - place.start for place, _ in tile_spans(length, count))
        for length, count in ((height, rows), (width, columns))
    )
    return down * along


def blend(tiles: Sequence[TokenTile], predicted: Sequence[mx.array], count: int) -> mx.array:
    """The whole's prediction (B, count, C) from those of its tiles."""
    return sum((tile.spread(part, count) for tile, part in zip(tiles, predicted, strict=True)), mx.array(0.0))
