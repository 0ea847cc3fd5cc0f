"""Making and comparing clips in tests."""

from pathlib import Path

import numpy as np

import mlx_ltx
from mlx_ltx.media.video import read_frames

RATE = 48_000


def make(**request):
    """Run a request with the demo model."""
    return mlx_ltx.run(mlx_ltx.Request(**{"model": "demo", "prompt": "a red ball", **request}))


def frames_of(path: Path) -> np.ndarray:
    """All frames of a file, uint8 (F, H, W, 3)."""
    return np.stack(list(read_frames(path)))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))
