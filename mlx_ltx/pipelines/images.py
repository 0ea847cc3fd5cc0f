"""Part of recipes with given images: encode them at every size that a stage needs."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import mlx.core as mx

from mlx_ltx.checkpoints.components import load_video_encoder
from mlx_ltx.events import Event, Phase, Progress
from mlx_ltx.media.images import prepare_image
from mlx_ltx.pipelines.job import Job
from mlx_ltx.pipelines.run import Run
from mlx_ltx.sampling.conditioning import Keyframe, ReplacedLatent
from mlx_ltx.sampling.geometry import ClipShape
from mlx_ltx.sampling.state import Conditioning

ENCODE = "encode-images"


def image_phases(job: Job, stages: int) -> list[Phase]:
    count = len(job.request.images)
    if not count:
        return []
    return [Phase(ENCODE, f"Encoding {count} image{'s' if count > 1 else ''}", count * stages, "images")]


def encode_images(run: Run, stages: Sequence[ClipShape]) -> Generator[Event, None, list[list[Conditioning]]]:
    """The given images as conditionings, a list per stage; the encoder is loaded once."""
    if not run.job.request.images:
        return [[] for _ in stages]
    return (yield from run.phase(ENCODE, _encode(run.job, stages)))


def _encode(job: Job, stages: Sequence[ClipShape]) -> Generator[Event, None, list[list[Conditioning]]]:
    encoder = load_video_encoder(job.checkpoint, job.dtype)
    images = job.request.images
    results: list[list[Conditioning]] = []
    for stage, clip in enumerate(stages):
        conditionings: list[Conditioning] = []
        for index, image in enumerate(images):
            pixels = prepare_image(image.path, clip.height, clip.width, job.image_crf)
            latent = encoder(mx.array(pixels)[None, None])
            mx.eval(latent)
            if image.frame == 0:
                conditionings.append(ReplacedLatent(latent, 0, image.strength))
            else:
                conditionings.append(Keyframe(latent, image.frame, image.strength))
            yield Progress(ENCODE, stage * len(images) + index + 1, len(stages) * len(images))
        results.append(conditionings)
    return results
