"""The picture's tokens in tiles, and predictions blended, against the reference."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx
import numpy as np

from mlx_ltx.sampling.geometry import VideoGrid
from mlx_ltx.sampling.state import LatentState, video_state
from mlx_ltx.sampling.token_tiles import blend, token_tiles
from parity import Comparison, GoldenSet, runner


@runner("token_tiles")
def run_token_tiles(golden: GoldenSet) -> Iterator[Comparison]:
    """With a stand-in for a model, whose answer depends on the tile and on where its tokens are."""
    size = json.loads(golden.metadata["grid"])
    grid = VideoGrid(size["frames"], size["height"], size["width"], size["channels"], 8, 32, size["fps"])
    state = recorded_state(golden, grid)
    for case, split in golden.cases.items():
        predicted = []
        tiles = token_tiles(state, grid, split["rows"], split["columns"])
        for index, tile in enumerate(tiles):
            part = tile.of(state)
            yield golden.compare(case, f"{index}.tokens", tile.tokens)
            yield golden.compare(case, f"{index}.positions", part.positions)
            middle = mx.array(part.positions.mean(axis=(1, 3)))[..., None]
            predicted.append(part.latent * (index + 1) + middle)
        yield golden.compare(case, "blended", blend(tiles, predicted, state.tokens))


def recorded_state(golden: GoldenSet, grid: VideoGrid) -> LatentState:
    latent, positions = golden.mx("latent"), golden.tensors["positions"]
    count = latent.shape[1]
    state = video_state(grid)
    return replace(
        state, latent=latent, clean=latent, mask=np.ones(count, np.float32), positions=positions, keyframes=None
    )
