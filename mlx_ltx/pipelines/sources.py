"""Parts of recipes that start from video or sound: read it, and encode it.

Pictures of any size are brought to a stage's size; clips of any length to its number of frames.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_ltx.checkpoints.components import load_audio_encoder, load_video_encoder
from mlx_ltx.errors import UserError
from mlx_ltx.events import Event, Phase, Progress
from mlx_ltx.media.audio import fit_length, read_sound
from mlx_ltx.media.clips import VideoInfo, probe, read_clip
from mlx_ltx.models.audio_vae import AudioEncoder, AudioVaeConfig
from mlx_ltx.models.mel import MelSpectrogram
from mlx_ltx.pipelines.encode import encode_clip
from mlx_ltx.pipelines.job import Job
from mlx_ltx.pipelines.run import Run
from mlx_ltx.sampling.geometry import AudioGrid, ClipShape

VIDEO, SOUND = "encode-video", "encode-audio"
SECONDS_FOR_MEL = 0.1  # a mel frame sees 64 ms


@dataclass(frozen=True)
class SourceClip:
    """A clip to work on, as a canvas: frames before it and after it are to be made.

    Attributes:
        path: the file.
        info: what it holds.
        frames: how many of its frames are used.
        before: frames of the canvas before its first.
    """

    path: Path
    info: VideoInfo
    frames: int
    before: int = 0

    @property
    def fps(self) -> float:
        return float(self.info.fps)

    def pixels(self) -> Iterator[np.ndarray]:
        """Its frames, uint8 (H, W, 3)."""
        return read_clip(self.path, frames=self.frames)

    def canvas(self, total: int) -> Iterator[np.ndarray]:
        """``total`` frames: its own, and its first and last ones repeated to both sides."""
        frame: np.ndarray | None = None
        shown = 0
        for frame in self.pixels():
            for _ in range(self.before + 1 if shown == 0 else 1):
                yield frame
                shown += 1
        assert frame is not None
        for _ in range(total - shown):
            yield frame


def open_source(path: Path) -> SourceClip:
    """A clip with a constant rate.

    Raises:
        UserError: it cannot be read, or its rate varies.
    """
    info = probe(path)
    if not info.constant_rate:
        raise UserError(
            f"{path}: has a variable frame rate (about {float(info.fps):.4g} frames per second); convert it to a "
            "constant one first"
        )
    return SourceClip(path, info, info.frames)


def check_even_size(path: Path, clip: ClipShape) -> None:
    """Raises UserError if a clip made of a source cannot be encoded as H.264."""
    if clip.width % 2 or clip.height % 2:
        raise UserError(f"{path}: is {clip.width}x{clip.height}; H.264 needs even sizes, so crop it first")


def video_phase(job: Job, title: str, frames: int) -> Phase:
    return Phase(VIDEO, title, frames, "frames")


def encode_frames(
    run: Run, frames: Iterable[np.ndarray], clip: ClipShape, total: int
) -> Generator[Event, None, mx.array]:
    """Frames (uint8, at most as large as the clip) as a latent; edges are repeated where the clip is larger."""
    return (yield from run.phase(VIDEO, _encode(run.job, frames, clip, total)))


def _encode(job: Job, frames: Iterable[np.ndarray], clip: ClipShape, total: int) -> Generator[Event, None, mx.array]:
    encoder = load_video_encoder(job.model.checkpoint, job.dtype)
    read = 0

    def padded() -> Iterator[np.ndarray]:
        nonlocal read
        for frame in frames:
            read += 1
            padding = ((0, clip.height - frame.shape[0]), (0, clip.width - frame.shape[1]), (0, 0))
            yield np.pad(frame, padding, mode="edge")

    latents = []
    for latent in encode_clip(encoder, padded()):
        latents.append(latent)
        yield Progress(VIDEO, read, total)
    whole = mx.concatenate(latents, axis=1)
    mx.eval(whole)
    return whole


def sound_phase(job: Job) -> Phase:
    return Phase(SOUND, "Encoding the sound", 1, "sounds")


def encode_sound(
    run: Run, path: Path, grid: AudioGrid | None, start: float = 0.0, duration: float | None = None, before: float = 0.0
) -> Generator[Event, None, mx.array]:
    """The sound of a file as a latent.

    Args:
        grid: the latent's length; shorter sound is followed by silence. None is as long as the sound.
        start, duration: the part of the file.
        before: seconds of silence before it.
    """
    return (yield from run.phase(SOUND, _encode_sound(run.job, path, grid, start, duration, before)))


def _encode_sound(
    job: Job, path: Path, grid: AudioGrid | None, start: float, duration: float | None, before: float
) -> Generator[Event, None, mx.array]:
    config = job.model.audio_vae
    rate = config.sampling_rate
    waveform = read_sound(path, rate, start, duration)
    waveform = np.pad(waveform, ((round(before * rate), 0), (0, 0)))
    latent = sound_latent(load_audio_encoder(job.model.checkpoint, job.dtype), config, waveform, grid, job.dtype)
    mx.eval(latent)
    yield Progress(SOUND, 1, 1)
    return latent


def sound_latent(
    encoder: AudioEncoder, config: AudioVaeConfig, waveform: np.ndarray, grid: AudioGrid | None, dtype: mx.Dtype
) -> mx.array:
    """A waveform (samples, 2) as a latent (1, T, M, C), lazily; ``grid`` as in :func:`encode_sound`."""
    if grid is not None:
        # one latent more than needed, so that the encoder never runs out of sound
        waveform = fit_length(waveform, (grid.frames + 1) * grid.scale * grid.hop)
    else:
        waveform = fit_length(waveform, max(len(waveform), round(SECONDS_FOR_MEL * config.sampling_rate)))
    mel = MelSpectrogram.from_config(config)(mx.array(waveform)[None])
    latent = encoder(mel.astype(dtype))
    return latent if grid is None else latent[:, : grid.frames]
