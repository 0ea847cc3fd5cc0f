"""Predicted against measured peaks of jobs that start from pictures, clips and sound, which are read piece by piece."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import mlx_ltx
from mlx_ltx.checkpoints.files import SafetensorsFile
from mlx_ltx.events import MemorySeen
from mlx_ltx.media.audio import write_audio
from mlx_ltx.media.video import VideoWriter
from mlx_ltx.pipelines.job import prepare
from mlx_ltx.pipelines.predict import make_plan
from mlx_ltx.request import LoraInput, VideoInput

RATE = 48_000
ON_CPU = pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="calibrated on the CPU backend")


def write_clip(path: Path, frames: int, height: int, width: int) -> Path:
    """A clip with sound; its picture is noise, which costs nothing to make."""
    random = np.random.default_rng(1)
    with VideoWriter(path, width, height, 24, RATE) as writer:
        writer.write_audio(0.1 * random.standard_normal((frames * RATE // 24, 2)).astype(np.float32))
        for _ in range(frames):
            writer.write_frames(random.integers(0, 255, (1, height, width, 3), np.uint8))
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    write_audio(folder / "sound.wav", np.zeros((4 * RATE, 2), np.float32), RATE)
    Image.new("RGB", (320, 256), "grey").save(folder / "picture.png")
    return {
        "clip": write_clip(folder / "clip.mp4", 17, 192, 256),
        "small": write_clip(folder / "small.mp4", 25, 64, 128),
        "sound": folder / "sound.wav",
        "picture": folder / "picture.png",
    }


@pytest.fixture(scope="module")
def lora(middle_model, tmp_path_factory) -> LoraInput:
    """An IC-LoRA for every layer of the blocks, whose references are as large as the clip."""
    prefix, tensors = "model.diffusion_model.", {}
    checkpoint = SafetensorsFile(next(middle_model.glob("*middle*.safetensors")))
    for key, info in checkpoint.tensors.items():
        if key.startswith(f"{prefix}transformer_blocks.") and len(info.shape) == 2:
            name = key.replace(prefix, "diffusion_model.").removesuffix(".weight")
            tensors[f"{name}.lora_A.weight"] = np.zeros((2, info.shape[1]), np.float32)
            tensors[f"{name}.lora_B.weight"] = np.zeros((info.shape[0], 2), np.float32)
    path = tmp_path_factory.mktemp("loras") / "ic-lora.safetensors"
    save_file(tensors, path)
    return LoraInput(str(path))


def request(folder, **changes):
    given = {"prompt": "a lighthouse", "output": folder / "clip.mp4", "force": True, "dtype": "float32"}
    return mlx_ltx.Request(**{**given, **changes})


@ON_CPU
def test_a_retake(tmp_path, middle_model, sources, wrongly_predicted):
    edit = {"pipeline": "retake", "video_path": sources["clip"], "start_time": 0.5}
    assert wrongly_predicted(prepare(request(tmp_path, model=str(middle_model), **edit))) == []


@ON_CPU
def test_an_enlarged_clip(tmp_path, middle_model, sources, wrongly_predicted):
    edit = {"pipeline": "upscale", "video_path": sources["small"], "prompt": ""}
    assert wrongly_predicted(prepare(request(tmp_path, model=str(middle_model), **edit))) == []


@ON_CPU
def test_a_picture_for_a_sound(tmp_path, middle_model, sources, wrongly_predicted):
    given = {"pipeline": "a2v", "audio_path": sources["sound"], "width": 64, "height": 64, "duration": 2.0}
    assert wrongly_predicted(prepare(request(tmp_path, model=str(middle_model), guided=False, **given))) == []


@ON_CPU
def test_an_image(tmp_path, middle_model, sources, wrongly_predicted):
    given = {"images": (mlx_ltx.ImageInput(sources["picture"]),), "width": 320, "height": 256, "num_frames": 9}
    assert wrongly_predicted(prepare(request(tmp_path, model=str(middle_model), audio=False, **given))) == []


@ON_CPU
def test_references(tmp_path, middle_model, sources, lora, wrongly_predicted):
    references = {"video_conditionings": (VideoInput(sources["clip"]),), "loras": (lora,)}
    size = {"pipeline": "ic-lora", "width": 256, "height": 192, "num_frames": 17, "audio": False}
    assert wrongly_predicted(prepare(request(tmp_path, model=str(middle_model), **size, **references))) == []


@ON_CPU
def test_encoding_takes_no_more_for_a_longer_clip(tmp_path, sources, monkeypatch):
    """Frames are read as the encoder takes them."""
    peaks = {}
    for frames in (33, 121):
        clip = write_clip(tmp_path / f"{frames}.mp4", frames, 64, 128)
        edit = {
            "pipeline": "upscale",
            "video_path": clip,
            "prompt": "",
            "model": "demo",
        }
        job = prepare(request(tmp_path, **edit))
        events = job.run()
        seen = next(event for event in events if isinstance(event, MemorySeen))
        events.close()
        planned = next(phase for phase in make_plan(job).phases if phase.name == "encode-video")
        assert seen.phase == "encode-video"
        peaks[frames] = seen.peak_bytes, planned.peak_bytes
    measured, predicted = zip(*peaks.values(), strict=True)
    assert measured[1] < 1.03 * measured[0]
    assert predicted[1] < 1.03 * predicted[0]
