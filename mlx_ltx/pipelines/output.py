"""Part of every recipe: latents to sound, frames and files."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_ltx.checkpoints.components import load_audio_decoder, load_video_decoder, load_vocoder
from mlx_ltx.events import Event, FileWritten, Finished, Phase, Progress
from mlx_ltx.media.audio import write_audio
from mlx_ltx.media.contact_sheet import ContactSheet, save_sheets
from mlx_ltx.media.video import VideoWriter
from mlx_ltx.models.audio_vae import AudioDecoder
from mlx_ltx.models.video_vae import VideoDecoder
from mlx_ltx.pipelines.job import Job
from mlx_ltx.pipelines.run import Run, Shot, per_shot
from mlx_ltx.sampling.noise import Noise
from mlx_ltx.sampling.state import Latents

SOUND, PICTURE = "decode-audio", "decode-video"


def output_phases(job: Job) -> list[Phase]:
    phases = []
    if job.sound:
        phases.append(Phase(SOUND, "Decoding the sound", 2, "networks"))
    if _needs_picture(job):
        phases.append(Phase(PICTURE, "Decoding and encoding the picture", job.clip.frames, "frames"))
    return per_shot(job, phases)


def write_outputs(run: Run, made: Sequence[Latents]) -> Generator[Event, None, Finished]:
    """Decode and write everything that was asked for; the last part of a recipe."""
    job = run.job
    writer = _Writer(job)
    for shot, latents in zip(run.shots, made, strict=True):
        waveform = None
        if latents.audio is not None:
            waveform = yield from run.phase(SOUND, writer.decode_audio(latents.audio))
        if _needs_picture(job):
            assert latents.video is not None
            yield from run.phase(PICTURE, writer.write_picture(shot, latents.video, waveform))
        if shot.request.output_audio is not None and waveform is not None:
            write_audio(shot.request.output_audio, waveform, job.model.vocoder.sample_rate, job.request.force)
            yield FileWritten(shot.request.output_audio, "audio")
    if job.request.contact_sheet is not None:
        save_sheets(writer.sheets, job.request.contact_sheet, job.request.force)
        yield FileWritten(job.request.contact_sheet, "contact sheet")
    return run.finish()


def fit_length(waveform: np.ndarray, samples: int) -> np.ndarray:
    """Cut, or fill with silence at the end."""
    missing = max(samples - len(waveform), 0)
    return np.pad(waveform[:samples], ((0, missing), (0, 0)))


def decode_frames(decoder: VideoDecoder, latent: mx.array, noise: Noise, dtype: mx.Dtype) -> Iterator[np.ndarray]:
    """Latent (1, F, H, W, C) to uint8 RGB frames (n, H, W, 3), in order, as soon as they are ready."""
    for frames in decoder.stream(latent.astype(dtype), noise=noise):
        pixels = mx.clip((frames[0].astype(mx.float32) + 1) * 127.5, 0, 255)
        yield np.array(mx.round(pixels).astype(mx.uint8))


def _needs_picture(job: Job) -> bool:
    return job.pipeline.makes_picture and (job.request.output is not None or job.request.contact_sheet is not None)


class _Writer:
    """The decoders, each loaded when it is first needed and kept for the clips that follow."""

    def __init__(self, job: Job):
        self.job = job
        self.sheets: list[ContactSheet] = []
        self._sound: tuple[AudioDecoder, nn.Module] | None = None
        self._picture: VideoDecoder | None = None

    def decode_audio(self, latent: mx.array) -> Generator[Event, None, np.ndarray]:
        """Latent (1, T, M, C) to float32 (samples, 2) in [-1, 1], as long as the picture."""
        job = self.job
        if self._sound is None:
            self._sound = (
                load_audio_decoder(job.model.checkpoint, job.dtype),
                load_vocoder(job.model.checkpoint)[0],
            )
        decoder, vocoder = self._sound
        mel = decoder(latent.astype(job.dtype))
        mx.eval(mel)
        yield Progress(SOUND, 1, 2)
        waveform = np.array(vocoder(mel.astype(mx.float32))[0])
        yield Progress(SOUND, 2, 2)
        return fit_length(waveform, round(job.clip.duration * job.model.vocoder.sample_rate))

    def write_picture(self, shot: Shot, latent: mx.array, waveform: np.ndarray | None) -> Generator[Event, None, None]:
        """Decode the picture frame by frame into the file and the contact sheet."""
        job, request, clip = self.job, shot.request, self.job.clip
        rate = job.model.vocoder.sample_rate
        sheet = self._new_sheet(shot, waveform, rate)
        if self._picture is None:
            self._picture = load_video_decoder(job.model.checkpoint, job.dtype)
        decoder = self._picture

        def frames() -> Iterator[tuple[np.ndarray, Event]]:
            done = 0
            for chunk in decode_frames(decoder, latent, shot.noise, job.dtype):
                if sheet is not None:
                    sheet.add(chunk)
                done += len(chunk)
                yield chunk, Progress(PICTURE, done, clip.frames)

        if request.output is None:
            for _, progress in frames():
                yield progress
            return
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

    def _new_sheet(self, shot: Shot, waveform: np.ndarray | None, rate: int) -> ContactSheet | None:
        job = self.job
        if job.request.contact_sheet is None:
            return None
        several = len(job.shots) > 1
        title = f"seed {shot.request.seed}: {shot.request.prompt}" if several else None
        sheet = ContactSheet(job.clip.frames, job.clip.fps, 6 if several else 12, title, waveform, rate)
        self.sheets.append(sheet)
        return sheet
