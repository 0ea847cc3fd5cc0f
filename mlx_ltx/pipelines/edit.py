"""Make a part of an existing clip anew (retake), or lengthen it at either end (ltx_pipelines/retake.py).

1. Lay the clip on a canvas of 8k + 1 frames and sizes that the model can do: its edges are repeated around it, and its
   first and last frames where something is to be made.
2. Encode picture and sound of the canvas; encode the prompt.
3. Denoise at full size: tokens outside of the part stay as they are. Guided, unless the model was distilled.
4. Decode and write. Frames and sound of the source itself stand outside of the part, with a short blend at the seams:
   within the part for a retake, within the source's outermost frames for an extension.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_ltx.errors import UserError
from mlx_ltx.events import Event, Finished, Phase
from mlx_ltx.media.audio import fit_length, read_sound
from mlx_ltx.media.sound import SourceSound
from mlx_ltx.pipelines import pipeline as fields
from mlx_ltx.pipelines.job import Job, Model
from mlx_ltx.pipelines.output import Made, output_phases, write_outputs
from mlx_ltx.pipelines.run import Run
from mlx_ltx.pipelines.sources import (
    SourceClip,
    check_even_size,
    encode_frames,
    encode_sound,
    open_source,
    sound_phase,
    video_phase,
)
from mlx_ltx.pipelines.stage import (
    Given,
    bring_in_transformer,
    denoise_phases,
    denoise_stage,
    full_schedule,
    load_phase,
)
from mlx_ltx.pipelines.text import encode_prompts, text_phases
from mlx_ltx.request import Request
from mlx_ltx.sampling.conditioning import TemporalRegion
from mlx_ltx.sampling.geometry import ClipShape
from mlx_ltx.sampling.state import Latents

DENOISE = "denoise"
BLEND_FRAMES = 4
BLEND_SECONDS = 0.02


@dataclass(frozen=True)
class Edit:
    """What is made of a source clip.

    Attributes:
        source: the clip, placed on its canvas.
        clip: the finished clip's shape.
        canvas: the same on the model's grid, at least as large.
        region: what is made, in seconds of the canvas.
        weights: for each frame of the finished clip how much of it is made, 0 to 1.
    """

    source: SourceClip
    clip: ClipShape
    canvas: ClipShape
    region: TemporalRegion
    weights: np.ndarray

    @property
    def sounds(self) -> bool:
        return self.source.info.audio_rate is not None


def plan_edit(request: Request, model: Model) -> Edit:
    """Read the source and decide what lies where.

    Raises:
        UserError: the source cannot be used, or the part lies outside of it.
    """
    assert request.video_path is not None
    source = open_source(request.video_path)
    fps = source.fps
    if request.extend_before is None and request.extend_after is None:
        total, weights, region = _retake(request, source)
    else:
        source = replace(source, before=math.ceil((request.extend_before or 0) * fps))
        total, weights, region = _extension(request, source)
    space, time = model.video_vae.space_scale, model.video_vae.time_scale
    clip = ClipShape(total, source.info.height, source.info.width, fps)
    canvas = ClipShape(
        math.ceil((total - 1) / time) * time + 1,
        math.ceil(clip.height / space) * space,
        math.ceil(clip.width / space) * space,
        fps,
    )
    check_even_size(source.path, clip)
    return Edit(source, clip, canvas, region, weights)


def _retake(request: Request, source: SourceClip) -> tuple[int, np.ndarray, TemporalRegion]:
    duration = source.frames / source.fps
    start, end = request.start_time or 0.0, request.end_time if request.end_time is not None else duration
    if start >= duration:
        raise UserError(f"--start-time {start:g}: {source.path} ends at {duration:.2f} s")
    if end > duration + 0.5 / source.fps:
        raise UserError(f"--end-time {end:g}: {source.path} ends at {duration:.2f} s")
    times = (np.arange(source.frames) + 0.5) / source.fps
    inside = ((times > start) & (times < end)).astype(np.float32)
    if not inside.any():
        raise UserError(f"--start-time {start:g} --end-time {end:g}: there is no frame between them")
    weights = inside if request.whole_decode else _ramped(inside, BLEND_FRAMES)
    return source.frames, weights, TemporalRegion(start, end)


def _extension(request: Request, source: SourceClip) -> tuple[int, np.ndarray, TemporalRegion]:
    after = math.ceil((request.extend_after or 0) * source.fps)
    total = source.before + source.frames + after
    made = np.ones(total, np.float32)
    made[source.before : source.before + source.frames] = 0
    # The blend takes from the source's outermost frames: there is nothing of it to blend with beyond them.
    weights = 1 - _ramped(1 - made, BLEND_FRAMES) if not request.whole_decode else made
    begin = source.before / source.fps
    return total, weights, TemporalRegion(begin, begin + source.frames / source.fps, outside=True)


def _ramped(inside: np.ndarray, length: int) -> np.ndarray:
    """Ones that rise from zeros over ``length`` values and fall again; the ends of the array are no seams."""
    distance = np.full(len(inside), np.inf)
    outside = np.flatnonzero(inside == 0)
    if len(outside):
        places = np.arange(len(inside))
        distance = np.abs(places[:, None] - outside[None]).min(axis=1)
    return np.clip(distance / (length + 1), 0, 1).astype(np.float32)


def blended_frames(edit: Edit, decoded: Iterator[np.ndarray], whole: bool) -> Iterator[np.ndarray]:
    """The finished clip's frames: the source's where nothing was made, the decoder's elsewhere.

    Args:
        decoded: frames of the canvas; not asked for where none are needed.
        whole: take all frames from the decoder.
    """
    height, width = edit.clip.height, edit.clip.width
    made = (frame[:height, :width] for chunk in decoded for frame in chunk)
    for weight, original in zip(edit.weights, edit.source.canvas(edit.clip.frames), strict=False):
        new = next(made, None)
        if new is None or (weight == 0 and not whole):
            yield original[None]
        elif weight == 1 or whole:
            yield np.ascontiguousarray(new)[None]
        else:
            mixed = original + weight * (new.astype(np.float32) - original)
            yield np.rint(mixed).astype(np.uint8)[None]


def blended_sound(edit: Edit, waveform: np.ndarray, rate: int) -> np.ndarray:
    """The finished clip's sound: the source's outside of the part, with a short crossfade."""
    path, info = edit.source.path, edit.source.info
    before = edit.source.before / edit.source.fps
    original = read_sound(path, rate, 0.0, edit.source.frames / edit.source.fps)
    original = np.pad(original, ((round(before * rate), 0), (0, 0)))
    original = fit_length(original, len(waveform))
    times = np.arange(len(waveform)) / rate
    region = edit.region
    inside = (times >= region.start) & (times < region.end)
    made = (~inside if region.outside else inside).astype(np.float32)
    assert info.audio_rate is not None
    fade = max(round(BLEND_SECONDS * rate), 1)
    smooth = np.convolve(np.pad(made, (fade // 2, fade - 1 - fade // 2), mode="edge"), np.ones(fade) / fade, "valid")
    return (original + smooth[:, None].astype(np.float32) * (waveform - original)).astype(np.float32)


def clip(request: Request, model: Model) -> ClipShape:
    return plan_edit(request, model).clip


def phases(job: Job) -> list[Phase]:
    edit = plan_edit(job.request, job.model)
    return [
        *text_phases(job),
        video_phase(job, "Encoding the clip", edit.canvas.frames),
        *([sound_phase(job)] if job.sound else []),
        load_phase(job),
        *denoise_phases(job, DENOISE, "Denoising", edit.canvas, len(full_schedule(job)) - 1),
        *output_phases(job, decodes_sound=_makes_sound(job)),
    ]


def _makes_picture(job: Job) -> bool:
    return job.request.regenerate in (None, "both", "video")


def _makes_sound(job: Job) -> bool:
    return job.sound and job.request.regenerate in (None, "both", "audio")


def run(job: Job) -> Generator[Event, None, Finished]:
    run, request = Run(job), job.request
    yield from run.begin()
    edit = plan_edit(request, job.model)
    texts = yield from encode_prompts(run)
    frames = edit.source.canvas(edit.canvas.frames)
    picture = yield from encode_frames(run, frames, edit.canvas, edit.canvas.frames)
    sound: mx.array | None = None
    if job.sound:
        grid = job.grids(edit.canvas).audio
        before = edit.source.before / edit.source.fps
        sound = yield from encode_sound(run, edit.source.path, grid, before=before)

    model = yield from bring_in_transformer(run)
    made = []
    for shot in run.shots:
        latents = yield from denoise_stage(
            run, shot, DENOISE, model, edit.canvas, full_schedule(job), texts,
            video=_given(picture, edit, _makes_picture(job)),
            audio=_given(sound, edit, _makes_sound(job)),
            guidance=job.guidance,
        )  # fmt: skip
        keeps_sound = edit.sounds and not _makes_sound(job)
        made.append(
            Made(
                Latents(
                    latents.video if _makes_picture(job) or request.whole_decode else None,
                    latents.audio if _makes_sound(job) else None,
                ),
                SourceSound(edit.source.path, lossless=True) if keeps_sound else None,
                lambda decoded: blended_frames(edit, decoded, request.whole_decode),
                lambda waveform: blended_sound(edit, waveform, job.model.vocoder.sample_rate),
            )
        )
    del model
    return (yield from write_outputs(run, made))


def _given(latent: mx.array | None, edit: Edit, makes: bool) -> Given:
    return Given(latent, 1.0 if makes else 0.0, [edit.region] if makes else [], frozen=not makes)


def check_extension(job: Job) -> None:
    if job.request.extend_before is None and job.request.extend_after is None:
        raise UserError("the extend pipeline needs --extend-before or --extend-after, in seconds")


def check_retake(job: Job) -> None:
    if job.request.start_time is None and job.request.end_time is None:
        raise UserError("the retake pipeline needs --start-time or --end-time, in seconds")
    if job.request.regenerate == "audio" and not job.sound:
        raise UserError(f"--regenerate audio: {job.request.video_path} has no sound")


TAKES = fields.PROMPT | fields.LORAS | fields.GUIDANCE | {"guided", "video_path", "whole_decode"}


def has_sound(request: Request) -> bool:
    """A silent source stays silent."""
    assert request.video_path is not None
    return open_source(request.video_path).info.audio_rate is not None


RETAKE = fields.Pipeline(
    name="retake",
    title="make a part of a clip anew: its picture, its sound, or both",
    takes=TAKES | {"start_time", "end_time", "regenerate"},
    needs=("video_path",),
    has_sound=has_sound,
    clip=clip,
    check=check_retake,
    phases=phases,
    run=run,
)

EXTEND = fields.Pipeline(
    name="extend",
    title="lengthen a clip at its beginning or its end",
    takes=TAKES | {"extend_before", "extend_after"},
    needs=("video_path",),
    has_sound=has_sound,
    clip=clip,
    check=check_extension,
    phases=phases,
    run=run,
)
