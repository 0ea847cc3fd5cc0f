"""Video files: writing H.264 with sound, or an HDR master, and the settings that a clip carries inside."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from queue import Queue
from types import TracebackType
from typing import Any

import numpy as np

from mlx_ltx.errors import UserError
from mlx_ltx.media.atomic import atomic_output, output_error
from mlx_ltx.media.clips import VideoInfo, frame_rate, probe, read_frames
from mlx_ltx.media.containers import open_media
from mlx_ltx.media.mp4 import Mp4
from mlx_ltx.media.sound import SourceSound

__all__ = ["SourceSound", "VideoInfo", "VideoWriter", "frame_rate", "probe", "read_frames", "read_metadata"]

SETTINGS_KEY = "mlx_ltx"  # the member of the JSON comment that holds a clip's settings


class VideoWriter:
    """Writes one mp4: H.264 (yuv420p) or an HDR master, with sound as long as the picture.

    The picture is 8-bit BT.709 in limited range, which every player assumes for such files; the master is 10-bit HEVC
    in BT.2020 and HLG. Sound is given as waveforms and encoded as AAC stereo, or taken from a file.

    Use it as a context manager. The file appears at ``path`` when the block ends well; otherwise nothing is left.
    Encoding runs on its own thread while the caller makes the next frames; at most one chunk waits, so a slow encoder
    holds the caller back instead of filling the memory.

    Args:
        path: ends in ``.mp4``; missing folders are made.
        width, height: pixels, both even (4:2:0 stores one colour for 2×2 pixels).
        fps: frames per second, see :func:`frame_rate`.
        sample_rate: Hz of sound that will be given with :meth:`write_audio`.
        sound: a file whose sound to take instead, see :class:`~mlx_ltx.media.sound.SourceSound`. Without either, the
            file has no sound track.
        metadata: settings to keep inside the file, anything that JSON can hold; :func:`read_metadata` returns them.
        crf: the encoder's constant rate factor, 0 (lossless, for H.264) to 51; None is 19, and 12 for a master.
        force: replace a file that exists.
        hlg: write an HDR master, from linear Rec.709 frames in which 1 is diffuse white.

    Raises:
        UserError: the file cannot be written (see :func:`~mlx_ltx.media.atomic.atomic_output`), or the file of the
            sound has none.
        ValueError: odd sizes, a size below 16 for a master, a bad rate, or arrays of another shape or dtype than
            announced.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        width: int,
        height: int,
        fps: float | Fraction,
        sample_rate: int | None = None,
        metadata: Mapping[str, Any] | None = None,
        crf: int | None = None,
        force: bool = False,
        sound: SourceSound | None = None,
        hlg: bool = False,
    ):
        self.path = Path(path)
        if self.path.suffix.lower() != ".mp4":
            raise UserError(f"{self.path}: video is written as .mp4; give a name that ends in .mp4")
        if width < 2 or height < 2 or width % 2 or height % 2:
            raise ValueError(f"width and height must be even and at least 2, not {width}x{height}")
        if hlg and min(width, height) < 16:
            raise ValueError(f"HEVC needs at least 16 pixels on a side, not {width}x{height}")
        crf = (12 if hlg else 19) if crf is None else crf
        if not 0 <= crf <= 51:
            raise ValueError(f"crf must be between 0 and 51, not {crf}")
        if sample_rate is not None and sample_rate <= 0:
            raise ValueError(f"sample_rate must be positive, not {sample_rate}")
        if sample_rate is not None and sound is not None:
            raise ValueError("sound is either given, with a sample_rate, or taken from a file, not both")
        self.width, self.height, self.rate, self.sample_rate = width, height, frame_rate(fps), sample_rate
        self.frames = 0  # accepted so far
        self._crf, self._force, self._hlg, self._source = crf, force, hlg, sound
        self._dtype = np.dtype(np.float32 if hlg else np.uint8)
        self._comment = _encode_settings(metadata) if metadata is not None else None
        self._has_sound = False
        self._queue: Queue[np.ndarray | None] = Queue(maxsize=1)  # frames have 4 axes, sound has 2; None is the end
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
            sound = self.sample_rate if self._source is None else self._source
            mp4 = Mp4(self._partial, self.width, self.height, self.rate, self._crf, self._hlg, sound, self._comment)
            # A daemon, so that an interpreter that is told to stop never waits for an encoder.
            thread = threading.Thread(target=self._encode, args=(mp4,), name="video-encoder", daemon=True)
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
                    mp4.close()
                raise

    def write_frames(self, frames: np.ndarray) -> None:
        """Append frames, (n, H, W, 3) uint8 RGB, or float32 linear Rec.709 for a master.

        Leave the array unchanged afterwards: it is encoded a little later.

        Raises:
            UserError: an earlier frame could not be written (disk full).
        """
        if frames.dtype != self._dtype or frames.shape[1:] != (self.height, self.width, 3):
            raise ValueError(
                f"frames must be {self._dtype} (n, {self.height}, {self.width}, 3), not {frames.dtype} {frames.shape}"
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

    def _encode(self, mp4: Mp4) -> None:
        """The encoder thread. After an error it keeps emptying the queue, so that the caller never waits in vain."""
        while (chunk := self._queue.get()) is not None:
            try:
                if chunk.ndim == 2:
                    mp4.add_sound(chunk)
                else:
                    for frame in chunk:
                        if self._cancelled.is_set() or self._error is not None:
                            break
                        mp4.add_frame(frame)
            except Exception as error:
                self._error = self._error or error
        if self._error is None and not self._cancelled.is_set():
            try:
                mp4.finish()
            except Exception as error:
                self._error = error


def _encode_settings(settings: Mapping[str, Any]) -> str:
    """One JSON text; characters that no file can hold (stray surrogates) become the JSON escapes that mean them."""
    text = json.dumps({SETTINGS_KEY: dict(settings)}, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


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
