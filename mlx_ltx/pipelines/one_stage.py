"""One stage with guidance, for models that were not distilled (ltx_pipelines/ti2vid_one_stage.py).

1. Encode the prompt and the negative prompt; encode given images.
2. Denoise at full size with the LTX-2 schedule: every step is guided by the negative prompt, by a pass with perturbed
   self-attention, and by a pass in which picture and sound do not see each other.
3. Decode and write.
"""

from __future__ import annotations

from collections.abc import Generator

from mlx_ltx.events import Event, Finished, Phase
from mlx_ltx.pipelines.images import encode_images, image_phases
from mlx_ltx.pipelines.job import Job
from mlx_ltx.pipelines.output import output_phases, write_outputs
from mlx_ltx.pipelines.pipeline import Pipeline
from mlx_ltx.pipelines.run import Run
from mlx_ltx.pipelines.stage import bring_in_transformer, denoise_phase, denoise_stage, load_phase
from mlx_ltx.pipelines.text import encode_prompts, text_phases
from mlx_ltx.sampling.schedules import ltx2_schedule

DENOISE = "denoise"


def phases(job: Job) -> list[Phase]:
    assert job.steps is not None
    return [
        *text_phases(job, prompts=2),
        *image_phases(job, stages=1),
        load_phase(job),
        denoise_phase(DENOISE, "Denoising", job.clip, job.steps),
        *output_phases(job),
    ]


def run(job: Job) -> Generator[Event, None, Finished]:
    assert job.steps is not None
    assert job.negative_prompt is not None
    run = Run(job)
    yield run.plan()
    positive, negative = yield from encode_prompts(run, [job.request.prompt, job.negative_prompt])
    (images,) = yield from encode_images(run, [job.clip])

    model = yield from bring_in_transformer(run)
    latents = yield from denoise_stage(
        run,
        DENOISE,
        model,
        job.clip,
        ltx2_schedule(job.steps).tolist(),
        positive,
        conditionings=images,
        guidance=job.guidance,
        negative=negative,
    )
    del model
    return (yield from write_outputs(run, latents))


PIPELINE = Pipeline(
    name="one-stage",
    title="guided, at full size; for dev models",
    two_stage=False,
    guided=True,
    unused=("spatial_upsampler",),
    phases=phases,
    run=run,
)
