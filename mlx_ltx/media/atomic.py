"""Output files, and folders of frames, that appear complete or not at all.

The work goes into a hidden file or folder beside the target and takes the target's name only when it is complete, so
nobody ever sees half a clip, and a failed or cancelled run leaves what was there before.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_ltx.errors import UserError

_NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "your disk quota is used up",
    errno.EFBIG: "the file grew larger than its disk or a limit on file sizes allows",
}


def check_output(path: str | os.PathLike[str], force: bool = False) -> None:
    """Find out before any work whether a file can be written at ``path``; changes nothing.

    Raises:
        UserError: the path exists (and ``force`` is false), is a folder or a device, or lies where nothing can be made.
    """
    path = Path(path)
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        _check_folder(path)
    except (OSError, ValueError) as error:  # a name that is too long, a file where a folder should be, a NUL character
        raise UserError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from None
    else:
        if stat.S_ISDIR(mode):
            raise UserError(f"{path}: is a folder; give the name of a file")
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            raise UserError(f"{path}: is not an ordinary file, so it will not be replaced")
        if not force:
            raise UserError(f"{path}: already exists; give another name, or replace it with --force")
        _check_folder(path)


def check_output_folder(path: str | os.PathLike[str], suffix: str, force: bool = False) -> None:
    """Find out before any work whether a folder of files can be made at ``path``; changes nothing.

    Args:
        suffix: of the files that it will hold, as ".exr".
        force: a folder that exists may be replaced, if it holds nothing but such files.

    Raises:
        UserError: the path exists (and may not be replaced), or lies where nothing can be made.
    """
    path = Path(path)
    try:
        try:
            mode = os.lstat(path).st_mode
        except FileNotFoundError:
            _check_folder(path)
            return
        if not stat.S_ISDIR(mode):
            raise UserError(f"{path}: is not a folder; give another name")
        if not force:
            raise UserError(f"{path}: already exists; give another name, or replace it with --force")
        other = next((entry.name for entry in os.scandir(path) if not _is_ours(entry, suffix)), None)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from None
    if other is not None:
        raise UserError(f"{path}: holds {other} and not only {suffix} files, so it will not be replaced")
    _check_folder(path)


def _is_ours(entry: os.DirEntry[str], suffix: str) -> bool:
    return entry.is_file(follow_symlinks=False) and entry.name.lower().endswith(suffix)


def _check_folder(path: Path) -> None:
    """The folder of ``path``, or the first one above it that exists, must let us make files."""
    folder = path.absolute().parent
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"{path}: cannot be written ({folder} is not a folder)")
    try:
        tempfile.TemporaryFile(dir=folder).close()  # permissions alone do not tell for every user and file system
    except OSError:
        raise UserError(f"{path}: cannot be written (no files can be made in {folder})") from None


@contextmanager
def atomic_output(path: str | os.PathLike[str], force: bool = False) -> Iterator[Path]:
    """Give the block an empty file to fill (same folder, same suffix); it becomes ``path`` when the block succeeds.

    Missing folders are made. Whatever ends the block early (an error, Ctrl-C, a generator that is closed), the partial
    file is removed and ``path`` is as it was. Without ``force`` a file that takes the name in the meantime is kept.

    Raises:
        UserError: as :func:`check_output`; no room on the disk; or the name was taken meanwhile (the finished work is
            then kept under a name beside it, which the message says).
    """
    check_output(path, force)
    path = Path(path)
    # The name is cut so that it stays within a file system's 255 bytes.
    partial = path.parent / f".{path.name[:50]}.{secrets.token_hex(4)}.partial{path.suffix[:10]}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.open("xb").close()
    except OSError as error:
        raise output_error(error, path, partial) or error from None
    try:
        yield partial
        _sync(partial)
        _publish(partial, path, force)
    except OSError as error:
        described = output_error(error, path, partial)
        if described is None:
            raise
        raise described from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], suffix: str, force: bool = False) -> Iterator[Path]:
    """Give the block an empty folder to fill with files; it becomes ``path`` when the block succeeds.

    As :func:`atomic_output`, for a folder; ``suffix`` and ``force`` as in :func:`check_output_folder`.

    Raises:
        UserError: as :func:`check_output_folder`; no room on the disk; or the name was taken meanwhile (the finished
            folder is then kept under a name beside it, which the message says).
    """
    check_output_folder(path, suffix, force)
    path = Path(path)
    partial = path.parent / f".{path.name[:50]}.{secrets.token_hex(4)}.partial"
    try:
        partial.mkdir(parents=True)
        try:
            yield partial
            for file in partial.iterdir():
                _sync(file)
            _publish_folder(partial, path, suffix, force)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        described = output_error(error, path, partial)
        if described is None:
            raise
        raise described from error


def output_error(error: OSError, path: Path, partial: Path) -> UserError | None:
    """The one-line message for an error that hit while writing ``path``; None if it is not about that file.

    PyAV's errors are OSErrors too, with FFmpeg's code in ``errno``. They often name no file.
    """
    about_output = error.filename is None or os.fspath(error.filename) in {str(partial), str(path), str(path.parent)}
    if error.errno in _NO_ROOM and about_output:
        return UserError(f"{path}: cannot be written, {_NO_ROOM[error.errno]}; nothing was kept")
    if error.filename is not None and about_output:
        return UserError(f"{path}: cannot be written ({error.strerror})")
    return None


def _sync(partial: Path) -> None:
    """Have the disk confirm the data: a network disk may report that it is full only here."""
    with partial.open("rb+") as file:
        os.fsync(file.fileno())


def _publish(partial: Path, path: Path, force: bool) -> None:
    if force:
        os.replace(partial, path)
        return
    try:
        os.link(partial, path)  # unlike a rename, this fails when the name is taken
        return
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links (exFAT, some network disks)
        if not os.path.lexists(path):
            os.rename(partial, path)
            return
    spare = path.with_name(f"{path.stem}-{secrets.token_hex(3)}{path.suffix}")
    os.rename(partial, spare)
    raise UserError(f"{path}: another file took this name meanwhile; the new one is {spare}")


def _publish_folder(partial: Path, path: Path, suffix: str, force: bool) -> None:
    old = path.with_name(partial.name.removesuffix(".partial") + ".old")
    if force and os.path.lexists(path):
        check_output_folder(path, suffix, force)  # it may have changed since
        os.rename(path, old)
    try:
        if os.path.lexists(path):
            spare = path.with_name(f"{path.name}-{secrets.token_hex(3)}")
            os.rename(partial, spare)
            raise UserError(f"{path}: another folder took this name meanwhile; the new one is {spare}")
        os.rename(partial, path)
    except BaseException:
        if old.exists() and not os.path.lexists(path):
            os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)
