"""Output files appear complete or not at all."""

import errno
import os
import resource
import subprocess
import sys

import pytest

from mlx_ltx.errors import UserError
from mlx_ltx.media import atomic
from mlx_ltx.media.atomic import atomic_folder, atomic_output, check_output, check_output_folder


def test_writes_into_new_folders_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "a" / "b" / "clip.mp4"
    with atomic_output(target) as partial:
        assert partial.parent == target.parent
        assert partial.suffix == ".mp4"
        assert partial.name.startswith(".clip.mp4.")
        partial.write_bytes(b"done")
        assert not target.exists()
    assert target.read_bytes() == b"done"
    assert list(target.parent.iterdir()) == [target]


def test_permissions_follow_the_umask(tmp_path):
    with atomic_output(tmp_path / "x.png") as partial:
        partial.write_bytes(b"x")
    (tmp_path / "y").write_bytes(b"x")
    assert (tmp_path / "x.png").stat().st_mode == (tmp_path / "y").stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_an_error_removes_the_partial_file_and_keeps_the_old_one(tmp_path, error):
    target = tmp_path / "clip.mp4"
    target.write_bytes(b"old")
    with pytest.raises(error), atomic_output(target, force=True) as partial:  # noqa: PT012
        partial.write_bytes(b"half")
        raise error
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_refuses_to_replace_without_force(tmp_path):
    target = tmp_path / "clip.mp4"
    target.write_bytes(b"old")
    for use in (lambda: check_output(target), lambda: atomic_output(target).__enter__()):
        with pytest.raises(UserError, match="--force"):
            use()
    check_output(target, force=True)
    with atomic_output(target, force=True) as partial:
        partial.write_bytes(b"new")
    assert target.read_bytes() == b"new"


def test_a_file_that_appears_meanwhile_is_kept_and_so_is_the_work(tmp_path):
    target = tmp_path / "clip.mp4"
    with pytest.raises(UserError, match="took this name") as caught, atomic_output(target) as partial:  # noqa: PT012
        partial.write_bytes(b"ours")
        target.write_bytes(b"theirs")
    assert target.read_bytes() == b"theirs"
    (spare,) = set(tmp_path.iterdir()) - {target}
    assert spare.read_bytes() == b"ours"
    assert str(spare) in str(caught.value)
    assert not spare.name.startswith(".")


