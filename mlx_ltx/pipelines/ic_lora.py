"""Video to video with an IC-LoRA, for distilled models (ltx_pipelines/ic_lora.py).

1. Encode the prompt, given images at both sizes, and the reference videos at half the size (smaller by what the LoRA's
   metadata says).
2. Denoise at half the size in 8 steps with the LoRA; the clip's tokens attend to the references', as strongly as asked.
3. Enlarge the video latent x2 and refine in 3 steps at full size, without the LoRA (``--skip-stage-2`` does
   the first stage at full size instead, and no second one).
4. Decode and write.
"""

from __future__ import annotations

from collections.abc import Generator

import numpy as np

from mlx_ltx.errors import UserError
from mlx_ltx.events import Event, Phase
from mlx_ltx.media.clips import read_clip
from mlx_ltx.media.fit import fit_mode
from mlx_ltx.pipelines import pipeline as fields
from mlx_ltx.pipelines.images import encode_images, image_phases
from mlx_ltx.pipelines.job import Job
from mlx_ltx.pipelines.references import (
    check_references,
    encode_references,
    latent_mask,
    reference_phase,
    reference_scale,
)
from mlx_ltx.pipelines.run import Run
from mlx_ltx.pipelines.two_stages import Material, TwoStages
from mlx_ltx.sampling.geometry import ClipShape


def stages(job: Job) -> list[ClipShape]:
    """The first stage's size, and the second's unless it is skipped."""
    return [job.clip] if job.request.skip_stage_2 else [job.clip.halved(), job.clip]


def encode_phases(job: Job) -> list[Phase]:
    references = reference_phase(job, len(job.request.video_conditionings))
    return [*image_phases(job, stages=len(stages(job))), references]


def encode(run: Run) -> Generator[Event, None, Material]:
    job, request = run.job, run.job.request
    images = yield from encode_images(run, stages(job))
    weaker = request.attention_mask is not None or (request.attention_strength or 1.0) < 1.0

    def attention(reference: ClipShape) -> float | np.ndarray:
        strength = 1.0 if request.attention_strength is None else request.attention_strength
        if request.attention_mask is None:
            return strength
        vae = job.model.video_vae
        return strength * latent_mask(request.attention_mask, reference, vae.space_scale, vae.time_scale)

    (references,) = yield from encode_references(
        run,
        list(request.video_conditionings),
        stages(job)[:1],
        reference_scale(job),
        fit_mode(request.fit),
        attention if weaker or request.attention_strength == 0 else None,
    )
    return Material([*images[0], *references], images[-1] if len(images) > 1 else [])


def check(job: Job) -> None:
    if not job.loras.first:
        raise UserError("the ic-lora pipeline needs an IC-LoRA: --lora FILE")
    check_references(job, [video.path for video in job.request.video_conditionings], stages(job)[0])
    if job.request.attention_mask is not None:
        next(read_clip(job.request.attention_mask, fps=job.clip.fps))


RECIPE = TwoStages(encode=encode, encode_phases=encode_phases)

PIPELINE = fields.Pipeline(
    name="ic-lora",
    title="video to video with an IC-LoRA; for distilled models",
    takes=fields.CLIP
    | fields.TWO_STAGES
    | {"video_conditionings", "attention_strength", "attention_mask", "skip_stage_2"},
    needs=("video_conditionings", "loras"),
    guided=False,
    two_stage=True,
    first_stage_loras=True,
    check=check,
    phases=RECIPE.phases,
    run=RECIPE.run,
)
