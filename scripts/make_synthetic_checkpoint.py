#!/usr/bin/env python3
"""Write a transformer checkpoint of a published shape with random weights, for measuring without a download.

    python scripts/make_synthetic_checkpoint.py /tmp/19b.safetensors                 38 GB, the shape of LTX-2 19B
    python scripts/make_synthetic_checkpoint.py /tmp/4.safetensors --layers 4        its first four blocks

The file has the official names, layout and config of the transformer (only), in bfloat16. Its numbers are normal, with
the size that keeps activations finite, and repeat after some megabytes: random numbers would take longer than the disk.
Nothing here is ever committed. Needs the runtime dependencies only.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

from mlx_ltx.checkpoints.keymaps import TRANSFORMER
from mlx_ltx.checkpoints.loading import published_shapes
from mlx_ltx.models.transformer import Transformer
from mlx_ltx.models.transformer_config import TransformerConfig

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
PATTERN = (1 << 23) + 19  # numbers until they repeat; prime to the sizes of tensors, so that no two begin alike
DEVIATION = 0.02


def published_config(generation: str) -> dict[str, Any]:
    """The config of a published checkpoint: "19b", "2.3" or "2.5"."""
    return json.loads((GOLDEN / "real_configs.json").read_text(encoding="utf-8"))[generation]


def official_names(generation: str) -> dict[str, str]:
    """Module path to official key, for every tensor of a published transformer."""
    lines = (GOLDEN / "keys" / f"{generation}_transformer.txt").read_text(encoding="utf-8").splitlines()
    return TRANSFORMER.select(line.split("\t")[0] for line in lines if not line.startswith("#"))


def write_checkpoint(path: Path, config: dict[str, Any], names: dict[str, str], seed: int = 0) -> int:
    """Write a transformer with the shapes that ``config`` asks for.

    Args:
        path: must not exist.
        config: as in a checkpoint's metadata.
        names: official keys by module path; there may be more of them than tensors.

    Returns:
        The file's size in bytes.

    Raises:
        OSError: it cannot be written, or would not fit on the disk.
    """
    shapes = {
        names[p]: shape for p, shape in published_shapes(Transformer(TransformerConfig.from_metadata(config))).items()
    }
    header: dict[str, Any] = {"__metadata__": {"config": json.dumps(config)}}
    end = 0
    for key, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    if shutil.disk_usage(path.parent).free < end + (1 << 30):
        raise OSError(f"{path}: needs {end / 1e9:.1f} GB of disk")
    numbers = np.random.default_rng(seed).standard_normal(PATTERN, dtype=np.float32) * np.float32(DEVIATION)
    pattern = memoryview(_bfloat16(numbers)).cast("B")
    ones = memoryview(_bfloat16(np.ones(1 << 16, np.float32))).cast("B")
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        place = 0
        for key, shape in shapes.items():
            left = 2 * math.prod(shape)
            if key.endswith("norm.weight"):
                file.write(ones[:left])
                continue
            while left:
                piece = pattern[place : place + left]
                file.write(piece)
                left -= len(piece)
                place = (place + len(piece)) % len(pattern)
    return path.stat().st_size


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper halves of float32 numbers."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="the file to write; it must not exist")
    parser.add_argument("--generation", choices=["19b", "2.3"], default="19b", help="whose shape (%(default)s)")
    parser.add_argument("--layers", type=int, metavar="N", help="blocks, fewer than the published 48")
    arguments = parser.parse_args()
    config = published_config(arguments.generation)
    layers = config["transformer"]["num_layers"]
    if arguments.layers is not None and not 1 <= arguments.layers <= layers:
        parser.error(f"--layers {arguments.layers}: from 1 to {layers}")
    config["transformer"]["num_layers"] = arguments.layers or layers
    try:
        size = write_checkpoint(arguments.path, config, official_names(arguments.generation))
    except FileExistsError:
        print(f"{arguments.path}: exists", file=sys.stderr)
        return 1
    except OSError as error:
        arguments.path.unlink(missing_ok=True)
        print(error, file=sys.stderr)
        return 1
    print(f"{arguments.path}: {size / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
