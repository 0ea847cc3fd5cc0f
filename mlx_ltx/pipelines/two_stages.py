"""What the two-stage recipes have in common: draft at half the size, enlarge x2, refine at full size.

They differ in what is given, in how the first stage is denoised, and in which stage's sound is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

from mlx_ltx.events import Event, Finished, Phase
from mlx_ltx.media.sound import SourceSound
from mlx_ltx.pipelines.images import encode_images, image_phases
from mlx_ltx.pipelines.job import Job
from mlx_ltx.pipelines.output import Made, output_phases, write_outputs
from mlx_ltx.pipelines.run import Run, Shot
from mlx_ltx.pipelines.stage import (
    Given,
    bring_in_transformer,
    change_loras,
    change_phases,
    denoise_phases,
    denoise_stage,
    enlarge,
    full_schedule,
    load_phase,
    upsample_phase,
)
from mlx_ltx.pipelines.text import encode_prompts, text_phases
from mlx_ltx.sampling.samplers import Sampler
from mlx_ltx.sampling.schedules import REFINEMENT
from mlx_ltx.sampling.state import Conditioning, Latents

DENOISE, REFINE = "denoise", "refine"


@dataclass(frozen=True)
class Material:
    """What is given to both stages.

    Attributes:
        first, second: conditionings of the picture in each stage.
        first_sound: what the sound of the first stage starts from.
        second_sound: the same for the second, made from the first stage's latents; None refines what it made.
        sound: a file's sound that the clip has instead of a made one.
    """

    first: Sequence[Conditioning] = ()
    second: Sequence[Conditioning] = ()
    first_sound: Given = field(default_factory=Given)
    second_sound: Callable[[Latents], Given] | None = None
    sound: SourceSound | None = None


@dataclass(frozen=True)
class TwoStages:
    """A two-stage recipe.

    Attributes:
        encode: make the material; by default the given images, at both sizes.
        encode_phases: what that will do.
        refinement: the second stage's sigmas.
        schedule: the first stage's sigmas; by default the distilled ones, or the LTX-2 schedule when guided.
        sampler: of both stages, new for each run; Euler if None.
        keep_first_sound: the sound of the first stage is the clip's; the second one's is only company for the picture.
        makes_sound: the sound is made, not taken from a file. A given sound is not guided either: it has neither a
            negative prompt nor perturbed attention (ltx_pipelines/a2vid_two_stage.py).
    """

    encode: Callable[[Run], Generator[Event, None, Material]] | None = None
    encode_phases: Callable[[Job], list[Phase]] | None = None
    refinement: tuple[float, ...] = REFINEMENT
    schedule: Callable[[Job], Sequence[float]] | None = None
    sampler: Callable[[Shot], Sampler] | None = None
    keep_first_sound: bool = False
    makes_sound: bool = True

    def sigmas(self, job: Job) -> Sequence[float]:
        if self.schedule is not None:
            return self.schedule(job)
        return full_schedule(job)

    def phases(self, job: Job) -> list[Phase]:
        if job.request.skip_stage_2:
            draft = denoise_phases(job, DENOISE, "Denoising", job.clip, len(self.sigmas(job)) - 1)
            encode = self.encode_phases(job) if self.encode_phases else image_phases(job, stages=1)
            return [*text_phases(job), *encode, load_phase(job), *draft, *output_phases(job, self.makes_sound)]
        draft = denoise_phases(job, DENOISE, "Denoising", job.clip.halved(), len(self.sigmas(job)) - 1)
        refine = denoise_phases(job, REFINE, "Refining", job.clip, len(self.refinement) - 1)
        encode = self.encode_phases(job) if self.encode_phases else image_phases(job, stages=2)
        return [
            *text_phases(job),
            *encode,
            load_phase(job),
            *draft,
            upsample_phase(job),
            *change_phases(job),
            *refine,
            *output_phases(job, self.makes_sound),
        ]

    def run(self, job: Job) -> Generator[Event, None, Finished]:
        run = Run(job)
        yield from run.begin()
        half = job.clip if job.request.skip_stage_2 else job.clip.halved()
        texts = yield from encode_prompts(run)
        material = yield from (self.encode or encode_given_images)(run)

        model = yield from bring_in_transformer(run)
        drafts = []
        for shot in run.shots:
            draft = yield from denoise_stage(
                run, shot, DENOISE, model, half, self.sigmas(job), texts,
                video=Given(conditionings=material.first),
                audio=material.first_sound,
                guidance=job.guidance,
                guides_sound=self.makes_sound,
                sampler=self.sampler(shot) if self.sampler else None,
            )  # fmt: skip
            drafts.append(draft)
        if job.request.skip_stage_2:
            del model
            return (yield from write_outputs(run, [Made(draft) for draft in drafts]))
        enlarged = yield from enlarge(run, [draft.video for draft in drafts if draft.video is not None])
        yield from change_loras(run, model)
        made = []
        for shot, draft, video in zip(run.shots, drafts, enlarged, strict=True):
            refined = yield from denoise_stage(
                run, shot, REFINE, model, job.clip, self.refinement, texts,
                video=Given(video, self.refinement[0], material.second),
                audio=material.second_sound(draft) if material.second_sound else Given(draft.audio, self.refinement[0]),
                sampler=self.sampler(shot) if self.sampler else None,
                tiles=job.token_tiles,
            )  # fmt: skip
            sound = draft.audio if self.keep_first_sound else refined.audio
            made.append(Made(Latents(refined.video, None if material.sound else sound), material.sound))
        del model
        return (yield from write_outputs(run, made))


def encode_given_images(run: Run, guiding: bool = False) -> Generator[Event, None, Material]:
    """The given images at both sizes."""
    first, second = yield from encode_images(run, [run.job.clip.halved(), run.job.clip], guiding)
    return Material(first, second)
