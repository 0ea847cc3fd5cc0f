"""Dub a clip: the same scene and speaker say what the prompt says (ltx_pipelines/dubit.py), for distilled models.

1. Encode the prompt, given images and the reference video at both sizes, and its sound.
2. Denoise at half the size in 8 steps with the Dub-It LoRA: the picture follows the reference's, the voice its sound,
   which stands just before the clip.
3. Enlarge the video latent x2 and refine it in 3 steps, still with the LoRA, beside the first stage's sound.
4. Decode the picture, and the first stage's sound.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

from mlx_ltx.errors import UserError
from mlx_ltx.events import Event, Phase
from mlx_ltx.media.clips import probe
from mlx_ltx.media.fit import fit_mode
from mlx_ltx.pipelines import pipeline as fields
from mlx_ltx.pipelines.images import encode_images, image_phases
from mlx_ltx.pipelines.job import Job, Model, clip_size
from mlx_ltx.pipelines.references import check_references, encode_references, reference_phase, reference_scale
from mlx_ltx.pipelines.run import Run
from mlx_ltx.pipelines.sources import encode_sound, open_source, sound_phase
from mlx_ltx.pipelines.stage import Given
from mlx_ltx.pipelines.two_stages import Material, TwoStages
from mlx_ltx.request import Request, VideoInput
from mlx_ltx.sampling.conditioning import AudioReference
from mlx_ltx.sampling.geometry import ClipShape
from mlx_ltx.sampling.state import Latents


def clip(request: Request, model: Model) -> ClipShape:
    """As long and as fast as the reference, in whole latent frames; in the size that is asked for, or near its own."""
    assert request.reference_video is not None
    source = open_source(request.reference_video)
    multiple, time = 2 * model.video_vae.space_scale, model.video_vae.time_scale
    near = replace(
        request,
        width=request.width or max(round(source.info.width / multiple), 1) * multiple,
        height=request.height or max(round(source.info.height / multiple), 1) * multiple,
    )
    width, height = clip_size(near, model, PIPELINE)
    return ClipShape((source.frames - 1) // time * time + 1, height, width, source.fps)


def encode_phases(job: Job) -> list[Phase]:
    return [*image_phases(job, stages=2), reference_phase(job, 2), sound_phase(job)]


def encode(run: Run) -> Generator[Event, None, Material]:
    job, request = run.job, run.job.request
    assert request.reference_video is not None
    stages = [job.clip.halved(), job.clip]
    images = yield from encode_images(run, stages)
    strength = 1.0 if request.reference_strength is None else request.reference_strength
    sources = [VideoInput(request.reference_video, strength)]
    references = yield from encode_references(run, sources, stages, reference_scale(job), fit_mode(request.fit))
    voice = yield from encode_sound(run, request.reference_video, None)
    grid = job.grids(job.clip).audio
    assert grid is not None

    def second_sound(draft: Latents) -> Given:
        assert draft.audio is not None
        return Given(draft.audio, 0.0, [AudioReference.preceding(draft.audio, grid)], frozen=True)

    return Material(
        [*images[0], *references[0]],
        [*images[1], *references[1]],
        Given(conditionings=[AudioReference.preceding(voice, grid)]),
        second_sound,
    )


def check(job: Job) -> None:
    request = job.request
    assert request.reference_video is not None
    if len(job.loras.first) != 1:
        raise UserError(f"the dub-it pipeline takes exactly one LoRA, not {len(job.loras.first)}")
    if job.loras.change:
        raise UserError("the dub-it pipeline uses its LoRA in both stages; leave out the stage of --lora")
    if probe(request.reference_video).audio_rate is None:
        raise UserError(f"--reference-video {request.reference_video}: has no sound to take the voice from")
    check_references(job, [request.reference_video], job.clip.halved())


RECIPE = TwoStages(encode=encode, encode_phases=encode_phases, keep_first_sound=True)

PIPELINE = fields.Pipeline(
    name="dub-it",
    title="dub a clip with the Dub-It LoRA; for distilled models",
    takes=fields.PROMPT
    | fields.SIZE
    | fields.IMAGES
    | fields.TWO_STAGES
    | {"loras", "reference_video", "reference_strength"},
    needs=("reference_video", "loras"),
    guided=False,
    two_stage=True,
    clip=clip,
    check=check,
    phases=RECIPE.phases,
    run=RECIPE.run,
)
