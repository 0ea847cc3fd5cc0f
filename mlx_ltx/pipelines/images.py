"""Part of recipes with given images: encode them at every size that a stage needs."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import mlx.core as mx

from mlx_ltx.checkpoints.components import load_video_encoder
from mlx_ltx.events import Event, Phase, Progress
from mlx_ltx.media.exr import is_exr
from mlx_ltx.media.fit import fit_mode
from mlx_ltx.media.hdr import HdrSpace, prepare_exr
from mlx_ltx.media.images import prepare_image
from mlx_ltx.models.video_vae import VideoEncoder
from mlx_ltx.pipelines.job import Job
from mlx_ltx.pipelines.run import Run
from mlx_ltx.request import ImageInput
from mlx_ltx.sampling.conditioning import Keyframe, ReplacedLatent
from mlx_ltx.sampling.geometry import ClipShape
from mlx_ltx.sampling.state import Conditioning

ENCODE = "encode-images"


def image_phases(job: Job, stages: int) -> list[Phase]:
    count = len(job.request.images)
    if not count:
        return []
    return [Phase(ENCODE, f"Encoding {count} image{'s' if count > 1 else ''}", count * stages, "images")]


def encode_images(
    run: Run, stages: Sequence[ClipShape], guiding: bool = False
) -> Generator[Event, None, list[list[Conditioning]]]:
    """The given images as conditionings, a list per stage; the encoder is loaded once.

    Args:
        stages: the sizes to encode them at.
        guiding: all of them only guide the clip; otherwise one at frame 0 takes that frame's place.
    """
    if not run.job.request.images:
        return [[] for _ in stages]
    return (yield from run.phase(ENCODE, _encode(run.job, stages, guiding)))


def _encode(job: Job, stages: Sequence[ClipShape], guiding: bool) -> Generator[Event, None, list[list[Conditioning]]]:
    encoder = load_video_encoder(job.model.checkpoint, job.dtype)
    images = job.request.images
    results: list[list[Conditioning]] = []
    for stage, clip in enumerate(stages):
        results.append([])
        for index, image in enumerate(images):
            results[-1].append(_conditioning(job, encoder, image, clip, guiding))
            yield Progress(ENCODE, stage * len(images) + index + 1, len(stages) * len(images))
    return results


def _conditioning(job: Job, encoder: VideoEncoder, image: ImageInput, clip: ClipShape, guiding: bool) -> Conditioning:
    crf = job.model.defaults.image_crf if image.crf is None else image.crf
    mode = fit_mode(job.request.fit)
    if is_exr(image.path):
        pixels = prepare_exr(image.path, clip.height, clip.width, HdrSpace[job.request.hdr or ""], mode)
    else:
        pixels = prepare_image(image.path, clip.height, clip.width, crf, mode)
    latent = encoder(mx.array(pixels)[None, None])
    mx.eval(latent)
    if image.frame == 0 and not guiding:
        return ReplacedLatent(latent, 0, image.strength)
    return Keyframe(latent, image.frame, image.strength)
