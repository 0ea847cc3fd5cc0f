"""Video files as input: what they hold, and their frames, at their own rate or at another.

Frames are (H, W, 3) uint8 RGB as a player shows them: upright, with square pixels, HDR turned to SDR. Transparency is
dropped, not blended, as in :func:`~mlx_ltx.media.images.load_image`. Only one frame is held at a time.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation
from av.video.stream import VideoStream
from PIL import Image

from mlx_ltx.errors import UserError
from mlx_ltx.media.color import HdrTransfer, sdr_from_hdr
from mlx_ltx.media.containers import open_media, origin, video_stream
from mlx_ltx.media.images import to_srgb

_TO_RGB = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_HDR_TRANSFERS: dict[int, HdrTransfer] = {16: "PQ", 18: "HLG"}  # codes of ITU-T H.273
_STILLS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # what Pillow is asked about
_ANIMATIONS = {"AVIF", "GIF", "PNG", "WEBP"}
_DEFAULT_FRAME_SECONDS = Fraction(1, 10)  # of animations that do not say, in browsers too
_SEEK_MARGIN = Fraction(1)  # seconds: indexes name decoding times, which run ahead of the times of showing


def frame_rate(fps: float | Fraction) -> Fraction:
    """The exact rate behind a number of frames per second: 23.976 and 29.97 mean 24000/1001 and 30000/1001.

    Raises:
        ValueError: it is not a number of at least 0.01.
    """
    if not (math.isfinite(fps) and fps >= 0.01):
        raise ValueError(f"fps must be a number of at least 0.01, not {fps}")
    ntsc = Fraction(round(fps) * 1000, 1001)
    if ntsc != fps and abs(float(ntsc) - fps) < 1e-3 and round(fps) != fps:
        return ntsc
    return Fraction(fps).limit_denominator(1001)


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds. Sizes are in pixels as displayed, times in seconds, ``audio_*`` None without sound.

    Attributes:
        fps: frames per second; the mean of a variable rate; 0 if the file does not tell.
        constant_rate: ``fps`` is known, and every frame lasts equally long, but for rounding in the file.
        start: when the first frame appears, from the beginning of the file.
        hdr: "HLG" or "PQ"; None for SDR.
    """

    width: int
    height: int
    fps: Fraction
    frames: int
    duration: float
    audio_rate: int | None
    audio_channels: int | None
    audio_duration: float | None
    constant_rate: bool
    start: Fraction
    hdr: HdrTransfer | None


