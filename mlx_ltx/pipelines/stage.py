"""Parts of every recipe: bring the transformer in, and denoise a stage with it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from mlx_ltx.checkpoints.components import load_statistics, load_transformer, load_upsampler
from mlx_ltx.checkpoints.files import SafetensorsFile
from mlx_ltx.checkpoints.lora import Lora
from mlx_ltx.checkpoints.lora_switch import LoraSwitch
from mlx_ltx.checkpoints.stream import BlockStream, evaluate_ends
from mlx_ltx.events import Event, Phase, Progress
from mlx_ltx.models.transformer import Transformer
from mlx_ltx.models.upsampler import upsample_latent
from mlx_ltx.pipelines.job import Job
from mlx_ltx.pipelines.run import Run, Shot, per_shot
from mlx_ltx.pipelines.text import Texts
from mlx_ltx.sampling.denoise import Denoiser, denoise
from mlx_ltx.sampling.evaluation import EvaluationPolicy
from mlx_ltx.sampling.geometry import ClipShape
from mlx_ltx.sampling.guidance import UNGUIDED, Guidance
from mlx_ltx.sampling.samplers import Sampler
from mlx_ltx.sampling.schedules import DISTILLED, ltx2_schedule
from mlx_ltx.sampling.state import Latents, LatentState, States, add_noise, audio_state, video_state
from mlx_ltx.sampling.step_cache import StepCache
from mlx_ltx.sampling.token_tiles import token_tiles

LOAD, CHANGE, UPSAMPLE = "load-transformer", "change-loras", "upsample"
POLICY = EvaluationPolicy()


@dataclass(frozen=True)
class Given:
    """What one modality of a stage starts from.

    Attributes:
        initial: its latent to change, (1, F, H, W, C) or (1, T, M, C); None starts from nothing.
        noise: how much noise is mixed in, 0 to 1.
        conditionings: given content, for this modality (:mod:`mlx_ltx.sampling.conditioning`).
        frozen: it stays as it is.
    """

    initial: mx.array | None = None
    noise: float = 1.0
    conditionings: Sequence[Any] = ()
    frozen: bool = False


NOTHING = Given()


def full_schedule(job: Job) -> Sequence[float]:
    """From noise to clean: the distilled sigmas, or the LTX-2 schedule for guided denoising."""
    if job.guidance is None:
        return DISTILLED
    assert job.request.steps is not None
    return ltx2_schedule(job.request.steps).tolist()


def streams_weights(job: Job) -> bool:
    """Whether the transformer's blocks are read from disk while it runs."""
    return job.request.weights == "streamed"


def load_phase(job: Job) -> Phase:
    layers = job.model.transformer.layers
    if streams_weights(job):
        return Phase(LOAD, f"Opening the transformer of {job.model.files.name}, streamed from disk", 1, "parts")
    return Phase(LOAD, f"Loading the transformer of {job.model.files.name}", layers, "blocks")


def change_phases(job: Job) -> list[Phase]:
    if not job.loras.change:
        return []
    total, unit = (1, "parts") if streams_weights(job) else (job.model.transformer.layers, "blocks")
    return [Phase(CHANGE, "Changing LoRAs for the second stage", total, unit)]


def denoise_phases(job: Job, name: str, title: str, clip: ClipShape, steps: int) -> list[Phase]:
    size = f"{clip.width}x{clip.height}, {clip.frames} frames" if job.pipeline.makes_picture else "the sound"
    return per_shot(job, [Phase(name, f"{title} {size}", steps, "steps")])


def upsample_phase(job: Job) -> Phase:
    return Phase(UPSAMPLE, "Enlarging the latent x2", len(job.shots), "latents")


def bring_in_transformer(run: Run) -> Generator[Event, None, LoraSwitch]:
    """Load the transformer block by block, with the LoRAs of the first stage; a stream that is not made is left out.

    With streamed weights only what is around the blocks is loaded; the blocks follow in every step.
    """
    return (yield from run.phase(LOAD, _load(run.job)))


def _load(job: Job) -> Generator[Event, None, LoraSwitch]:
    switch = LoraSwitch(_lazy_transformer(job), job.model.checkpoint)
    yield from _use(job, switch, job.loras.first, LOAD)
    return switch


def _lazy_transformer(job: Job) -> Transformer:
    picture, kind = job.pipeline.makes_picture, job.quantization
    return load_transformer(job.model.checkpoint, job.dtype, video=picture, audio=job.sound, quantization=kind)


