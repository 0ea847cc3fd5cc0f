"""Part of the IC-LoRA recipes: reference videos as tokens that the clip follows."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_ltx.checkpoints.components import load_video_encoder
from mlx_ltx.errors import UserError
from mlx_ltx.events import Event, Phase, Progress
from mlx_ltx.media.clips import read_clip
from mlx_ltx.media.color import LogCurve
from mlx_ltx.media.exr import read_exr_clip
from mlx_ltx.media.fit import FitMode, fit_pixels
from mlx_ltx.media.hdr import HdrSpace
from mlx_ltx.pipelines.encode import encode_whole
from mlx_ltx.pipelines.job import Job
from mlx_ltx.pipelines.run import Run
from mlx_ltx.request import VideoInput
from mlx_ltx.sampling.conditioning import AttentionStrength, Reference
from mlx_ltx.sampling.geometry import ClipShape
from mlx_ltx.sampling.state import Conditioning

REFERENCES = "encode-references"


@dataclass(frozen=True)
class ReferenceScale:
    """How a LoRA's reference videos are smaller than its clips: in size, and in frames per second."""

    size: int = 1
    time: int = 1


def reference_scale(job: Job) -> ReferenceScale:
    """What the LoRAs of the first stage were trained with.

    Raises:
        UserError: they disagree.
    """
    found = {
        ReferenceScale(lora.file.info.reference_downscale_factor, lora.file.info.reference_temporal_scale_factor)
        for lora in job.loras.first
    }
    told = found - {ReferenceScale()}
    if len(told) > 1:
        raise UserError("the LoRAs were trained with references of different scales; use one of them")
    return told.pop() if told else ReferenceScale()


def check_references(job: Job, sources: list[Path], first_stage: ClipShape) -> None:
    """Reference videos can be read, and are on the model's grid in the first stage as well.

    Raises:
        UserError: they cannot, or are not.
    """
    scale, space, clip = reference_scale(job), job.model.video_vae.space_scale, job.clip
    multiple = scale.size * space * (clip.width // first_stage.width)
    for name, value in (("--width", clip.width), ("--height", clip.height)):
        if value % multiple:
            raise UserError(
                f"{name} {value}: the LoRA's references are {scale.size} times smaller, so it must be a multiple of "
                f"{multiple}"
            )
    for path in sources:
        if path.is_dir():
            _space(job, path)
            next(read_exr_clip(path, frames=1))
        else:
            next(read_clip(path, fps=clip.fps))


def reference_phase(job: Job, count: int) -> Phase:
    return Phase(REFERENCES, f"Encoding {count} reference{'s' if count != 1 else ''}", count, "videos")


def reference_frames(
    source: VideoInput | Path, clip: ClipShape, scale: ReferenceScale, fit: FitMode, time_scale: int
) -> Iterator[np.ndarray]:
    """A reference's frames at its size and rate: frame 0, then every ``scale.time``-th.

    They are in the values that came: 0 to 255, or light from a folder of EXR frames, which are taken one by one.
    """
    path = source.path if isinstance(source, VideoInput) else source
    height, width = clip.height // scale.size, clip.width // scale.size
    frames = read_exr_clip(path) if path.is_dir() else read_clip(path, fps=clip.fps)
    kept = 0
    shown: np.ndarray | None = None
    for index in range(clip.frames):
        frame = next(frames, None)
        if frame is None:
            break
        if index == 0 or (index - 1) % scale.time == 0:
            shown = fit_pixels(frame, height, width, fit)
            kept += 1
            yield shown
    if shown is None:
        raise UserError(f"{path}: has no frames")
    for _ in range((1 - kept) % time_scale):  # up to the next whole latent frame
        yield shown


def encode_references(
    run: Run,
    sources: list[VideoInput],
    stages: list[ClipShape],
    scale: ReferenceScale,
    fit: FitMode = "crop",
    attention: Callable[[ClipShape], float | np.ndarray] | None = None,
) -> Generator[Event, None, list[list[Conditioning]]]:
    """Reference conditionings, a list per stage.

    Args:
        attention: how strongly the clip's tokens and the reference's see each other in a stage; None fully.
    """
    return (yield from run.phase(REFERENCES, _encode(run.job, sources, stages, scale, fit, attention)))


def _encode(
    job: Job,
    sources: list[VideoInput],
    stages: list[ClipShape],
    scale: ReferenceScale,
    fit: FitMode,
    attention: Callable[[ClipShape], float | np.ndarray] | None,
) -> Generator[Event, None, list[list[Conditioning]]]:
    encoder = load_video_encoder(job.model.checkpoint, job.dtype)
    time_scale, space_scale = job.model.video_vae.time_scale, job.model.video_vae.space_scale
    results: list[list[Conditioning]] = []
    for clip in stages:
        results.append([])
        for source in sources:
            frames = reference_frames(source, clip, scale, fit, time_scale)
            latent = encode_whole(encoder, _seen(job, source.path, frames))
            mx.eval(latent)
            item: Conditioning = Reference(latent, source.strength, scale.size, scale.time)
            if attention is not None:
                count, height, width = latent.shape[1:4]
                shape = ClipShape((count - 1) * time_scale + 1, height * space_scale, width * space_scale, clip.fps)
                strength = attention(shape)
                item = AttentionStrength(item, strength)
            results[-1].append(item)
            yield Progress(REFERENCES, sum(map(len, results)), len(stages) * len(sources))
    return results


def _seen(job: Job, path: Path, frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """A reference's frames as the network is to see them, float32 in [-1, 1]."""
    if path.is_dir():
        return map(_space(job, path).to_network, frames)
    return ((frame.astype(np.float32) / 255) * 2 - 1 for frame in frames)


def _space(job: Job, folder: Path) -> HdrSpace:
    if job.request.hdr is None or job.curve is not LogCurve.ACESCCT:
        raise UserError(f"--video-conditioning {folder}: EXR frames need --hdr, in a pipeline that works in ACEScct")
    return HdrSpace[job.request.hdr]


def latent_mask(path: Path, clip: ClipShape, space: int, time_scale: int) -> np.ndarray:
    """A mask video as strengths of latent tokens, (F, H, W) in [0, 1].

    Areas are averaged: over a latent's pixels, and over its frames, of which the first latent has one.
    """
    height, width = clip.height // space, clip.width // space
    frames = []
    last: np.ndarray | None = None
    for frame in read_clip(path, fps=clip.fps):
        grey = fit_pixels(frame, clip.height, clip.width, "stretch").mean(axis=-1) / 255
        last = grey.reshape(height, space, width, space).mean(axis=(1, 3))
        frames.append(last)
        if len(frames) == clip.frames:
            break
    if last is None:
        raise UserError(f"--conditioning-attention-mask {path}: has no frames")
    frames += [last] * (clip.frames - len(frames))
    rest = np.stack(frames[1:]).reshape(-1, time_scale, height, width).mean(axis=1) if clip.frames > 1 else None
    first = frames[0][None]
    return np.clip(first if rest is None else np.concatenate([first, rest]), 0, 1).astype(np.float32)
