"""Sound files: writing WAV and FLAC, and reading the sound of whatever FFmpeg can open.

Waveforms are float32 in [-1, 1], (samples, channels).
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np
import soundfile
from av.audio.frame import AudioFrame
from av.audio.layout import AudioLayout
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import InputContainer

from mlx_ltx.errors import UserError
from mlx_ltx.media.atomic import atomic_output
from mlx_ltx.media.containers import open_media, origin
from mlx_ltx.media.resample import resample

_USUAL_LAYOUTS = {3: "2.1", 4: "4.0", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}  # by number of channels
FORMATS = {".wav": "WAV", ".flac": "FLAC"}
# Decoders of AAC, MP3 and Opus need the packets before a moment to get that moment right.
PREROLL_SECONDS = 1.0


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
    path: str | os.PathLike[str], start: float = 0.0, duration: float | None = None, stereo: bool = False
) -> tuple[np.ndarray, int]:
    """Read the first sound track of a sound or video file at its own rate: ((samples, channels) float32, Hz).

    Time runs from the beginning of the file, so the sound of a video stays in step with its picture. Fewer samples than
    ``duration`` seconds come back if the track ends before; :func:`fit_length` fills up with silence.

    Args:
        path: any sound or video file.
        start: seconds to leave out at the beginning.
        duration: seconds to read, None for all.
        stereo: make two channels of any number, see :func:`stereo_mix`; otherwise they come as they are.

    Raises:
        UserError: not readable, no sound, damaged, or ``start`` lies beyond the end.
        ValueError: a negative ``start`` or ``duration``.
    """
    if not (math.isfinite(start) and start >= 0):
        raise ValueError(f"start must be zero or more seconds, not {start}")
    if duration is not None and not (math.isfinite(duration) and duration > 0):
        raise ValueError(f"duration must be a positive number of seconds, not {duration}")
    with open_media(path) as container:
        rate = sound_stream(container, path).rate
        stop = None if duration is None else round(duration * rate)
        blocks: list[np.ndarray] = []
        samples = 0
        for block in read_blocks(container, path, start, rate, stereo):
            blocks.append(block)
            samples += len(block)
            if stop is not None and samples >= stop:
                break
    waveform = np.concatenate(blocks)[:stop] if blocks else np.zeros((0, 1), np.float32)
    if len(waveform) == 0:
        raise UserError(f"{path}: has no sound from {start:g} s on")
    return waveform, rate


def read_sound(
    path: str | os.PathLike[str], rate: int, start: float = 0.0, duration: float | None = None
) -> np.ndarray:
    """Read sound as a network wants it: (samples, 2) float32 at ``rate`` Hz.

    :func:`read_audio` in stereo, then :func:`~mlx_ltx.media.resample.resample`.

    Raises:
        UserError, ValueError: as :func:`read_audio`.
    """
    waveform, source_rate = read_audio(path, start, duration, stereo=True)
    return resample(waveform, source_rate, rate)


def fit_length(waveform: np.ndarray, samples: int) -> np.ndarray:
    """Cut (samples, channels), or fill with silence at the end."""
    missing = max(samples - len(waveform), 0)
    return np.pad(waveform[:samples], ((0, missing), (0, 0)))


def stereo_mix(channels: Sequence[str]) -> np.ndarray:
    """How much of each channel, by FFmpeg's names for them, is heard left and right: (channels, 2) float32.

    One channel is heard on both sides as it is, two are left and right. Of more, the front ones count 1 and all others,
    the centre on both sides, 3 dB less (ITU-R BS.775); the low-frequency effects are left out; each side is scaled so
    that it cannot clip. Channels that the file does not name are taken in the usual order for their number.
    """
    if len(channels) <= 2:
        return np.ones((1, 2), np.float32) if len(channels) == 1 else np.eye(2, dtype=np.float32)
    if not {"FL", "FR"} <= set(channels) and len(channels) in _USUAL_LAYOUTS:
        channels = [channel.name for channel in AudioLayout(_USUAL_LAYOUTS[len(channels)]).channels]
    mix = np.zeros((len(channels), 2))
    for number, name in enumerate(channels):
        weight = 1.0 if name in {"FL", "FR"} else math.sqrt(0.5)
        if "L" in name and not name.startswith("LFE"):  # FL, BL, SL, FLC, TFL ...
            mix[number, 0] = weight
        elif "R" in name:
            mix[number, 1] = weight
        elif not name.startswith("LFE"):
            mix[number] = weight
    return (mix / np.maximum(mix.sum(0), 1)).astype(np.float32)


def sound_stream(container: InputContainer, path: str | os.PathLike[str]) -> AudioStream:
    """The first sound track.

    Raises:
        UserError: there is none.
    """
    if not container.streams.audio:
        raise UserError(f"{path}: has no sound")
    return container.streams.audio[0]


def read_blocks(
    container: InputContainer, path: str | os.PathLike[str], start: float, rate: int, stereo: bool
) -> Iterator[np.ndarray]:
    """The sound from ``start`` seconds on, in blocks of (samples, channels) float32 that follow each other.

    A track that begins later than the file has silence until then.

    Raises:
        UserError: damaged (when decoding gets there).
    """
    first = round(start * rate)
    began = False
    try:
        for position, block in _decode(container, rate, start, stereo):
            if not began and position > first:
                yield np.zeros((position - first, block.shape[1]), np.float32)
            kept = block[max(first - position, 0) :]
            if len(kept):
                began = True
                yield kept
    except (av.FFmpegError, ValueError) as error:  # ValueError: rate or layout change on the way
        raise UserError(f"{path}: its sound is damaged ({getattr(error, 'strerror', None) or error})") from None


def _decode(container: InputContainer, rate: int, start: float, stereo: bool) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks of (samples, channels) from shortly before ``start``, each with its first sample's place in the file.

    Packets before that are passed over without decoding. (Seeking would be no faster for files of this kind, and in
    MP3 it only estimates where it lands.)
    """
    stream = container.streams.audio[0]
    assert stream.time_base is not None
    began = origin(container)
    from_ticks = (start - PREROLL_SECONDS + began) / stream.time_base
    # An mp4's last AAC packet is padded; only the header knows where the sound ends.
    end: int | None = None
    if "mp4" in container.format.name and stream.duration is not None:
        end = round(((stream.start_time or 0) + stream.duration) * stream.time_base * rate - began * rate)
    resampler: AudioResampler | None = None
    mix: np.ndarray | None = None
    position = 0
    for packet in container.demux(stream):
        if packet.pts is not None and packet.pts < from_ticks:
            continue
        decoded: list[AudioFrame | None] = [*packet.decode()]
        if not packet.size and resampler is not None:
            decoded.append(None)  # what the resampler holds back
        for frame in decoded:
            if resampler is None:
                assert frame is not None
                # It changes the sample format, and the rate if another one was asked for.
                resampler = AudioResampler("fltp", frame.layout, rate)
                mix = stereo_mix([channel.name for channel in frame.layout.channels]) if stereo else None
                if frame.pts is not None and frame.time_base is not None:
                    position = round((frame.pts * frame.time_base - began) * rate)
            for converted in resampler.resample(frame):
                block = converted.to_ndarray().T
                block = block if end is None else block[: max(end - position, 0)]
                yield position, block if mix is None else block @ mix
                position += len(block)
