"""Opening video and sound files for reading."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from mlx_ltx.errors import UserError

_PHOTO_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}


def open_media(path: str | os.PathLike[str]) -> InputContainer:
    """Open a video or sound file for reading; close it, or use it in a ``with``.

    Raises:
        UserError: it is missing, a HEIC photo (which FFmpeg takes for a video of its tiles), an mp4 that is cut off, or
            nothing that FFmpeg knows.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if path.is_dir():
        raise UserError(f"{path}: is a folder, not a video or sound file")
    try:
        with path.open("rb") as file:
            head = file.read(12)
            missing = _missing_bytes(file) if head[4:8] == b"ftyp" else 0
        if head[4:8] == b"ftyp" and head[8:12] in _PHOTO_BRANDS:
            raise UserError(f"{path}: is a HEIC photo, not a video or sound file; save it as PNG or JPEG")
        if missing:
            raise UserError(f"{path}: is cut off, its last {missing} bytes are missing; copy or download it again")
        # An absolute path, because FFmpeg takes "a:b.mp4" for an address.
        return av.open(str(path.absolute()), metadata_errors="replace")
    except (av.FFmpegError, OSError) as error:
        raise UserError(f"{path}: not a video or sound file that can be read ({error.strerror})") from None


def _missing_bytes(file: BinaryIO) -> int:
    """How many bytes of an mp4's data or index lie beyond its end (ISO/IEC 14496-12, 4.2: boxes of type and size)."""
    end, start = file.seek(0, os.SEEK_END), 0
    while start + 8 <= end:
        file.seek(start)
        size, kind = int.from_bytes(file.read(4)), file.read(4)
        if size == 1:  # a long one
            size = int.from_bytes(file.read(8))
        if size < 8:  # 0: to the end of the file
            return 0
        start += size
        if kind in (b"mdat", b"moov") and start > end:
            return start - end
    return 0


def video_stream(container: InputContainer, path: str | os.PathLike[str]) -> VideoStream:
    """The first picture track.

    Raises:
        UserError: there is none.
    """
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:  # the cover picture of a song is no video
            return stream
    raise UserError(f"{path}: has no picture")


def origin(container: InputContainer) -> Fraction:
    """The file's own time, in seconds, at which its first track begins: what we count times from."""
    return Fraction(container.start_time or 0, av.time_base)
