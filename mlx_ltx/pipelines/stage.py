"""Parts of every recipe: bring the transformer in, and denoise a stage with it."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import mlx.core as mx

from mlx_ltx.checkpoints.components import load_statistics, load_transformer, load_upsampler
from mlx_ltx.checkpoints.files import SafetensorsFile
from mlx_ltx.events import Event, Phase, Progress
from mlx_ltx.models.transformer import Transformer
from mlx_ltx.models.upsampler import upsample_latent
from mlx_ltx.pipelines.job import Job
from mlx_ltx.pipelines.run import Run
from mlx_ltx.sampling.denoise import Denoiser, TextContext, denoise
from mlx_ltx.sampling.geometry import ClipShape
from mlx_ltx.sampling.guidance import Guidance
from mlx_ltx.sampling.state import Conditioning, Latents, States, add_noise, audio_state, video_state

LOAD, UPSAMPLE = "load-transformer", "upsample"


def load_phase(job: Job) -> Phase:
    return Phase(LOAD, f"Loading the transformer of {job.files.name}", job.transformer.layers, "blocks")


def denoise_phase(name: str, title: str, clip: ClipShape, steps: int) -> Phase:
    return Phase(name, f"{title} {clip.width}x{clip.height}, {clip.frames} frames", steps, "steps")


def upsample_phase() -> Phase:
    return Phase(UPSAMPLE, "Enlarging the latent x2", 1, "latents")


def bring_in_transformer(run: Run) -> Generator[Event, None, Transformer]:
    """Load the transformer block by block; a silent clip leaves out the audio stream."""
    return (yield from run.phase(LOAD, _load(run.job)))


def _load(job: Job) -> Generator[Event, None, Transformer]:
    model = load_transformer(job.checkpoint, job.dtype, audio=job.request.audio)
    for index, block in enumerate(model.blocks):
        mx.eval(block.parameters())
        yield Progress(LOAD, index + 1, len(model.blocks))
    mx.eval(model.parameters())
    return model


def denoise_stage(
    run: Run,
    phase: str,
    model: Transformer,
    clip: ClipShape,
    sigmas: Sequence[float],
    text: TextContext,
    *,
    conditionings: Sequence[Conditioning] = (),
    initial: Latents | None = None,
    guidance: Guidance = Guidance(),  # noqa: B008 (frozen)
    negative: TextContext | None = None,
) -> Generator[Event, None, Latents]:
    """Noise and denoise both modalities at one size.

    Args:
        clip: the stage's size.
        sigmas: its schedule; with ``initial`` the first sigma says how much noise is mixed in.
        initial: latents to refine; None starts from noise alone.

    Returns:
        The clean latents, (B, F, H, W, C) and (B, T, M, C).
    """
    grids = run.job.grids(clip)
    scale = 1.0 if initial is None else float(sigmas[0])
    assert grids.video is not None
    video = add_noise(video_state(grids.video, conditionings, initial.video if initial else None), run.noise, scale)
    audio = None
    if grids.audio is not None:
        audio = add_noise(audio_state(grids.audio, initial=initial.audio if initial else None), run.noise, scale)
    states = States(video, audio)
    denoiser = Denoiser(model, states, text, guidance, negative)
    final = yield from run.phase(phase, denoise(denoiser, states, sigmas, grids, phase))
    return grids.unpatchify(
        Latents(*(state.latent if state is not None else None for state in (final.video, final.audio)))
    )


def enlarge(run: Run, latent: mx.array) -> Generator[Event, None, mx.array]:
    """The video latent at twice the height and width."""
    return (yield from run.phase(UPSAMPLE, _enlarge(run.job, latent)))


def _enlarge(job: Job, latent: mx.array) -> Generator[Event, None, mx.array]:
    assert job.files.spatial_upsampler is not None
    upsampler = load_upsampler(SafetensorsFile(job.files.spatial_upsampler), job.dtype)
    statistics = load_statistics(job.checkpoint, job.video_vae.latent_channels)
    enlarged = upsample_latent(upsampler, latent, statistics)
    mx.eval(enlarged)
    yield Progress(UPSAMPLE, 1, 1)
    return enlarged
