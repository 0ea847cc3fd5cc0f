"""Small media, LoRAs and upsamplers for the demo model."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from clips import RATE
from mlx_ltx.checkpoints.catalogue import demo_folder
from mlx_ltx.checkpoints.files import SafetensorsFile
from mlx_ltx.checkpoints.loading import published_shapes
from mlx_ltx.media.audio import write_audio
from mlx_ltx.media.video import VideoWriter
from mlx_ltx.models.upsampler import LatentUpsampler, UpsamplerConfig

PREFIX = "model.diffusion_model."


@pytest.fixture(scope="session")
def picture() -> Callable[[int, int, int], np.ndarray]:
    """Smooth moving colours, uint8 (frames, height, width, 3)."""

    def paint(frames: int, height: int, width: int) -> np.ndarray:
        t, y, x = np.meshgrid(np.arange(frames) / 8, np.arange(height) / 20, np.arange(width) / 20, indexing="ij")
        waves = [np.sin(x + t), np.cos(y - t), np.sin(x + y + 2 * t)]
        return np.stack([(w * 90 + 128).astype(np.uint8) for w in waves], axis=-1)

    return paint


@pytest.fixture(scope="session")
def tone() -> Callable[[float], np.ndarray]:
    """A stereo sweep, float32 (samples, 2)."""

    def play(seconds: float) -> np.ndarray:
        t = np.arange(round(seconds * RATE)) / RATE
        sweep = 0.4 * np.sin(2 * np.pi * (200 * t + 150 * t**2))
        return np.stack([sweep, np.roll(sweep, 40)], axis=1).astype(np.float32)

    return play


@pytest.fixture(scope="session")
def clip(tmp_path_factory, picture, tone) -> Path:
    """A clip whose sizes are not the model's: 100x70 pixels, 30 frames at 24 fps, with sound."""
    path = tmp_path_factory.mktemp("media") / "clip.mp4"
    with VideoWriter(path, 100, 70, 24, RATE, crf=4) as writer:
        writer.write_audio(tone(30 / 24))
        writer.write_frames(picture(30, 70, 100))
    return path


@pytest.fixture(scope="session")
def silent_clip(tmp_path_factory, picture) -> Path:
    path = tmp_path_factory.mktemp("media") / "silent.mp4"
    with VideoWriter(path, 128, 64, 24, crf=4) as writer:
        writer.write_frames(picture(17, 64, 128))
    return path


@pytest.fixture(scope="session")
def sound(tmp_path_factory, tone) -> Path:
    path = tmp_path_factory.mktemp("media") / "sweep.wav"
    write_audio(path, tone(2.0), RATE)
    return path


@pytest.fixture(scope="session")
def lora(tmp_path_factory) -> Callable[..., str]:
    """A LoRA for the demo's attention layers, in the official layout."""
    checkpoint = SafetensorsFile(next(demo_folder().glob("*demo*.safetensors")))
    folder = tmp_path_factory.mktemp("loras")

    def write(size: float = 0.3, rank: int = 2, **metadata: str) -> str:
        random = np.random.default_rng(1)
        tensors = {}
        for key, info in checkpoint.tensors.items():
            if key.startswith(f"{PREFIX}transformer_blocks.") and key.endswith((".to_q.weight", ".to_v.weight")):
                name = key.replace(PREFIX, "diffusion_model.").removesuffix(".weight")
                outputs, inputs = info.shape
                tensors[f"{name}.lora_A.weight"] = random.normal(0, inputs**-0.5, (rank, inputs)).astype(np.float32)
                tensors[f"{name}.lora_B.weight"] = random.normal(0, size, (outputs, rank)).astype(np.float32)
        path = folder / f"{size}-{'-'.join(metadata.values())}.safetensors"
        save_file(tensors, path, metadata)
        return str(path)

    return write


@pytest.fixture(scope="session")
def temporal_upsampler(tmp_path_factory) -> Path:
    """An upsampler of x2 in time for the demo's latents, with random weights."""
    channels = SafetensorsFile(demo_folder() / "spatial-upscaler-x2.safetensors").config["in_channels"]
    config = {
        "in_channels": channels, "mid_channels": 32, "num_blocks_per_stage": 1, "dims": 3,
        "spatial_upsample": False, "temporal_upsample": True,
    }  # fmt: skip
    random = np.random.default_rng(0)
    shapes = published_shapes(LatentUpsampler(UpsamplerConfig.from_metadata(config)))
    tensors = {
        name: random.normal(0, max(np.prod(shape[1:]), 1) ** -0.5, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    path = tmp_path_factory.mktemp("upsampler") / "temporal.safetensors"
    save_file(tensors, path, {"config": json.dumps(config)})
    return path
