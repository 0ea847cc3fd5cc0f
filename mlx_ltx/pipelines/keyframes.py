"""From keyframe to keyframe: two images or more, anywhere in the clip (ltx_pipelines/keyframe_interpolation.py).

1. Encode the prompts, and every image at both sizes as a keyframe that guides the clip.
2. Denoise at half the size; guided, unless the model was distilled.
3. Enlarge the video latent x2 and refine picture and sound in 3 steps (with the distilled LoRA, unless the model was
   distilled).
4. Decode and write.
"""

from __future__ import annotations

from collections.abc import Generator

from mlx_ltx.errors import UserError
from mlx_ltx.events import Event
from mlx_ltx.pipelines import pipeline as fields
from mlx_ltx.pipelines.job import Job
from mlx_ltx.pipelines.run import Run
from mlx_ltx.pipelines.two_stage import TAKES
from mlx_ltx.pipelines.two_stages import Material, TwoStages, encode_given_images


def encode(run: Run) -> Generator[Event, None, Material]:
    return (yield from encode_given_images(run, guiding=True))


def check(job: Job) -> None:
    if len(job.request.images) < 2:
        raise UserError("the keyframes pipeline needs two images or more: --image FILE FRAME, repeated")


RECIPE = TwoStages(encode=encode)

PIPELINE = fields.Pipeline(
    name="keyframes",
    title="from image to image: two or more keyframes anywhere in the clip",
    takes=TAKES | {"guided"},
    needs=("images",),
    two_stage=True,
    distilled_lora=(0.0, 1.0),
    check=check,
    phases=RECIPE.phases,
    run=RECIPE.run,
)
