"""OpenEXR: stills and folders of frames, in and out.

Pixels are float32 (H, W, 3) as the file holds them: linear light without an upper end, or log codes. What they mean is
said by :class:`~mlx_ltx.media.hdr.HdrSpace`, never guessed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np

from mlx_ltx.errors import UserError
from mlx_ltx.media.atomic import atomic_folder, atomic_output
from mlx_ltx.media.color import Primaries

SUFFIX = ".exr"


def is_exr(path: str | os.PathLike[str]) -> bool:
    """Whether this is an EXR still, by its name, or a folder that holds EXR frames."""
    path = Path(path)
    return bool(_frames(path)) if path.is_dir() else path.suffix.lower() == SUFFIX


def exr_frames(folder: str | os.PathLike[str]) -> list[Path]:
    """The EXR files directly in a folder, in the order of their names.

    Raises:
        UserError: there is no such folder, or none in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of EXR frames")
    frames = _frames(folder)
    if not frames:
        raise UserError(f"{folder}: holds no .exr frames")
    return frames


def _frames(folder: Path) -> list[Path]:
    # Files whose names begin with a dot are what macOS leaves on foreign disks.
    files = (file for file in folder.iterdir() if file.suffix.lower() == SUFFIX and not file.name.startswith("."))
    return sorted(file for file in files if file.is_file())


def read_exr(path: str | os.PathLike[str]) -> np.ndarray:
    """Read the colours of an EXR file's first part: (H, W, 3) float32 over its display window.

    A file of one channel is grey. Alpha and all other channels are left out. Outside the data window pixels are black.

    Raises:
        UserError: the OpenEXR package is missing; the file is missing or damaged; it has several channels but not R, G
            and B at full size; or pixels that are not finite.
    """
    path = Path(path)
    header, channels = _read(path, header_only=False)
    names = ["R", "G", "B"] if {"R", "G", "B"} <= channels.keys() else [name for name in channels if name != "A"] * 3
    if len(names) != 3:
        raise UserError(f"{path}: has no channels R, G and B, only {', '.join(sorted(channels)) or 'none'}")
    planes = [np.asarray(channels[name].pixels, np.float32) for name in names]
    (left, top), (right, bottom) = (np.asarray(corner, np.int64) for corner in header["dataWindow"])
    shape = (int(bottom - top + 1), int(right - left + 1))
    if any(plane.shape != shape for plane in planes):
        raise UserError(f"{path}: its colours are stored at less than full size, which is not supported")
    pixels = _display_window(np.stack(planes, -1), header, int(left), int(top))
    bad = pixels.size - int(np.count_nonzero(np.isfinite(pixels)))
    if bad:
        raise UserError(f"{path}: {bad} of its values are infinite or not numbers")
    return pixels


