"""Opening video and sound files for reading."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from mlx_ltx.errors import UserError

_PHOTO_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}


def open_media(path: str | os.PathLike[str]) -> InputContainer:
    """Open a video or sound file for reading; close it, or use it in a ``with``.

    Raises:
        UserError: it is missing, a HEIC photo (which FFmpeg takes for a video of its tiles), or nothing that FFmpeg
            knows.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if path.is_dir():
        raise UserError(f"{path}: is a folder, not a video or sound file")
    try:
        with path.open("rb") as file:
            head = file.read(12)
        if head[4:8] == b"ftyp" and head[8:12] in _PHOTO_BRANDS:
            raise UserError(f"{path}: is a HEIC photo, not a video or sound file; save it as PNG or JPEG")
        # An absolute path, because FFmpeg takes "a:b.mp4" for an address.
        return av.open(str(path.absolute()), metadata_errors="replace")
    except (av.FFmpegError, OSError) as error:
        raise UserError(f"{path}: not a video or sound file that can be read ({error.strerror})") from None


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
