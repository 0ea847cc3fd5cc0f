"""Small models and batches to train with."""

from pathlib import Path

import mlx.core as mx
import pytest

from mlx_ltx.checkpoints.components import load_transformer
from mlx_ltx.checkpoints.files import SafetensorsFile
from mlx_ltx.sampling.denoise import TextContext
from mlx_ltx.sampling.geometry import AudioGrid, VideoGrid
from mlx_ltx.training.flow import Batch

GOLDEN = Path(__file__).parents[1] / "golden"
GRID = VideoGrid(2, 2, 3, 128, 8, 32, 24.0)
SOUND = AudioGrid(5, 16, 8)


@pytest.fixture(scope="session")
def golden():
    return GOLDEN


@pytest.fixture
def transformer(golden):
    """The reference's tiny LTX-2.3 transformer: three blocks, 64 and 32 channels wide."""
    return load_transformer(SafetensorsFile(golden / "transformer_23.ckpt.safetensors"), mx.float32)


@pytest.fixture
def make_batch():
    def make(number: int = 0, samples: int = 2, grid: VideoGrid = GRID, **changes) -> Batch:
        normal = lambda shape, place: mx.random.normal(shape, key=mx.random.key(1000 * number + place))  # noqa: E731
        text = TextContext(normal((samples, 9, 64), 0), normal((samples, 9, 32), 1))
        video = normal((samples, grid.frames, grid.height, grid.width, 128), 2)
        audio = normal((samples, 5, 16, 8), 3)
        given = {"video": video, "audio": audio, "video_grid": grid, "audio_grid": SOUND} | changes
        return Batch(text, **given)

    return make
