"""Small models and batches to train with."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_ltx.checkpoints.components import load_transformer
from mlx_ltx.checkpoints.files import SafetensorsFile
from mlx_ltx.media.video import VideoWriter
from mlx_ltx.sampling.denoise import TextContext
from mlx_ltx.sampling.geometry import AudioGrid, VideoGrid
from mlx_ltx.training.config import config_from
from mlx_ltx.training.flow import Batch
from mlx_ltx.training.precompute import precompute

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


def write_clip(path, frames=17, height=64, width=96, sound=True, seed=0):
    """A small clip of moving colours, with a tone."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height) / 20, np.arange(width) / 20, indexing="ij")
    waves = [np.sin(x + t / 4 + seed), np.cos(y - t / 4), np.sin(x + y + t / 2)]
    pixels = np.stack([(wave * 90 + 128).astype(np.uint8) for wave in waves], axis=-1)
    with VideoWriter(path, width, height, 24, 48_000 if sound else None, crf=4) as writer:
        if sound:
            times = np.arange(frames * 2000) / 48_000
            writer.write_audio(np.stack([0.3 * np.sin(2 * np.pi * (300 + 100 * seed) * times)] * 2, axis=1))
        writer.write_frames(pixels)


@pytest.fixture(scope="session")
def make_clip():
    return write_clip


@pytest.fixture(scope="session")
def media(tmp_path_factory):
    """A folder of three clips with sound, an image, and a caption beside each."""
    folder = tmp_path_factory.mktemp("media")
    for number, caption in enumerate(("a red wave", "a blue wave", "a green wave")):
        write_clip(folder / f"clip{number}.mp4", seed=number)
        (folder / f"clip{number}.txt").write_text(f"{caption}\n")
    return folder


@pytest.fixture
def settings(media, tmp_path):
    """A config of a short training of a LoRA on the demo, as plain data."""
    return {
        "model": {"model_path": "demo"},
        "lora": {"rank": 4, "alpha": 4},
        "training_strategy": {"with_audio": True},
        "optimization": {"learning_rate": 1e-2, "steps": 4, "batch_size": 2},
        "acceleration": {"mixed_precision_mode": "no"},
        "data": {
            "preprocessed_data_root": str(tmp_path / "latents"),
            "dataset": str(media),
            "resolution_buckets": ["96x64x17"],
        },
        "checkpoints": {"interval": 2},
        "output_dir": str(tmp_path / "out"),
    }


@pytest.fixture(scope="session")
def latents(media, tmp_path_factory):
    """The media as a data set with picture and sound, for the demo."""
    folder = tmp_path_factory.mktemp("latents")
    values = {
        "model": {"model_path": "demo"},
        "training_strategy": {"with_audio": True},
        "acceleration": {"mixed_precision_mode": "no"},
        "data": {
            "preprocessed_data_root": str(folder),
            "dataset": str(media),
            "resolution_buckets": ["96x64x17"],
        },
        "output_dir": "-",
    }
    list(precompute(config_from(values)))
    return folder


@pytest.fixture
def ready(settings, latents):
    """A config whose data set is prepared."""
    settings["data"] = {"preprocessed_data_root": str(latents)}
    return settings
