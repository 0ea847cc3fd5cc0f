"""Sound alone (ltx_pipelines/t2a_one_stage.py).

1. Encode the prompts.
2. Denoise the sound with the transformer's audio stream alone; guided, unless the model was distilled.
3. Decode and write a wav or flac file, at the rate that the model's vocoder has.
"""

from __future__ import annotations

from collections.abc import Generator

from mlx_ltx.events import Event, Finished, Phase
from mlx_ltx.pipelines import pipeline as fields
from mlx_ltx.pipelines.job import Job
from mlx_ltx.pipelines.output import Made, output_phases, write_outputs
from mlx_ltx.pipelines.run import Run
from mlx_ltx.pipelines.stage import bring_in_transformer, denoise_phases, denoise_stage, full_schedule, load_phase
from mlx_ltx.pipelines.text import encode_prompts, text_phases

DENOISE = "denoise"


def phases(job: Job) -> list[Phase]:
    return [
        *text_phases(job),
        load_phase(job),
        *denoise_phases(job, DENOISE, "Denoising", job.clip, len(full_schedule(job)) - 1),
        *output_phases(job),
    ]


def run(job: Job) -> Generator[Event, None, Finished]:
    run = Run(job)
    yield from run.begin()
    texts = yield from encode_prompts(run)
    model = yield from bring_in_transformer(run)
    made = []
    for shot in run.shots:
        latents = yield from denoise_stage(
            run, shot, DENOISE, model, job.clip, full_schedule(job), texts, guidance=job.guidance
        )
        made.append(Made(latents))
    del model
    return (yield from write_outputs(run, made))


PIPELINE = fields.Pipeline(
    name="t2a",
    title="sound alone",
    takes=(fields.PROMPT | fields.SEGMENTS | fields.LENGTH | fields.LORAS | fields.GUIDANCE | {"guided"})
    - fields.VIDEO_GUIDANCE
    - {"audio_modality_scale"},
    needs=("output_audio",),
    makes_picture=False,
    phases=phases,
    run=run,
)