def change_loras(run: Run, switch: LoraSwitch) -> Generator[Event, None, None]:
    """Go over to the LoRAs of the second stage, if they are others."""
    if run.job.loras.change:
        yield from run.phase(CHANGE, _use(run.job, switch, run.job.loras.second, CHANGE))


def _use(job: Job, switch: LoraSwitch, loras: Sequence[Lora], phase: str) -> Generator[Event, None, None]:
    """Put LoRAs on the transformer, then read and compute its weights block by block; of streamed ones, what is around
    the blocks."""
    switch.use(loras)
    if streams_weights(job):

        def load() -> Transformer:
            model = _lazy_transformer(job)
            LoraSwitch(model, job.model.checkpoint).use(loras)
            return model

        switch.model.take_blocks_from(BlockStream(load, POLICY.ahead))
        evaluate_ends(switch.model)
        yield Progress(phase, 1, 1)
        return
    blocks = switch.model.blocks
    for index, block in enumerate(blocks):
        mx.eval(block.parameters())
        yield Progress(phase, index + 1, len(blocks))
    evaluate_ends(switch.model)


def denoise_stage(
    run: Run,
    shot: Shot,
    phase: str,
    switch: LoraSwitch,
    clip: ClipShape,
    sigmas: Sequence[float],
    texts: Texts,
    *,
    video: Given = NOTHING,
    audio: Given = NOTHING,
    guidance: Guidance | None = None,
    guides_sound: bool = True,
    sampler: Sampler | None = None,
    tiles: tuple[int, int] | None = None,
) -> Generator[Event, None, Latents]:
    """Noise and denoise both modalities of a clip at one size.

    Args:
        clip: the stage's size.
        sigmas: its schedule.
        video, audio: what they start from.
        guidance: None makes one pass per step.
        guides_sound: whether guidance is for the sound as well; otherwise it keeps to the positive text.
        sampler: Euler if None.
        tiles: rows and columns in which the picture is predicted; None predicts it whole.

    Returns:
        The clean latents, (1, F, H, W, C) and (1, T, M, C); None for a modality that is not made.
    """
    grids = run.job.grids(clip)
    states = States(
        video_state(grids.video, video.conditionings, video.initial) if grids.video else None,
        audio_state(grids.audio, audio.conditionings, audio.initial) if grids.audio else None,
    )
    noised = States(*(_noised(state, given, shot) for state, given in zip(states, (video, audio), strict=True)))
    positive = texts.positive(shot)
    negative = texts.negative if guidance is not None else None
    if guidance is not None and not guides_sound:
        guidance = replace(guidance, audio=UNGUIDED)
        negative = None if negative is None else negative._replace(audio=positive.audio)
    split = None
    if tiles is not None and noised.video is not None and grids.video is not None:
        split = token_tiles(noised.video, grids.video, *tiles)
    steps, threshold = len(sigmas) - 1, run.job.request.step_cache
    cache = StepCache(threshold, steps) if threshold else None
    denoiser = Denoiser(switch.model, noised, positive, guidance or Guidance(), negative, tiles=split, cache=cache)
    final = yield from run.phase(phase, denoise(denoiser, noised, sigmas, grids, phase, sampler, cache))
    if cache is not None:
        run.steps, run.reused_steps = run.steps + steps, run.reused_steps + cache.reused
    return grids.unpatchify(Latents(*(None if state is None else state.latent for state in final)))


def _noised(state: LatentState | None, given: Given, shot: Shot) -> LatentState | None:
    """With noise mixed in; the random numbers are drawn even where none of them is used, as in the reference."""
    if state is None:
        return None
    return add_noise(state.freeze() if given.frozen else state, shot.noise, given.noise)


def enlarge(run: Run, latents: Sequence[mx.array]) -> Generator[Event, None, list[mx.array]]:
    """Video latents at twice the height and width."""
    return (yield from run.phase(UPSAMPLE, _enlarge(run.job, latents)))


def _enlarge(job: Job, latents: Sequence[mx.array]) -> Generator[Event, None, list[mx.array]]:
    assert job.model.files.spatial_upsampler is not None
    upsampler = load_upsampler(SafetensorsFile(job.model.files.spatial_upsampler), job.dtype)
    statistics = load_statistics(job.model.checkpoint, job.model.video_vae.latent_channels)
    enlarged = []
    for index, latent in enumerate(latents):
        enlarged.append(upsample_latent(upsampler, latent, statistics))
        mx.eval(enlarged[-1])
        yield Progress(UPSAMPLE, index + 1, len(latents))
    return enlarged
