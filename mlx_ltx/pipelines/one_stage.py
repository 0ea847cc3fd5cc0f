"""One stage with guidance, for models that were not distilled (ltx_pipelines/ti2vid_one_stage.py).

1. Encode the prompt and the negative prompt; encode given images.
2. Denoise at full size with the LTX-2 schedule: every step is guided by the negative prompt, by a pass with perturbed
   self-attention, and by a pass in which picture and sound do not see each other.
3. Decode and write.
"""

from __future__ import annotations

from collections.abc import Generator

from mlx_ltx.events import Event, Finished, Phase
from mlx_ltx.pipelines import pipeline as fields
from mlx_ltx.pipelines.images import encode_images, image_phases
from mlx_ltx.pipelines.job import Job
from mlx_ltx.pipelines.output import Made, output_phases, write_outputs
from mlx_ltx.pipelines.run import Run
from mlx_ltx.pipelines.stage import (
    Given,
    bring_in_transformer,
    denoise_phases,
    denoise_stage,
    full_schedule,
    load_phase,
)
from mlx_ltx.pipelines.text import encode_prompts, text_phases
from mlx_ltx.sampling.samplers import Euler, GradientEstimating

DENOISE = "denoise"
SAMPLERS = {"euler": Euler, "gradient-estimation": GradientEstimating}


def phases(job: Job) -> list[Phase]:
    return [
        *text_phases(job),
        *image_phases(job, stages=1),
        load_phase(job),
        *denoise_phases(job, DENOISE, "Denoising", job.clip, len(full_schedule(job)) - 1),
        *output_phases(job),
    ]


def run(job: Job) -> Generator[Event, None, Finished]:
    run = Run(job)
    yield from run.begin()
    texts = yield from encode_prompts(run)
    (images,) = yield from encode_images(run, [job.clip])

    model = yield from bring_in_transformer(run)
    made = []
    for shot in run.shots:
        latents = yield from denoise_stage(
            run, shot, DENOISE, model, job.clip, full_schedule(job), texts,
            video=Given(conditionings=images),
            guidance=job.guidance,
            sampler=SAMPLERS[job.request.sampler or "euler"](),
        )  # fmt: skip
        made.append(Made(latents))
    del model
    return (yield from write_outputs(run, made))


PIPELINE = fields.Pipeline(
    name="one-stage",
    title="guided, at full size; for dev models",
    takes=(
        fields.PROMPT
        | fields.SEGMENTS
        | fields.SIZE
        | fields.LENGTH
        | fields.IMAGES
        | fields.LORAS
        | fields.GUIDANCE
        | fields.HDR
    )
    | {"audio", "sampler"},
    guided=True,
    phases=phases,
    run=run,
)
