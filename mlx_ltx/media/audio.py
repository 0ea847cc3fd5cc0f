"""Sound files: writing WAV and FLAC, and reading the sound of whatever FFmpeg can open.

Waveforms are float32 in [-1, 1], (samples, channels).
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile
from av.audio.resampler import AudioResampler
from av.container import InputContainer

from mlx_ltx.errors import UserError
from mlx_ltx.media.atomic import atomic_output
from mlx_ltx.media.video import open_media

FORMATS = {".wav": "WAV", ".flac": "FLAC"}
# Decoders of AAC, MP3 and Opus need the packets before a moment to get that moment right.
_PREROLL_SECONDS = 1.0


def write_audio(path: str | os.PathLike[str], waveform: np.ndarray, rate: int, force: bool = False) -> None:
    """Write a waveform, (samples, channels) float, as 24-bit WAV or FLAC, whichever the suffix says.

    Values beyond [-1, 1] are clipped.

    Raises:
        UserError: another suffix, or the file cannot be written (see :func:`~mlx_ltx.media.atomic.atomic_output`).
        ValueError: the array is not a waveform, or not finite.
    """
    path = Path(path)
    format = FORMATS.get(path.suffix.lower())
    if format is None:
        raise UserError(f"{path}: sound is written as .wav or .flac; give a name that ends in one of them")
    if waveform.ndim != 2 or 0 in waveform.shape or not np.isfinite(waveform).all():
        raise ValueError(f"waveform must be finite values (samples, channels), not {waveform.shape}")
    encoded = io.BytesIO()  # libsndfile hides the reason when a disk is full, a plain write does not
    soundfile.write(encoded, np.clip(waveform, -1, 1), rate, format=format, subtype="PCM_24")
    with atomic_output(path, force) as partial:
        partial.write_bytes(encoded.getbuffer())


def read_audio(
    path: str | os.PathLike[str], start: float = 0.0, duration: float | None = None
) -> tuple[np.ndarray, int]:
    """Read the first sound track of a sound or video file at its own rate: ((samples, channels) float32, Hz).

    Time runs from the beginning of the file, so the sound of a video stays in step with its picture. Fewer samples than
    ``duration`` seconds come back if the track ends before.

    Args:
        path: any sound or video file.
        start: seconds to leave out at the beginning.
        duration: seconds to read, None for all.

    Raises:
        UserError: not readable, no sound, damaged, or ``start`` lies beyond the end.
        ValueError: a negative ``start`` or ``duration``.
    """
    if not (math.isfinite(start) and start >= 0):
        raise ValueError(f"start must be zero or more seconds, not {start}")
    if duration is not None and not (math.isfinite(duration) and duration > 0):
        raise ValueError(f"duration must be a positive number of seconds, not {duration}")
    with open_media(path) as container:
        if not container.streams.audio:
            raise UserError(f"{path}: has no sound")
        rate = container.streams.audio[0].rate
        first = round(start * rate)
        stop = None if duration is None else first + round(duration * rate)
        head: int | None = None
        blocks: list[np.ndarray] = []
        try:
            for position, block in _decode(container, rate, start):
                if stop is not None and position >= stop:
                    break
                head = position if head is None else head
                blocks.append(block)
        except (av.FFmpegError, ValueError) as error:  # ValueError: rate or layout change on the way
            raise UserError(f"{path}: its sound is damaged ({getattr(error, 'strerror', None) or error})") from None
    waveform = np.zeros((0, 1), np.float32)
    if head is not None:
        waveform = np.concatenate(blocks)
        # A track may begin later than the picture: silence until then.
        waveform = waveform[first - head :] if head <= first else np.pad(waveform, ((head - first, 0), (0, 0)))
        waveform = waveform[: None if stop is None else stop - first]
    if len(waveform) == 0:
        raise UserError(f"{path}: has no sound from {start:g} s on")
    return waveform, rate


def _decode(container: InputContainer, rate: int, start: float) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks of (samples, channels) from shortly before ``start``, each with its first sample's place in the file.

    Packets before that are passed over without decoding. (Seeking would be no faster for files of this kind, and in
    MP3 it only estimates where it lands.)
    """
    stream = container.streams.audio[0]
    assert stream.time_base is not None
    origin = Fraction(container.start_time or 0, av.time_base)
    from_ticks = (start - _PREROLL_SECONDS + origin) / stream.time_base
    # An mp4's last AAC packet is padded; only the header knows where the sound ends.
    end: int | None = None
    if "mp4" in container.format.name and stream.duration is not None:
        end = round(((stream.start_time or 0) + stream.duration) * stream.time_base * rate - origin * rate)
    resampler: AudioResampler | None = None
    position = 0
    for packet in container.demux(stream):
        if packet.pts is not None and packet.pts < from_ticks:
            continue
        for frame in packet.decode():
            if resampler is None:
                resampler = AudioResampler("fltp", frame.layout, rate)  # only changes the sample format
                if frame.pts is not None and frame.time_base is not None:
                    position = round((frame.pts * frame.time_base - origin) * rate)
            for converted in resampler.resample(frame):
                block = converted.to_ndarray().T
                block = block if end is None else block[: max(end - position, 0)]
                yield position, block
                position += len(block)
