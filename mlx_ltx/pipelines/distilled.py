"""Two stages without guidance, for distilled models (ltx_pipelines/distilled.py).

1. Encode the prompt; encode given images at both sizes.
2. Denoise at half the size in 8 steps.
3. Enlarge the video latent x2, mix noise back in, and refine picture and sound in 3 steps at full size.
4. Decode and write.
"""

from __future__ import annotations

from collections.abc import Generator

from mlx_ltx.events import Event, Finished, Phase
from mlx_ltx.pipelines.images import encode_images, image_phases
from mlx_ltx.pipelines.job import Job
from mlx_ltx.pipelines.output import output_phases, write_outputs
from mlx_ltx.pipelines.pipeline import GUIDANCE_FIELDS, Pipeline
from mlx_ltx.pipelines.run import Run
from mlx_ltx.pipelines.stage import (
    bring_in_transformer,
    denoise_phase,
    denoise_stage,
    enlarge,
    load_phase,
    upsample_phase,
)
from mlx_ltx.pipelines.text import encode_prompts, text_phases
from mlx_ltx.sampling.denoise import Latents
from mlx_ltx.sampling.schedules import DISTILLED, REFINEMENT

DENOISE, REFINE = "denoise", "refine"


def phases(job: Job) -> list[Phase]:
    return [
        *text_phases(job, prompts=1),
        *image_phases(job, stages=2),
        load_phase(job),
        denoise_phase(DENOISE, "Denoising", job.clip.halved(), len(DISTILLED) - 1),
        upsample_phase(),
        denoise_phase(REFINE, "Refining", job.clip, len(REFINEMENT) - 1),
        *output_phases(job),
    ]


def run(job: Job) -> Generator[Event, None, Finished]:
    run = Run(job)
    yield run.plan()
    half = job.clip.halved()
    (text,) = yield from encode_prompts(run, [job.request.prompt])
    half_images, images = yield from encode_images(run, [half, job.clip])

    model = yield from bring_in_transformer(run)
    draft = yield from denoise_stage(run, DENOISE, model, half, DISTILLED, text, conditionings=half_images)
    assert draft.video is not None
    enlarged = Latents((yield from enlarge(run, draft.video)), draft.audio)
    latents = yield from denoise_stage(
        run, REFINE, model, job.clip, REFINEMENT, text, conditionings=images, initial=enlarged
    )
    del model
    return (yield from write_outputs(run, latents))


PIPELINE = Pipeline(
    name="distilled",
    title="8 steps at half size, enlarged x2, refined in 3 steps; for distilled models",
    two_stage=True,
    guided=False,
    unused=("steps", "negative_prompt", *GUIDANCE_FIELDS),
    phases=phases,
    run=run,
)
