"""Clips of the embedded demo, which is trained: what they show is told from pixels and samples."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import soundfile

import mlx_ltx
from clips import frames_of
from demo_measures import Seen, look
from demo_scenes import FPS, FRAMES, HEIGHT, SAMPLE_RATE, WIDTH, Scene, draw, play
from mlx_ltx.events import Warned
from mlx_ltx.media.video import VideoWriter

EMBEDDED = Path(__file__).parents[2] / "weights" / "demo"


@dataclass(frozen=True)
class Clip:
    """Frames, uint8 (F, H, W, 3), and sound, (samples, 2) at 48 kHz, of a file."""

    path: Path
    frames: np.ndarray
    waveform: np.ndarray

    @cached_property
    def seen(self) -> Seen:
        return look(self.frames)


@pytest.fixture
def embedded() -> Path:
    """The folder of the embedded demo: by its name, tests get the small model."""
    return EMBEDDED


@pytest.fixture
def warnings() -> list[str]:
    """What ``make`` was warned of."""
    return []


@pytest.fixture
def make(tmp_path, warnings):
    """Run a request with the embedded demo, at its own size unless told otherwise; gives the clip."""
    made = 0

    def run(**request) -> Clip:
        nonlocal made
        made += 1
        path = tmp_path / f"{made}.mp4"
        shape = {} if "video_path" in request else {"width": WIDTH, "height": HEIGHT, "num_frames": FRAMES}
        given = {"model": str(EMBEDDED), "pipeline": "distilled", "dtype": "float32", **shape, **request}
        request = mlx_ltx.Request(output=path, output_audio=path.with_suffix(".wav"), **given)
        warnings.extend(event.message for event in mlx_ltx.stream(request) if isinstance(event, Warned))
        waveform, rate = soundfile.read(path.with_suffix(".wav"))
        assert rate == SAMPLE_RATE
        return Clip(path, frames_of(path), waveform)

    return run


@pytest.fixture
def film(tmp_path):
    """Write a scene as it should look, nearly without loss; gives the file."""

    def write(scene: Scene) -> Path:
        path = tmp_path / "scene.mp4"
        with VideoWriter(path, WIDTH, HEIGHT, FPS, SAMPLE_RATE, crf=4) as writer:
            writer.write_audio(play(scene))
            writer.write_frames(draw(scene))
        return path

    return write