class _Frame(NamedTuple):
    """A frame of the source: when it appears and disappears, in seconds from the file's beginning, and its pixels."""

    start: Fraction
    end: Fraction
    pixels: Callable[[], np.ndarray]


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Describe a video file; reads all of it, but decodes only its first frame.

    Raises:
        UserError: it cannot be read, has no picture, or is a still image.
    """
    if _is_animation(path):
        return _probe_animation(path)
    with open_media(path) as container:
        stream = video_stream(container, path)
        frames, times = 0, []
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:  # edit lists hide frames
                frames += 1
                if packet.pts is not None and packet.time_base is not None:
                    times.append(packet.pts * packet.time_base)
        times.sort()
        nominal = Fraction(stream.average_rate or stream.guessed_rate or 0)
        fps: Fraction | None = nominal
        if len(times) == frames > 1:  # the times of elementary streams and old AVIs are unknown
            candidates = [nominal, Fraction(stream.base_rate or 0), _mean_rate(times)]
            tick = stream.time_base or Fraction(0)
            fps = next((rate for rate in candidates if rate and _on_grid(times, rate, tick)), None)
        audio = container.streams.audio[0] if container.streams.audio else None
        duration = _seconds(stream.duration, stream.time_base)
        if duration is None:
            rate = fps or nominal
            duration = float(frames / rate) if rate else _seconds(container.duration, Fraction(1, av.time_base)) or 0.0
        audio_duration = _seconds(audio.duration, audio.time_base) if audio else None
        start = max(times[0] - origin(container), Fraction(0)) if times else Fraction(0)
        hdr = _HDR_TRANSFERS.get(stream.codec_context.color_trc)
    first = next(read_frames(path), None)
    if first is None:
        raise UserError(f"{path}: has no frames")
    height, width = first.shape[:2]
    return VideoInfo(
        width=width,
        height=height,
        fps=fps or nominal or _mean_rate(times),
        frames=frames,
        duration=duration,
        audio_rate=audio.rate if audio else None,
        audio_channels=audio.channels if audio else None,
        audio_duration=audio_duration,
        constant_rate=bool(fps),
        start=start,
        hdr=hdr,
    )


def _probe_animation(path: str | os.PathLike[str]) -> VideoInfo:
    frames = list(_animation_frames(path))
    height, width = frames[0].pixels().shape[:2]
    duration = frames[-1].end
    return VideoInfo(
        width=width,
        height=height,
        fps=len(frames) / duration,
        frames=len(frames),
        duration=float(duration),
        audio_rate=None,
        audio_channels=None,
        audio_duration=None,
        constant_rate=len({frame.end - frame.start for frame in frames}) == 1,
        start=Fraction(0),
        hdr=None,
    )


def _mean_rate(times: Sequence[Fraction]) -> Fraction:
    if len(times) < 2 or times[-1] - times[0] > 100 * (len(times) - 1) or times[-1] == times[0]:
        return Fraction(0)
    return frame_rate((len(times) - 1) / (times[-1] - times[0]))


def _on_grid(times: Sequence[Fraction], rate: Fraction, tick: Fraction) -> bool:
    """Whether frames appear at a constant rate: none further than a quarter frame from its place, or than rounding."""
    allowed = max(1 / (4 * rate), tick) * rate
    return all(abs((time - times[0]) * rate - place) <= allowed for place, time in enumerate(times))


def read_frames(path: str | os.PathLike[str]) -> Iterator[np.ndarray]:
    """Decode every frame of a video in order, whenever it is shown.

    Raises:
        UserError: it cannot be read, has no picture, is a still image, or is damaged (when decoding gets there).
    """
    return (frame.pixels() for frame in _source(path))


def read_clip(
    path: str | os.PathLike[str],
    fps: float | Fraction | None = None,
    frames: int | None = None,
    start: float = 0.0,
) -> Iterator[np.ndarray]:
    """Decode a part of a video at a constant rate.

    Without ``fps`` the source's frames come as they are, each once, which a variable rate does not allow. With it, each
    moment shows the frame that a player shows (to within half a frame), so frames repeat or are left out, and times
    count from the beginning of the file, in step with :func:`~mlx_ltx.media.audio.read_audio`. Do not change the
    arrays: a frame that repeats is the same one.

    Args:
        fps: frames per second, see :func:`frame_rate`; None for the source's own.
        frames: how many, None for all from ``start`` on.
        start: seconds to leave out at the beginning; the nearest frame is the first.

    Raises:
        UserError: as :func:`read_frames`; a variable rate without ``fps``; or the video ends too early.
        ValueError: ``frames`` below 1, a negative ``start``, or a bad ``fps``.
    """
    if frames is not None and frames < 1:
        raise ValueError(f"frames must be at least 1, not {frames}")
    if not (math.isfinite(start) and start >= 0):
        raise ValueError(f"start must be zero or more seconds, not {start}")
    rate = None if fps is None else frame_rate(fps)
    return _read_clip(path, rate, frames, start)


def _read_clip(
    path: str | os.PathLike[str], rate: Fraction | None, frames: int | None, start: float
) -> Iterator[np.ndarray]:
    begin = Fraction(start)
    if rate is None:
        info = probe(path)
        if not info.constant_rate:
            raise UserError(
                f"{path}: has a variable frame rate (about {float(info.fps):.4g} frames per second), so its frames "
                "cannot be taken one by one; convert it to a constant rate, or give the rate to read it at"
            )
        rate = info.fps
        # Its own frames: counted from the first one, whenever that appears.
        begin = Fraction(round(begin * rate)) / rate + info.start
    count = 0
    with closing(_source(path, begin)) as source:
        for pixels in itertools.islice(_at_rate(source, rate, begin), frames):
            yield pixels
            count += 1
    if count == 0:
        raise UserError(f"{path}: has no frames from {start:g} s on")
    if frames is not None and count < frames:
        raise UserError(
            f"{path}: has only {count} frames from {start:g} s on at {float(rate):.5g} frames per second, "
            f"{frames} are needed"
        )


def _at_rate(source: Iterable[_Frame], rate: Fraction, start: Fraction) -> Iterator[np.ndarray]:
    """What is shown at ``start`` and every ``1 / rate`` seconds after: the last frame that has appeared by then.

    A frame counts as there half an interval early, so that times rounded in the file never shift one.
    """
    place = 0  # of the next frame to give
    shown: _Frame | None = None
    for frame in source:
        appears = math.floor((frame.start - start) * rate + Fraction(1, 2))
        if shown is not None and appears > place:
            yield from itertools.repeat(shown.pixels(), appears - place)
            place = appears
        elif shown is None and appears > 0:  # nothing is shown yet: its first frame stands for what comes before
            yield from itertools.repeat(frame.pixels(), appears)
            place = appears
        shown = frame
    if shown is not None:
        disappears = math.floor((shown.end - start) * rate + Fraction(1, 2))
        if disappears > place:
            yield from itertools.repeat(shown.pixels(), disappears - place)


def _source(path: str | os.PathLike[str], start: Fraction = Fraction(0)) -> Generator[_Frame, None, None]:
    """The frames of a file in order, at least those that are shown from ``start`` on."""
    return _animation_frames(path) if _is_animation(path) else _video_frames(path, start)


def _is_animation(path: str | os.PathLike[str]) -> bool:
    """Whether Pillow reads it as several pictures; FFmpeg cannot decode animated WebP and misses a GIF's last pause.

    Raises:
        UserError: it is a single picture.
    """
    if not Path(path).is_file():
        return False
    try:
        with Image.open(path, formats=_STILLS) as image:
            animated = image.format in _ANIMATIONS and getattr(image, "n_frames", 1) > 1
    except Exception:  # not one of these formats, or damaged in one of the dozen ways that Pillow distinguishes
        return False
    if not animated:
        raise UserError(f"{path}: is a still image, not a video")
    return True


def _animation_frames(path: str | os.PathLike[str]) -> Generator[_Frame, None, None]:
    time = Fraction(0)
    with Image.open(path, formats=_STILLS) as image:
        for number in range(getattr(image, "n_frames", 1)):
            try:
                image.seek(number)
                image.load()
                pixels = np.array(to_srgb(image.copy(), image.info.get("icc_profile")), np.uint8)
            except Exception as error:  # Pillow raises a dozen types for damaged files
                raise UserError(f"{path}: damaged after frame {number} ({error})") from None
            lasts = Fraction(image.info.get("duration") or 0) / 1000 or _DEFAULT_FRAME_SECONDS
            yield _Frame(time, time + lasts, partial(np.asarray, pixels))
            time += lasts


def _video_frames(path: str | os.PathLike[str], start: Fraction) -> Generator[_Frame, None, None]:
    if start > _SEEK_MARGIN:
        with closing(_decode(path, start - _SEEK_MARGIN)) as frames:
            first = next(frames, None)
            if first is not None and first.start <= start:  # an index may be missing, or lead too far
                yield first
                yield from frames
                return
    yield from _decode(path, None)


def _decode(path: str | os.PathLike[str], seek: Fraction | None) -> Generator[_Frame, None, None]:
    """Decode from the beginning, or from the last key frame at or before ``seek`` seconds if the file can tell."""
    with open_media(path) as container:
        stream = video_stream(container, path)
        stream.thread_type = "AUTO"
        if seek is not None and not _seek(container, stream, seek):
            return
        convert = _Converter(stream)
        began, rate = origin(container), stream.average_rate or stream.guessed_rate
        usual = 1 / Fraction(rate) if rate else Fraction(1, 25)
        time = Fraction(0)
        count, cut_off = 0, False
        try:
            for packet in container.demux(stream):
                cut_off = packet.is_corrupt or (cut_off and not packet.size)  # the empty packet at the end says nothing
                for frame in packet.decode():
                    tick = frame.time_base or Fraction(0)
                    if frame.pts is not None:
                        time = frame.pts * tick - began
                    elif seek is not None and count == 0:
                        return  # nobody can tell where this is
                    lasts = frame.duration * tick if frame.duration else usual
                    yield _Frame(time, time + lasts, partial(convert, frame))
                    time += lasts
                    count += 1
        except av.FFmpegError as error:
            raise UserError(f"{path}: damaged after frame {count} ({error.strerror})") from None
        if cut_off:
            raise UserError(f"{path}: damaged after frame {count} (the file ends amid a frame)")


def _seek(container: InputContainer, stream: VideoStream, seconds: Fraction) -> bool:
    if not stream.time_base:
        return False
    try:
        container.seek(math.floor((seconds + origin(container)) / stream.time_base), stream=stream)
    except av.FFmpegError:
        return False
    return True


class _Converter:
    """From decoded frames to upright RGB with square pixels."""

    def __init__(self, stream: VideoStream):
        self.aspect = Fraction(stream.sample_aspect_ratio or 1) or Fraction(1)

    def __call__(self, frame: VideoFrame) -> np.ndarray:
        hdr = _HDR_TRANSFERS.get(frame.color_trc)
        width = max(round(frame.width * self.aspect), 1)
        # In planes: swscale gets the colours of packed 16-bit RGB wrong with full chroma interpolation.
        pixels = frame.to_ndarray(format="gbrp16le" if hdr else "rgb24", width=width, interpolation=_TO_RGB)
        if hdr:
            pixels = sdr_from_hdr(pixels, hdr)
        turns = round(frame.rotation / 90)  # anticlockwise; phones store portrait clips lying down
        return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels


def _seconds(ticks: int | None, time_base: Fraction | None) -> float | None:
    return None if ticks is None or time_base is None else float(ticks * time_base)