@pytest.mark.parametrize("taken", [False, True])
def test_works_where_there_are_no_hard_links(tmp_path, monkeypatch, taken):
    def no_links(*_):
        raise OSError(errno.ENOTSUP, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    target = tmp_path / "clip.mp4"

    def write():
        with atomic_output(target) as partial:
            partial.write_bytes(b"ours")
            if taken:
                target.write_bytes(b"theirs")

    if taken:
        with pytest.raises(UserError, match="took this name"):
            write()
    else:
        write()
    assert target.read_bytes() == (b"theirs" if taken else b"ours")
    assert len(list(tmp_path.iterdir())) == 1 + taken


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_one_line(tmp_path, code):
    with (
        pytest.raises(UserError, match=r"clip\.mp4: cannot be written") as caught,
        atomic_output(tmp_path / "clip.mp4"),
    ):
        raise OSError(code, os.strerror(code))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_only_when_the_data_is_flushed(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(UserError, match="disk is full"), atomic_output(tmp_path / "clip.mp4") as partial:
        partial.write_bytes(b"x")
    assert not list(tmp_path.iterdir())


def test_errors_about_other_files_pass_through(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_output(tmp_path / "clip.mp4"):
        open(tmp_path / "missing model")  # noqa: SIM115
    with pytest.raises(OSError, match="another disk"), atomic_output(tmp_path / "clip.mp4"):
        raise OSError(errno.ENOSPC, "another disk", "/elsewhere/cache")


def test_check_output_says_what_is_wrong_and_changes_nothing(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    check_output(tmp_path / "new" / "folders" / "clip.mp4")
    for path, message in [
        (tmp_path, "is a folder"),
        (tmp_path / "file" / "clip.mp4", "clip.mp4: cannot be written"),
        (tmp_path / "file" / "deeper" / "clip.mp4", "clip.mp4: cannot be written"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "nul\0.mp4", "cannot be written"),
        ("/dev/null", "not an ordinary file"),
    ]:
        with pytest.raises(UserError, match=message):
            check_output(path, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_long_name_gets_a_partial_file_that_fits(tmp_path):
    target = tmp_path / ("é" * 120 + ".mp4")  # 244 bytes of the 255 that are allowed
    with atomic_output(target) as partial:
        partial.write_bytes(b"x")
    assert target.read_bytes() == b"x"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="no files can be made"):
        check_output(tmp_path / "new" / "clip.mp4")


WRITE_WITH_LIMIT = """
import resource, sys
import numpy as np
from mlx_ltx.errors import UserError
from mlx_ltx.media.video import VideoWriter

limit, path = int(sys.argv[1]), sys.argv[2]
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
noise = np.random.default_rng(0)
try:
    with VideoWriter(path, 64, 48, 24, 48000, force=True) as writer:
        writer.write_audio(noise.uniform(-0.5, 0.5, (48000, 2)).astype(np.float32))
        for _ in range(4):
            writer.write_frames(noise.integers(0, 255, (4, 48, 64, 3)).astype(np.uint8))
except UserError as error:
    print(error)
    sys.exit(1)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a limit on file sizes")
def test_a_video_that_does_not_fit_is_never_left_behind(tmp_path):
    """The limit acts like a full disk, at the first byte, amid the frames, and at the last byte of the index."""
    target = tmp_path / "clip.mp4"

    def write(limit):
        command = [sys.executable, "-c", WRITE_WITH_LIMIT, str(limit), str(target)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert write(10_000_000).returncode == 0
    size = target.stat().st_size
    target.unlink()
    for limit in (1, size // 2, size - 1):
        result = write(limit)
        assert (result.returncode, result.stderr) == (1, "")
        assert result.stdout.startswith(f"{target}: cannot be written, ")
        assert result.stdout.count("\n") == 1
        assert not list(tmp_path.iterdir())


def fill(folder, names=("a.exr", "b.exr"), content="new"):
    for name in names:
        (folder / name).write_text(content)


def test_a_folder_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "deep" / "frames"
    with atomic_folder(path, ".exr") as partial:
        fill(partial)
        assert not path.exists()
        assert partial.name.startswith(".")
    assert sorted(file.name for file in path.iterdir()) == ["a.exr", "b.exr"]
    assert [entry.name for entry in path.parent.iterdir()] == ["frames"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, GeneratorExit])
@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_fails_leaves_what_was_there(tmp_path, error, force):
    path = tmp_path / "frames"
    if force:
        path.mkdir()
        fill(path, ["old.exr"], "old")
    with pytest.raises(error), atomic_folder(path, ".exr", force) as partial:  # noqa: PT012
        fill(partial)
        raise error
    assert [entry.name for entry in tmp_path.iterdir()] == (["frames"] if force else [])
    assert not force or (path / "old.exr").read_text() == "old"


def test_a_folder_is_replaced_only_with_force_and_if_it_is_one_of_ours(tmp_path):
    path = tmp_path / "frames"
    path.mkdir()
    fill(path, ["0.exr", "1.EXR", "2.exr"], "old")
    with pytest.raises(UserError, match="--force"):
        check_output_folder(path, ".exr")
    with atomic_folder(path, ".exr", force=True) as partial:
        fill(partial)
    assert sorted(file.name for file in path.iterdir()) == ["a.exr", "b.exr"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["frames"]
    (path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"holds thesis\.txt"), atomic_folder(path, ".exr", force=True):
        pass
    (path / "thesis.txt").rename(path / "sub.exr")
    (path / "sub.exr").unlink()
    (path / "sub.exr").mkdir()
    with pytest.raises(UserError, match=r"holds sub\.exr"):
        check_output_folder(path, ".exr", force=True)


def test_names_that_are_no_folder(tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path)
    for name, message in {
        "file": "is not a folder",
        "link": "is not a folder",
        "file/frames": "cannot be written",
        "x" * 300: "cannot be written",
        "a\0b": "cannot be written",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            check_output_folder(tmp_path / name, ".exr", force=True)
        assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "kept"


def test_a_folder_whose_name_is_taken_meanwhile_is_kept_beside(tmp_path):
    path = tmp_path / "frames"
    with pytest.raises(UserError, match="another folder took this name"), atomic_folder(path, ".exr") as partial:  # noqa: PT012
        fill(partial)
        path.mkdir()
        fill(path, ["theirs.exr"], "theirs")
    assert (path / "theirs.exr").exists()
    spare = next(entry for entry in tmp_path.iterdir() if entry.name.startswith("frames-"))
    assert sorted(file.name for file in spare.iterdir()) == ["a.exr", "b.exr"]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_changed_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / "frames"
    path.mkdir()
    with pytest.raises(UserError, match=r"holds thesis\.txt"), atomic_folder(path, ".exr", force=True) as partial:  # noqa: PT012
        fill(partial)
        (path / "thesis.txt").write_text("years of work")
    assert [entry.name for entry in path.iterdir()] == ["thesis.txt"]
