"""A picture for a given sound (ltx_pipelines/a2vid_two_stage.py).

1. Encode the prompts, the given images at both sizes, and the sound.
2. Denoise the picture at half the size beside the sound, which stays as it is; guided, unless the model was distilled.
3. Enlarge the video latent x2 and refine it in 3 steps, again beside the sound.
4. Decode the picture; the file's own sound goes with it, unchanged.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

from mlx_ltx.errors import UserError
from mlx_ltx.events import Event, Phase, Warned
from mlx_ltx.media.audio import read_audio
from mlx_ltx.media.sound import SourceSound
from mlx_ltx.pipelines import pipeline as fields
from mlx_ltx.pipelines.images import image_phases
from mlx_ltx.pipelines.job import Job, Model, clip_shape
from mlx_ltx.pipelines.run import Run
from mlx_ltx.pipelines.sources import encode_sound, sound_phase
from mlx_ltx.pipelines.stage import Given
from mlx_ltx.pipelines.two_stage import TAKES
from mlx_ltx.pipelines.two_stages import Material, TwoStages, encode_given_images
from mlx_ltx.request import Request
from mlx_ltx.sampling.geometry import ClipShape


def encode_phases(job: Job) -> list[Phase]:
    return [*image_phases(job, stages=2), sound_phase(job)]


def encode(run: Run) -> Generator[Event, None, Material]:
    request, clip = run.job.request, run.job.clip
    images = yield from encode_given_images(run)
    grid = run.job.grids(clip).audio
    assert request.audio_path is not None
    start = request.audio_start or 0.0
    duration = clip.duration
    if heard(request, duration) < duration - 0.05:
        yield Warned(f"the sound is shorter than the clip ({clip.duration:.2f} s); silence follows it")
    latent = yield from encode_sound(run, request.audio_path, grid, start, duration)
    still = Given(latent, 0.0, frozen=True)
    return Material(
        images.first, images.second, still, lambda draft: still, SourceSound(request.audio_path, start, lossless=True)
    )


def heard(request: Request, limit: float) -> float:
    """Seconds of sound that there are, up to a limit; raises UserError if the file has none."""
    assert request.audio_path is not None
    waveform, rate = read_audio(request.audio_path, request.audio_start or 0.0, limit)
    return len(waveform) / rate


def clip(request: Request, model: Model) -> ClipShape:
    """As asked for; otherwise as long as the sound, up to the usual length."""
    asked = clip_shape(request, model, PIPELINE)
    limit = request.audio_length or asked.duration
    if request.num_frames is None and request.duration is None:
        scale = model.video_vae.time_scale
        steps = int((heard(request, min(limit, asked.duration)) * request.fps - 1) // scale)
        return replace(asked, frames=min(max(steps, 0) * scale + 1, asked.frames))
    if limit < asked.duration:
        raise UserError(
            f"--audio-max-duration {limit:g}: is shorter than the clip, which lasts {asked.duration:.2f} s; "
            "leave out --num-frames or --duration"
        )
    heard(request, asked.duration)
    return asked


RECIPE = TwoStages(encode=encode, encode_phases=encode_phases, makes_sound=False)

PIPELINE = fields.Pipeline(
    name="a2v",
    title="a picture for a given sound",
    takes=(TAKES - {"audio"} - fields.AUDIO_GUIDANCE) | {"audio_path", "audio_start", "audio_length", "guided"},
    needs=("audio_path",),
    two_stage=True,
    distilled_lora=(0.0, 1.0),
    clip=clip,
    phases=RECIPE.phases,
    run=RECIPE.run,
)
