"""Record how the reference splits a picture's tokens into tiles and blends predictions, for ``parity.token_tiles``.

Needs the ``parity`` extra, and the reference implementation's ltx-core (Lightricks/LTX-2) on the Python path.
Usage: python scripts/make_tiles_golden.py OUTPUT.io.safetensors
"""

from __future__ import annotations

import json
import sys

import torch
from ltx_core.components.patchifiers import VideoLatentPatchifier
from ltx_core.modality_tiling import VideoModalityTilingHelper
from ltx_core.model.transformer.modality import Modality
from ltx_core.tiling import DimensionTilingConfig, TileCountConfig
from ltx_core.tools import VideoLatentTools
from ltx_core.types import VideoLatentShape
from safetensors.torch import save_file

FRAMES, HEIGHT, WIDTH, CHANNELS, FPS, OVERLAP = 2, 20, 22, 2, 24.0, 5
CASES = {"one": (1, 1), "columns": (1, 2), "both": (2, 2)}


def main(output: str) -> None:
    generator = torch.Generator().manual_seed(3)
    shape = VideoLatentShape(batch=1, channels=CHANNELS, frames=FRAMES, height=HEIGHT, width=WIDTH)
    tools = VideoLatentTools(VideoLatentPatchifier(patch_size=1), shape, FPS)
    own = tools.create_initial_state(torch.device("cpu"), torch.float32).positions
    # A reference of half the size over the clip, and a few tokens before it.
    coarse = VideoLatentShape(batch=1, channels=CHANNELS, frames=FRAMES, height=HEIGHT // 2, width=WIDTH // 2)
    reference = VideoLatentTools(VideoLatentPatchifier(patch_size=1), coarse, FPS)
    over = reference.create_initial_state(torch.device("cpu"), torch.float32).positions.clone()
    over[:, 1:] *= 2
    before = over[:, :, :7].clone()
    before[:, 0] -= 10
    positions = torch.cat([own, over, before], dim=2)
    latent = torch.randn(1, positions.shape[2], CHANNELS, generator=generator)
    tensors = {"positions": positions, "latent": latent}
    modality = Modality(
        latent=latent,
        sigma=torch.ones(1),
        timesteps=torch.ones(1, latent.shape[1], 1),
        positions=positions,
        context=torch.zeros(1, 1, 1),
    )
    for case, (rows, columns) in CASES.items():
        axes = {"height": rows, "width": columns}
        tiling = TileCountConfig(
            **{name: DimensionTilingConfig(count, OVERLAP if count > 1 else 0) for name, count in axes.items()}
        )
        helper = VideoModalityTilingHelper(tiling, tools)
        blended = torch.zeros_like(latent)
        for index, tile in enumerate(helper.tiles):
            part, context = helper.tile_modality(modality, tile)
            tensors[f"{case}.{index}.tokens"] = context.keep_indices.int()
            tensors[f"{case}.{index}.positions"] = part.positions
            # stands in for a model: each tile has its own answer, which depends on where its tokens are
            predicted = part.latent * (index + 1) + part.positions.mean(dim=(1, 3))[..., None]
            blended = helper.blend(predicted, tile, context, blended)
        tensors[f"{case}.blended"] = blended
    cases = {case: {"rows": rows, "columns": columns} for case, (rows, columns) in CASES.items()}
    grid = {"frames": FRAMES, "height": HEIGHT, "width": WIDTH, "channels": CHANNELS, "fps": FPS}
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    save_file(tensors, output, {"cases": json.dumps(cases), "grid": json.dumps(grid)})


if __name__ == "__main__":
    main(*sys.argv[1:])
