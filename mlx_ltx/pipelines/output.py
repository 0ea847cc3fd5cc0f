"""Part of every recipe: latents to sound, frames and files."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_ltx.checkpoints.components import load_audio_decoder, load_video_decoder, load_vocoder
from mlx_ltx.events import Event, FileWritten, Finished, Phase, Progress
from mlx_ltx.media.audio import fit_length, read_audio, write_audio
from mlx_ltx.media.color import LogCurve
from mlx_ltx.media.contact_sheet import ContactSheet, save_sheets
from mlx_ltx.media.hdr import HdrSpace, master_light, working_codes
from mlx_ltx.media.sound import SourceSound
from mlx_ltx.media.video import VideoWriter
from mlx_ltx.models.audio_vae import AudioDecoder
from mlx_ltx.models.video_vae import VideoDecoder
from mlx_ltx.pipelines.decode import decode_frames
from mlx_ltx.pipelines.job import Job
from mlx_ltx.pipelines.run import Run, Shot, per_shot
from mlx_ltx.sampling.state import Latents

SOUND, PICTURE = "decode-audio", "decode-video"
SDR_KNEE = 0.8  # light below it is shown as it is; what is brighter is rolled off


@dataclass(frozen=True)
class Made:
    """What a recipe made of one shot, not decoded yet.

    Attributes:
        latents: of the modalities that are to be decoded.
        sound: a file's sound that takes the place of decoded sound.
        compose_frames: from decoded frames, uint8 (n, H, W, 3), to the clip's; None takes them as they are.
        compose_sound: the same for the waveform, (samples, 2).
    """

    latents: Latents
    sound: SourceSound | None = None
    compose_frames: Callable[[Iterator[np.ndarray]], Iterator[np.ndarray]] | None = None
    compose_sound: Callable[[np.ndarray], np.ndarray] | None = None


def output_phases(job: Job, decodes_sound: bool = True) -> list[Phase]:
    phases = []
    if job.sound and decodes_sound:
        phases.append(Phase(SOUND, "Decoding the sound", 2, "networks"))
    if _needs_picture(job):
        title = "Decoding and encoding the picture" + (f" in {job.bands} bands" if job.bands > 1 else "")
        unit = "frames" if job.bands == 1 else "parts of frames"
        phases.append(Phase(PICTURE, title, job.bands * job.clip.frames, unit))
    return per_shot(job, phases)


def write_outputs(run: Run, made: Sequence[Made]) -> Generator[Event, None, Finished]:
    """Decode and write everything that was asked for; the last part of a recipe."""
    job = run.job
    writer = _Writer(job)
    for shot, each in zip(run.shots, made, strict=True):
        waveform = None
        if each.latents.audio is not None:
            waveform = yield from run.phase(SOUND, writer.decode_audio(each))
        if _needs_picture(job):
            yield from run.phase(PICTURE, writer.write_picture(shot, each, waveform))
        if shot.request.output_audio is not None:
            yield from writer.write_sound(shot, each, waveform)
    if job.request.contact_sheet is not None:
        save_sheets(writer.sheets, job.request.contact_sheet, job.request.force)
        yield FileWritten(job.request.contact_sheet, "contact sheet")
    return run.finish()


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """From [-1, 1] to 0 to 255, rounded."""
    return np.clip(np.rint((frames + 1) * np.float32(127.5)), 0, 255).astype(np.uint8)


def sdr_preview(light: np.ndarray) -> np.ndarray:
    """Linear Rec.709 light, 1 being diffuse white, as uint8 sRGB; highlights are rolled off instead of cut."""
    light = np.maximum(light, 0)
    over = np.maximum(light - SDR_KNEE, 0)
    light = np.minimum(light, SDR_KNEE) + (1 - SDR_KNEE) * (1 - np.exp(-over / (1 - SDR_KNEE)))
    encoded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.power(light, 1 / 2.4) - 0.055)
    return np.clip(np.rint(encoded * 255), 0, 255).astype(np.uint8)


def _needs_picture(job: Job) -> bool:
    request = job.request
    wanted = (request.output, request.contact_sheet, request.output_exr, request.output_hdr)
    return job.pipeline.makes_picture and any(path is not None for path in wanted)


class _Writer:
    """The decoders, each loaded when it is first needed and kept if other clips follow."""

    def __init__(self, job: Job):
        self.job = job
        self.sheets: list[ContactSheet] = []
        self._sound: tuple[AudioDecoder, nn.Module] | None = None
        self._picture: VideoDecoder | None = None

    @property
    def rate(self) -> int:
        return self.job.model.vocoder.sample_rate

    def decode_audio(self, made: Made) -> Generator[Event, None, np.ndarray]:
        """The sound as float32 (samples, 2) in [-1, 1], as long as the picture."""
        job = self.job
        decoder, vocoder = self._sound or (
            load_audio_decoder(job.model.checkpoint, job.dtype),
            load_vocoder(job.model.checkpoint)[0],
        )
        self._sound = (decoder, vocoder) if len(job.shots) > 1 else None
        assert made.latents.audio is not None
        mel = decoder(made.latents.audio.astype(job.dtype))
        mx.eval(mel)
        yield Progress(SOUND, 1, 2)
        waveform = fit_length(np.array(vocoder(mel.astype(mx.float32))[0]), round(job.clip.duration * self.rate))
        yield Progress(SOUND, 2, 2)
        return made.compose_sound(waveform) if made.compose_sound else waveform

    def write_sound(self, shot: Shot, made: Made, waveform: np.ndarray | None) -> Generator[Event, None, None]:
        """The sound as a file of its own."""
        path, heard = shot.request.output_audio, self._heard(made, waveform)
        assert path is not None
        if heard is not None:
            write_audio(path, *heard, self.job.request.force)
            yield FileWritten(path, "audio")

    def _heard(self, made: Made, waveform: np.ndarray | None) -> tuple[np.ndarray, int] | None:
        """The clip's sound and its rate, whether it was decoded or comes from a file; None without."""
        if waveform is not None:
            return waveform, self.rate
        if made.sound is None:
            return None
        duration = self.job.clip.duration
        given, rate = read_audio(made.sound.path, made.sound.start, duration, stereo=True)
        return fit_length(given, round(duration * rate)), rate

    def write_picture(self, shot: Shot, made: Made, waveform: np.ndarray | None) -> Generator[Event, None, None]:
        """Decode the picture once, frame by frame, into every file that shows it."""
        job, request = self.job, shot.request
        sheet = self._new_sheet(shot, made, waveform)
        with ExitStack() as files:
            video = exr = master = None
            if request.output is not None:
                video = files.enter_context(self._video(shot, request.output, made, waveform))
            if request.output_exr is not None:
                exr = files.enter_context(self._space.folder(request.output_exr, request.force))
            if request.output_hdr is not None:
                master = files.enter_context(self._video(shot, request.output_hdr, made, waveform, hlg=True))
            total = job.bands * job.clip.frames
            done = total - job.clip.frames
            for frames in (yield from self._frames(shot, made)):
                if exr is not None:
                    exr.write_frames(self._exr_pixels(frames))
                if master is not None:
                    master.write_frames(master_light(frames, job.curve))
                if video is not None or sheet is not None:
                    shown = sdr_preview(master_light(frames, job.curve)) if self._hdr else frames
                    if video is not None:
                        video.write_frames(shown)
                    if sheet is not None:
                        sheet.add(shown)
                done += len(frames)
                yield Progress(PICTURE, done, total)
        for path, kind in (
            (request.output, "video"),
            (request.output_exr, "EXR frames"),
            (request.output_hdr, "HLG video"),
        ):
            if path is not None:
                yield FileWritten(path, kind)

    def _frames(self, shot: Shot, made: Made) -> Generator[Event, None, Iterator[np.ndarray]]:
        """uint8 frames of an ordinary clip; float32 in [-1, 1] of an HDR one. Bands that wait are decoded already."""
        decoded: Iterator[np.ndarray] = iter(())
        if made.latents.video is not None:
            if self._picture is None:
                # log codes are stretched over many stops of light: they need the precision
                dtype = mx.float32 if self._hdr else self.job.dtype
                self._picture = load_video_decoder(self.job.model.checkpoint, dtype)
            decoded = decode_frames(self._picture, made.latents.video, shot.noise, self.job.request.vae_tiling)
            decoded = yield from self._first_bands(decoded)
        if self._hdr:
            return decoded
        pixels = map(to_uint8, decoded)
        return made.compose_frames(pixels) if made.compose_frames else pixels

    def _first_bands(self, decoded: Iterator[np.ndarray]) -> Generator[Event, None, Iterator[np.ndarray]]:
        """Let the decoder work until its last band, where frames become complete; gives the frames."""
        frames = self.job.clip.frames
        waiting = (self.job.bands - 1) * frames
        for done, first in enumerate(decoded, 1):
            if len(first):
                return itertools.chain([first], decoded)
            yield Progress(PICTURE, min(done, waiting), waiting + frames)
        return decoded

    @property
    def _hdr(self) -> bool:
        return self.job.request.hdr is not None

    @property
    def _space(self) -> HdrSpace:
        assert self.job.request.hdr is not None
        return HdrSpace[self.job.request.hdr]

    def _exr_pixels(self, frames: np.ndarray) -> np.ndarray:
        if self.job.curve is LogCurve.ACESCCT:
            return self._space.from_network(frames)
        return self.job.curve.to_linear(working_codes(frames), self._space.primaries)

    @contextmanager
    def _video(
        self, shot: Shot, path: Path, made: Made, waveform: np.ndarray | None, hlg: bool = False
    ) -> Iterator[VideoWriter]:
        """An mp4 that has its sound already."""
        clip = self.job.clip
        with VideoWriter(
            path,
            clip.width,
            clip.height,
            clip.fps,
            None if waveform is None else self.rate,
            shot.request.settings(),
            force=self.job.request.force,
            sound=made.sound if waveform is None else None,
            hlg=hlg,
        ) as writer:
            if waveform is not None:
                writer.write_audio(waveform)
            yield writer

    def _new_sheet(self, shot: Shot, made: Made, waveform: np.ndarray | None) -> ContactSheet | None:
        job = self.job
        if job.request.contact_sheet is None:
            return None
        several = len(job.shots) > 1
        title = f"seed {shot.request.seed}: {shot.request.prompt}" if several else None
        shown, rate = self._heard(made, waveform) or (None, None)
        sheet = ContactSheet(job.clip.frames, job.clip.fps, 6 if several else 12, title, shown, rate)
        self.sheets.append(sheet)
        return sheet
