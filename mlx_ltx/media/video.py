"""Video files: writing H.264 with AAC sound, reading frames back, and the settings that a clip carries inside.

Frames are uint8 RGB, (n, H, W, 3). Colours are BT.709 in limited range, which every player assumes for such files.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from queue import Queue
from types import TracebackType
from typing import Any

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.container import InputContainer, OutputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from mlx_ltx.errors import UserError
from mlx_ltx.media.atomic import atomic_output, output_error

SETTINGS_KEY = "mlx_ltx"  # the member of the JSON comment that holds a clip's settings
AUDIO_BITS_PER_SECOND = 192_000
_AAC_FRAME = 1024  # samples
_BT709 = 1  # the code of ITU-T H.273 for primaries, transfer and matrix alike
# swscale's defaults round down, which darkens a picture by more than a level in each direction. With these, luma is the
# rounded exact value and chroma is the mean of its 2×2 pixels.
_TO_YUV = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP
_TO_RGB = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


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


class VideoWriter:
    """Writes one mp4: H.264 (yuv420p) and, with ``sample_rate``, AAC stereo exactly as long as the picture.

    Use it as a context manager. The file appears at ``path`` when the block ends well; otherwise nothing is left.
    Encoding runs on its own thread while the caller makes the next frames; at most one chunk waits, so a slow encoder
    holds the caller back instead of filling the memory.

    Args:
        path: ends in ``.mp4``; missing folders are made.
        width, height: pixels, both even (4:2:0 stores one colour for 2×2 pixels).
        fps: frames per second, see :func:`frame_rate`.
        sample_rate: Hz of the sound, or None for a silent file without a sound track.
        metadata: settings to keep inside the file, anything that JSON can hold; :func:`read_metadata` returns them.
        crf: x264's constant rate factor, 0 (lossless) to 51.
        force: replace a file that exists.

    Raises:
        UserError: the file cannot be written (see :func:`~mlx_ltx.media.atomic.atomic_output`).
        ValueError: odd sizes, a bad rate, or arrays of another shape or dtype than announced.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        width: int,
        height: int,
        fps: float | Fraction,
        sample_rate: int | None = None,
        metadata: Mapping[str, Any] | None = None,
        crf: int = 19,
        force: bool = False,
    ):
        self.path = Path(path)
        if self.path.suffix.lower() != ".mp4":
            raise UserError(f"{self.path}: video is written as .mp4; give a name that ends in .mp4")
        if width < 2 or height < 2 or width % 2 or height % 2:
            raise ValueError(f"width and height must be even and at least 2, not {width}x{height}")
        if not 0 <= crf <= 51:
            raise ValueError(f"crf must be between 0 and 51, not {crf}")
        if sample_rate is not None and sample_rate <= 0:
            raise ValueError(f"sample_rate must be positive, not {sample_rate}")
        self.width, self.height, self.rate, self.sample_rate = width, height, frame_rate(fps), sample_rate
        self.frames = 0  # accepted so far
        self._crf, self._force = crf, force
        self._comment = _encode_settings(metadata) if metadata is not None else None
        self._has_sound = False
        self._queue: Queue[np.ndarray | None] = Queue(maxsize=1)  # frames are uint8, sound is float32, None is the end
        self._cancelled = threading.Event()
        self._error: Exception | None = None
        self._running: AbstractContextManager[None] | None = None

    def __enter__(self) -> VideoWriter:
        self._running = self._run()
        self._running.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._running is not None
        self._running.__exit__(kind, error, traceback)

    @contextmanager
    def _run(self) -> Iterator[None]:
        """What surrounds the caller's block: open, then finish if it went well, or give up."""
        with atomic_output(self.path, self._force) as self._partial:
            track = _Mp4(self._partial, self.width, self.height, self.rate, self._crf, self.sample_rate, self._comment)
            # A daemon, so that an interpreter that is told to stop never waits for an encoder.
            thread = threading.Thread(target=self._encode, args=(track,), name="video-encoder", daemon=True)
            thread.start()
            try:
                yield
                if self.frames == 0:
                    raise ValueError("no frames were written")
                if self.sample_rate is not None and not self._has_sound:
                    raise ValueError("a sample_rate was given but no sound was written")
                self._queue.put(None)
                thread.join()
                self._raise_error()
            except BaseException:
                self._cancelled.set()
                self._queue.put(None)  # never blocks for long: the thread empties the queue until it meets a None
                thread.join()
                self._partial.unlink(missing_ok=True)  # first, so that closing does not rewrite a file nobody wants
                with suppress(Exception):
                    track.container.close()
                raise

    def write_frames(self, frames: np.ndarray) -> None:
        """Append frames, (n, H, W, 3) uint8 RGB. Leave the array unchanged afterwards: it is encoded a little later.

        Raises:
            UserError: an earlier frame could not be written (disk full).
        """
        if frames.dtype != np.uint8 or frames.shape[1:] != (self.height, self.width, 3):
            raise ValueError(
                f"frames must be uint8 (n, {self.height}, {self.width}, 3), not {frames.dtype} {frames.shape}"
            )
        self._put(frames)
        self.frames += len(frames)

    def write_audio(self, waveform: np.ndarray) -> None:
        """Append sound, (samples, channels) float in [-1, 1]; one channel is put on both sides.

        It may come before, between or after the frames (before is best: then the file is written as it is encoded). In
        the end it is cut, or padded with silence, to the length of the picture.

        Raises:
            UserError: an earlier part could not be written (disk full).
        """
        if self.sample_rate is None:
            raise ValueError("this writer was made without a sample_rate, so it has no sound track")
        if waveform.ndim != 2 or waveform.shape[1] not in (1, 2):
            raise ValueError(f"waveform must be (samples, 1 or 2 channels), not {waveform.shape}")
        if not np.isfinite(waveform).all():
            raise ValueError("waveform has values that are not finite")
        self._put(np.repeat(np.clip(waveform, -1, 1), 2 // waveform.shape[1], axis=1).astype(np.float32))
        self._has_sound = True

    def _put(self, chunk: np.ndarray) -> None:
        if self._running is None:
            raise ValueError("the writer is not open; use it as `with VideoWriter(...) as writer`")
        self._raise_error()
        self._queue.put(chunk)

    def _raise_error(self) -> None:
        if isinstance(self._error, OSError):
            raise output_error(self._error, self.path, self._partial) or self._error
        if self._error is not None:
            raise self._error

    def _encode(self, track: _Mp4) -> None:
        """The encoder thread. After an error it keeps emptying the queue, so that the caller never waits in vain."""
        while (chunk := self._queue.get()) is not None:
            try:
                if chunk.dtype != np.uint8:
                    track.add_sound(chunk)
                else:
                    for frame in chunk:
                        if self._cancelled.is_set() or self._error is not None:
                            break
                        track.add_frame(frame)
            except Exception as error:
                self._error = self._error or error
        if self._error is None and not self._cancelled.is_set():
            try:
                track.close()
            except Exception as error:
                self._error = error


class _Mp4:
    """The two tracks of a file being written. Not for more than one thread at a time."""

    def __init__(
        self,
        path: Path,
        width: int,
        height: int,
        rate: Fraction,
        crf: int,
        sample_rate: int | None,
        comment: str | None,
    ):
        options = {
            "movflags": "+faststart",  # the index in front: playback starts before the whole file has arrived
            "max_interleave_delta": "0",  # hold packets back, however long, until sound and picture can alternate
            "movie_timescale": str(sample_rate or rate.numerator),  # else the sound's length is rounded to milliseconds
        }
        self.container: OutputContainer = av.open(str(path.absolute()), "w", format="mp4", options=options)
        if comment is not None:
            self.container.metadata["comment"] = comment
        self.video = self.container.add_stream("libx264", rate=rate, options={"preset": "veryfast", "crf": str(crf)})
        self.video.width, self.video.height, self.video.pix_fmt = width, height, "yuv420p"
        context = self.video.codec_context
        context.time_base = 1 / rate
        context.color_primaries = context.color_trc = context.colorspace = _BT709
        context.color_range = ColorRange.MPEG
        self.rate, self.sample_rate = rate, sample_rate
        self.frames = self.samples = 0  # encoded so far
        self.pending = np.zeros((0, 2), np.float32)  # sound that is not encoded yet
        self.reformatter = VideoReformatter()
        if sample_rate is not None:
            self.audio = self.container.add_stream("aac", rate=sample_rate, layout="stereo")
            self.audio.codec_context.bit_rate = AUDIO_BITS_PER_SECOND
            self.audio.codec_context.time_base = Fraction(1, sample_rate)

    def add_frame(self, pixels: np.ndarray) -> None:
        frame = self.reformatter.reformat(
            VideoFrame.from_ndarray(pixels, format="rgb24"),
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
            interpolation=_TO_YUV,
        )
        frame.pts, frame.time_base = self.frames, 1 / self.rate
        self.container.mux(self.video.encode(frame))
        self.frames += 1
        self._encode_sound(final=False)

    def add_sound(self, waveform: np.ndarray) -> None:
        self.pending = np.concatenate([self.pending, waveform])
        self._encode_sound(final=False)

    def _encode_sound(self, final: bool) -> None:
        """Encode the sound up to the picture's present end: whole AAC frames only, until the end is final."""
        if self.sample_rate is None:
            return
        missing = round(self.frames / self.rate * self.sample_rate) - self.samples
        if final:
            silence = np.zeros((max(missing - len(self.pending), 0), 2), np.float32)
            self.pending = np.concatenate([self.pending, silence])
        ready = min(missing, len(self.pending))
        ready = ready if final else ready // _AAC_FRAME * _AAC_FRAME
        for start in range(0, ready, _AAC_FRAME):
            block = self.pending[start : min(start + _AAC_FRAME, ready)]
            frame = AudioFrame.from_ndarray(np.ascontiguousarray(block.T), format="fltp", layout="stereo")
            frame.sample_rate, frame.pts, frame.time_base = (
                self.sample_rate,
                self.samples,
                Fraction(1, self.sample_rate),
            )
            self.container.mux(self.audio.encode(frame))
            self.samples += len(block)
        self.pending = self.pending[max(ready, 0) :]

    def close(self) -> None:
        """Flush both encoders and write the index."""
        self._encode_sound(final=True)
        self.container.mux(self.video.encode())
        if self.sample_rate is not None:
            self.container.mux(self.audio.encode())
        self.container.close()


def _encode_settings(settings: Mapping[str, Any]) -> str:
    """One JSON text; characters that no file can hold (stray surrogates) become the JSON escapes that mean them."""
    text = json.dumps({SETTINGS_KEY: dict(settings)}, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def open_media(path: str | os.PathLike[str]) -> InputContainer:
    """Open a video or sound file for reading; close it, or use it in a ``with``.

    Raises:
        UserError: it is missing, or nothing that FFmpeg knows.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if path.is_dir():
        raise UserError(f"{path}: is a folder, not a video or sound file")
    try:
        # An absolute path, because FFmpeg takes "a:b.mp4" for an address.
        return av.open(str(path.absolute()), metadata_errors="replace")
    except (av.FFmpegError, OSError) as error:
        raise UserError(f"{path}: not a video or sound file that can be read ({error.strerror})") from None


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings that :class:`VideoWriter` stored inside a clip.

    Raises:
        UserError: not a media file, or it carries no settings of ours.
    """
    with open_media(path) as container:
        comment = container.metadata.get("comment", "")
    try:
        settings = json.loads(comment)[SETTINGS_KEY]
    except (json.JSONDecodeError, KeyError, TypeError):
        settings = None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: carries no mlx_ltx settings; it was made by something else, or saved again since")
    return settings


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds. Sizes are in pixels as displayed, times in seconds, ``audio_*`` None without sound."""

    width: int
    height: int
    fps: Fraction
    frames: int
    duration: float
    audio_rate: int | None
    audio_channels: int | None
    audio_duration: float | None


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Describe a video file; decodes its first frame.

    Raises:
        UserError: it cannot be read or has no picture.
    """
    with open_media(path) as container:
        stream = _video_stream(container, path)
        # The number in the header is exact for mp4; other containers do not have one, so their packets are counted.
        frames = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
        audio = container.streams.audio[0] if container.streams.audio else None
        fps = Fraction(stream.average_rate or stream.guessed_rate or 0)
        duration = _seconds(stream.duration, stream.time_base)
        if duration is None:
            duration = float(frames / fps) if fps else _seconds(container.duration, Fraction(1, av.time_base)) or 0.0
        audio_duration = _seconds(audio.duration, audio.time_base) if audio else None
    first = next(read_frames(path), None)
    if first is None:
        raise UserError(f"{path}: has no frames")
    height, width = first.shape[:2]
    return VideoInfo(
        width=width,
        height=height,
        fps=fps,
        frames=frames,
        duration=duration,
        audio_rate=audio.rate if audio else None,
        audio_channels=audio.channels if audio else None,
        audio_duration=audio_duration,
    )


def read_frames(path: str | os.PathLike[str]) -> Iterator[np.ndarray]:
    """Decode a video frame by frame: (H, W, 3) uint8 RGB, turned the way a player shows it.

    Raises:
        UserError: it cannot be read, has no picture, or is damaged (when decoding gets there).
    """
    with open_media(path) as container:
        stream = _video_stream(container, path)
        stream.thread_type = "AUTO"
        count, cut_off = 0, False
        try:
            for packet in container.demux(stream):
                cut_off = packet.is_corrupt or (cut_off and not packet.size)  # the empty packet at the end says nothing
                for frame in packet.decode():
                    pixels = frame.to_ndarray(format="rgb24", interpolation=_TO_RGB)
                    turns = round(frame.rotation / 90)  # anticlockwise; phones store portrait clips lying down
                    yield np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels
                    count += 1
        except av.FFmpegError as error:
            raise UserError(f"{path}: damaged after frame {count} ({error.strerror})") from None
        if cut_off:
            raise UserError(f"{path}: damaged after frame {count} (the file ends amid a frame)")


def _video_stream(container: InputContainer, path: str | os.PathLike[str]) -> VideoStream:
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:  # the cover picture of a song is no video
            return stream
    raise UserError(f"{path}: has no picture")


def _seconds(ticks: int | None, time_base: Fraction | None) -> float | None:
    return None if ticks is None or time_base is None else float(ticks * time_base)
