"""Part of every recipe: latents to sound, frames and files."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import mlx.core as mx
import numpy as np

from mlx_ltx.checkpoints.components import load_audio_decoder, load_video_decoder, load_vocoder
from mlx_ltx.events import Event, FileWritten, Finished, Phase, Progress
from mlx_ltx.media.audio import write_audio
from mlx_ltx.media.contact_sheet import ContactSheet
from mlx_ltx.media.video import VideoWriter
from mlx_ltx.pipelines.job import Job
from mlx_ltx.pipelines.run import Run
from mlx_ltx.sampling.denoise import Latents
from mlx_ltx.sampling.noise import Noise

SOUND, PICTURE = "decode-audio", "decode-video"


def output_phases(job: Job) -> list[Phase]:
    phases = []
    if job.request.audio:
        phases.append(Phase(SOUND, "Decoding the sound", 2, "networks"))
    if _needs_picture(job):
        phases.append(Phase(PICTURE, "Decoding and encoding the picture", job.clip.frames, "frames"))
    return phases


def write_outputs(run: Run, latents: Latents) -> Generator[Event, None, Finished]:
    """Decode and write everything that was asked for; the last part of a recipe."""
    job = run.job
    waveform = None
    if latents.audio is not None:
        waveform = yield from run.phase(SOUND, decode_audio(job, latents.audio))
    if _needs_picture(job):
        assert latents.video is not None
        yield from run.phase(PICTURE, _write_picture(job, latents.video, waveform, run.noise))
    if job.request.output_audio is not None and waveform is not None:
        write_audio(job.request.output_audio, waveform, job.vocoder.sample_rate, job.request.force)
        yield FileWritten(job.request.output_audio, "audio")
    return run.finish()


def decode_audio(job: Job, latent: mx.array) -> Generator[Event, None, np.ndarray]:
    """Latent (1, T, M, C) to float32 (samples, 2) in [-1, 1], as long as the picture."""
    mel = load_audio_decoder(job.checkpoint, job.dtype)(latent.astype(job.dtype))
    mx.eval(mel)
    yield Progress(SOUND, 1, 2)
    vocoder, config = load_vocoder(job.checkpoint)
    waveform = np.array(vocoder(mel.astype(mx.float32))[0])
    yield Progress(SOUND, 2, 2)
    return fit_length(waveform, round(job.clip.duration * config.sample_rate))


def fit_length(waveform: np.ndarray, samples: int) -> np.ndarray:
    """Cut, or fill with silence at the end."""
    missing = max(samples - len(waveform), 0)
    return np.pad(waveform[:samples], ((0, missing), (0, 0)))


def decode_frames(job: Job, latent: mx.array, noise: Noise) -> Iterator[np.ndarray]:
    """Latent (1, F, H, W, C) to uint8 RGB frames (n, H, W, 3), in order, as soon as they are ready."""
    decoder = load_video_decoder(job.checkpoint, job.dtype)
    for frames in decoder.stream(latent.astype(job.dtype), noise=noise):
        pixels = mx.clip((frames[0].astype(mx.float32) + 1) * 127.5, 0, 255)
        yield np.array(mx.round(pixels).astype(mx.uint8))


def _needs_picture(job: Job) -> bool:
    return job.request.output is not None or job.request.contact_sheet is not None


def _write_picture(
    job: Job, latent: mx.array, waveform: np.ndarray | None, noise: Noise
) -> Generator[Event, None, None]:
    request, clip, rate = job.request, job.clip, job.vocoder.sample_rate
    sheet = ContactSheet(clip.frames, clip.fps) if request.contact_sheet is not None else None

    def frames() -> Iterator[tuple[np.ndarray, Event]]:
        done = 0
        for chunk in decode_frames(job, latent, noise):
            if sheet is not None:
                sheet.add(chunk)
            done += len(chunk)
            yield chunk, Progress(PICTURE, done, clip.frames)

    if request.output is None:
        for _, progress in frames():
            yield progress
    else:
        sound_rate = None if waveform is None else rate
        with VideoWriter(
            request.output, clip.width, clip.height, clip.fps, sound_rate, request.settings(), force=request.force
        ) as writer:
            if waveform is not None:
                writer.write_audio(waveform)
            for chunk, progress in frames():
                writer.write_frames(chunk)
                yield progress
        yield FileWritten(request.output, "video")
    if sheet is not None and request.contact_sheet is not None:
        sheet.save(request.contact_sheet, waveform=waveform, rate=rate, force=request.force)
        yield FileWritten(request.contact_sheet, "contact sheet")