def exr_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(height, width) of an EXR file's display window, from its header.

    Raises:
        UserError: as :func:`read_exr`.
    """
    header, _ = _read(Path(path), header_only=True)
    return _window_size(header["displayWindow"])


def _read(path: Path, header_only: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    library = openexr()
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder, not an image' if path.is_dir() else 'no such file'}")
    try:
        file = library.File(str(path), separate_channels=True, header_only=header_only)
        return file.header(), ({} if header_only else file.channels())
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        raise UserError(f"{path}: not an EXR file that can be read ({_first_line(error)})") from None


def _display_window(pixels: np.ndarray, header: dict[str, Any], left: int, top: int) -> np.ndarray:
    """Pixels whose first one lies at (left, top), cut and filled with black to the display window."""
    origin_x, origin_y = (int(value) for value in header["displayWindow"][0])
    height, width = _window_size(header["displayWindow"])
    if (left, top, *pixels.shape[:2]) == (origin_x, origin_y, height, width):
        return pixels
    result = np.zeros((height, width, 3), np.float32)
    x, y = left - origin_x, top - origin_y
    kept = pixels[max(-y, 0) : max(height - y, 0), max(-x, 0) : max(width - x, 0)]
    result[max(y, 0) : max(y, 0) + kept.shape[0], max(x, 0) : max(x, 0) + kept.shape[1]] = kept
    return result


def _window_size(window: Any) -> tuple[int, int]:
    (left, top), (right, bottom) = (np.asarray(corner, np.int64) for corner in window)
    return int(bottom - top + 1), int(right - left + 1)


def write_exr(
    path: str | os.PathLike[str], pixels: np.ndarray, primaries: Primaries, color_space: str, force: bool = False
) -> None:
    """Write (H, W, 3) float as a half-float EXR still.

    Args:
        primaries: of the pixels, for the ``chromaticities`` attribute.
        color_space: the ``colorSpace`` attribute, as "ACEScg"; other programs show it.

    Raises:
        UserError: the OpenEXR package is missing, another suffix, or the file cannot be written.
        ValueError: not a picture.
    """
    path = Path(path)
    if path.suffix.lower() != SUFFIX:
        raise UserError(f"{path}: an EXR still is written as .exr; give a name that ends in .exr")
    library = openexr()
    with atomic_output(path, force) as partial:
        _write(library, partial, path, pixels, primaries, color_space)


class ExrFolder:
    """Writes half-float EXR frames, ``frame_00000.exr`` and so on, into a folder that appears when all are written.

    Use it as a context manager; if the block fails, nothing is left.

    Args:
        path: the folder to make.
        primaries, color_space: as for :func:`write_exr`.
        force: replace a folder that exists, if it holds nothing but EXR files.

    Raises:
        UserError: the OpenEXR package is missing, or the folder cannot be written
            (see :func:`~mlx_ltx.media.atomic.atomic_folder`).
    """

    def __init__(self, path: str | os.PathLike[str], primaries: Primaries, color_space: str, force: bool = False):
        self.path = Path(path)
        self.frames = 0  # written so far
        self._primaries, self._color_space = primaries, color_space
        self._library = openexr()
        self._force = force
        self._partial: Path | None = None
        self._running: AbstractContextManager[None] | None = None

    def __enter__(self) -> ExrFolder:
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
        with atomic_folder(self.path, SUFFIX, self._force) as self._partial:
            yield
            if self.frames == 0:
                raise ValueError("no frames were written")

    def write_frames(self, frames: np.ndarray) -> None:
        """Append frames, (n, H, W, 3) float.

        Raises:
            UserError: one could not be written (disk full).
            ValueError: not frames.
        """
        if self._partial is None:
            raise ValueError("the folder is not open; use it as `with ExrFolder(...) as folder`")
        if frames.ndim != 4:
            raise ValueError(f"frames must be (n, H, W, 3), not {frames.shape}")
        for pixels in frames:
            file = self._partial / f"frame_{self.frames:05d}{SUFFIX}"
            _write(self._library, file, self.path, pixels, self._primaries, self._color_space)
            self.frames += 1


def read_exr_clip(folder: str | os.PathLike[str], frames: int | None = None, first: int = 0) -> Iterator[np.ndarray]:
    """Read the frames of a folder in the order of their names, one at a time, as :func:`read_exr` does.

    Args:
        frames: how many, None for all.
        first: the number of the first, from 0.

    Raises:
        UserError: as :func:`exr_frames` and :func:`read_exr`; there are too few; or one is of another size than the
            first.
        ValueError: ``frames`` below 1 or ``first`` below 0.
    """
    if first < 0 or (frames is not None and frames < 1):
        raise ValueError(f"cannot read {frames} frames from number {first} on")
    paths = exr_frames(folder)[first:]
    if not paths or (frames is not None and len(paths) < frames):
        raise UserError(f"{folder}: has only {len(paths)} frames from number {first} on, {frames or 1} are needed")
    return _read_all(paths[:frames])


def _read_all(paths: list[Path]) -> Iterator[np.ndarray]:
    shape: tuple[int, ...] | None = None
    for path in paths:
        pixels = read_exr(path)
        shape = shape or pixels.shape
        if pixels.shape != shape:
            raise UserError(
                f"{path}: is {pixels.shape[1]}x{pixels.shape[0]} pixels, the first frame is {shape[1]}x{shape[0]}"
            )
        yield pixels


def _write(
    library: ModuleType, file: Path, path: Path, pixels: np.ndarray, primaries: Primaries, color_space: str
) -> None:
    if pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise ValueError(f"a picture is (H, W, 3), not {pixels.shape}")
    header = {
        "compression": library.ZIP_COMPRESSION,
        "type": library.scanlineimage,
        "chromaticities": primaries.chromaticities,
        "colorSpace": color_space,
    }
    largest = np.finfo(np.float16).max
    half = np.ascontiguousarray(np.clip(pixels, -largest, largest).astype(np.float16))
    try:
        library.File(header, {"RGB": half}).write(str(file))
    except (RuntimeError, OSError) as error:  # the library gives no error numbers
        raise UserError(f"{path}: cannot be written ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")


def openexr() -> ModuleType:
    """The OpenEXR package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import OpenEXR
    except ImportError:
        raise UserError('EXR files need the OpenEXR package; install it with: pip install "mlx_ltx[hdr]"') from None
    return OpenEXR
