"""Enlarge an existing clip x2 in size, or x2 in frames per second, with a latent upsampler alone.

1. Encode the clip.
2. Upsample its latent.
3. Decode and write; the clip's own sound goes with it, unchanged.

There is no denoising: it is quick, and as sharp as the upsampler makes it.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_ltx.checkpoints.components import load_statistics, load_upsampler, read_config
from mlx_ltx.checkpoints.files import SafetensorsFile
from mlx_ltx.errors import UserError
from mlx_ltx.events import Event, Finished, Phase, Progress
from mlx_ltx.media.sound import SourceSound
from mlx_ltx.models.upsampler import UpsamplerConfig, upsample_latent
from mlx_ltx.pipelines import pipeline as fields
from mlx_ltx.pipelines.job import Job, Model
from mlx_ltx.pipelines.output import Made, output_phases, write_outputs
from mlx_ltx.pipelines.run import Run
from mlx_ltx.pipelines.sources import SourceClip, check_even_size, encode_frames, open_source, video_phase
from mlx_ltx.request import Request
from mlx_ltx.sampling.geometry import ClipShape
from mlx_ltx.sampling.state import Latents

UPSAMPLE = "upsample"


def source_of(request: Request) -> SourceClip:
    assert request.video_path is not None
    return open_source(request.video_path)


def _temporal(request: Request) -> bool:
    return request.upscale == "temporal"


def clip(request: Request, model: Model) -> ClipShape:
    source = source_of(request)
    if _temporal(request):
        shape = ClipShape(2 * source.frames - 1, source.info.height, source.info.width, 2 * source.fps)
        check_even_size(source.path, shape)
        return shape
    return ClipShape(source.frames, 2 * source.info.height, 2 * source.info.width, source.fps)


def canvas(source: SourceClip, model: Model) -> ClipShape:
    """The source on the model's grid."""
    space, time = model.video_vae.space_scale, model.video_vae.time_scale
    return ClipShape(
        math.ceil((source.frames - 1) / time) * time + 1,
        math.ceil(source.info.height / space) * space,
        math.ceil(source.info.width / space) * space,
        source.fps,
    )


def upsampler_file(request: Request, model: Model) -> SafetensorsFile:
    """The upsampler that the request needs.

    Raises:
        UserError: there is none, or it is for something else.
    """
    path: Path | None
    if _temporal(request):
        if request.temporal_upsampler is None:
            raise UserError("--upscale temporal needs --temporal-upsampler FILE")
        path = Path(request.temporal_upsampler)
    else:
        path = model.files.spatial_upsampler
        if path is None:
            raise UserError("--upscale spatial needs an upsampler: pass --spatial-upsampler FILE")
    file = SafetensorsFile(path)
    config = read_config(file, UpsamplerConfig.from_metadata)
    wanted = (1, 2) if _temporal(request) else (2, 1)
    if (config.spatial_factor, config.temporal_factor) != wanted:
        raise UserError(f"{path}: is not an upsampler of x2 in {'time' if _temporal(request) else 'space'} only")
    if config.in_channels != model.video_vae.latent_channels:
        raise UserError(f"{path}: made for latents of {config.in_channels} channels, not of this model")
    return file


def phases(job: Job) -> list[Phase]:
    frames = canvas(source_of(job.request), job.model).frames
    return [
        video_phase(job, "Encoding the clip", frames),
        Phase(UPSAMPLE, "Enlarging the latent x2", 1, "latents"),
        *output_phases(job, decodes_sound=False),
    ]


def run(job: Job) -> Generator[Event, None, Finished]:
    run = Run(job)
    yield from run.begin()
    source = source_of(job.request)
    size = canvas(source, job.model)
    latent = yield from encode_frames(run, source.canvas(size.frames), size, size.frames)
    latent = yield from run.phase(UPSAMPLE, _upsample(job, latent))

    def cropped(frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        left = job.clip.frames
        for chunk in frames:
            chunk = np.ascontiguousarray(chunk[:left, : job.clip.height, : job.clip.width])
            left -= len(chunk)
            if len(chunk):
                yield chunk

    sound = SourceSound(source.path, lossless=True) if source.info.audio_rate is not None else None
    return (yield from write_outputs(run, [Made(Latents(latent, None), sound, cropped)]))


def _upsample(job: Job, latent: mx.array) -> Generator[Event, None, mx.array]:
    upsampler = load_upsampler(upsampler_file(job.request, job.model), job.dtype)
    statistics = load_statistics(job.model.checkpoint, job.model.video_vae.latent_channels)
    enlarged = upsample_latent(upsampler, latent, statistics)
    mx.eval(enlarged)
    yield Progress(UPSAMPLE, 1, 1)
    return enlarged


def check(job: Job) -> None:
    wanted, other = ("temporal", "spatial") if _temporal(job.request) else ("spatial", "temporal")
    if getattr(job.request, f"{other}_upsampler") is not None:
        raise UserError(f"--{other}-upsampler: --upscale {wanted} does not use it")
    upsampler_file(job.request, job.model)


def has_sound(request: Request) -> bool:
    return source_of(request).info.audio_rate is not None


PIPELINE = fields.Pipeline(
    name="upscale",
    title="enlarge an existing clip x2 in size or in frames per second",
    takes=frozenset({"video_path", "upscale", "spatial_upsampler", "temporal_upsampler", "seed"}),
    needs=("video_path",),
    has_sound=has_sound,
    guided=False,
    clip=clip,
    check=check,
    phases=phases,
    run=run,
)
