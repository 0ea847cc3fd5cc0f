"""Downloads against a fake hub: resuming, checking, accounting, and what a user reads when it goes wrong."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from mlx_ltx.checkpoints import hub as hub_module
from mlx_ltx.checkpoints.catalogue import GEMMA_LICENCE, MODELS, RemoteFile, TextEncoderEntry
from mlx_ltx.checkpoints.hub import (
    DownloadPlan,
    cached_path,
    cached_snapshot,
    cached_text_encoder,
    download,
    format_bytes,
    list_repository,
    plan_download,
    plan_parts,
)
from mlx_ltx.errors import UserError

REPO, NAME = "someone/model", "big.safetensors"
DATA = np.random.default_rng(0).bytes(5 * (1 << 20) + 123)
FILE = RemoteFile(REPO, NAME, len(DATA))
GEMMA = TextEncoderEntry("gemma", "someone/gemma", 100, "Gemma", GEMMA_LICENCE)
GEMMA_FILES = {
    "config.json": json.dumps({"model_type": "gemma3"}).encode(),
    "tokenizer.json": b"{}",
    "model-00001-of-00002.safetensors": b"one",
    "model-00002-of-00002.safetensors": b"two",
    "README.md": b"not needed",
    "pytorch_model.bin": b"not needed",
}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(hub_module, "SECONDS_BETWEEN_ATTEMPTS", 0.0)
    monkeypatch.setattr(hub_module, "SECONDS_BETWEEN_EVENTS", 0.0)


@pytest.fixture
def published(hub):
    hub.files[REPO] = {NAME: DATA, "other.safetensors": b"not asked for"}
    return hub


def plan() -> DownloadPlan:
    return plan_parts("a model", [FILE])


def blobs(hub) -> Path:
    return hub.cache / "models--someone--model" / "blobs"


def partial(hub) -> Path:
    return blobs(hub) / f"{hashlib.sha256(DATA).hexdigest()}.incomplete"


def interrupt(events: int) -> None:
    """Start the download and drop it after some events, as Ctrl-C or a cancelling host does."""
    steps = download(plan())
    for _ in range(events):
        next(steps)
    steps.close()


def test_downloads_only_what_is_asked_into_the_ordinary_cache(published):
    assert cached_path(FILE) is None
    events = list(download(plan()))
    path = cached_path(FILE)
    assert path is not None
    assert path.read_bytes() == DATA
    assert path.is_symlink()
    assert path.resolve().parent == blobs(published)
    assert not list(published.cache.rglob("other*"))
    assert not list(published.cache.rglob("*.incomplete"))
    assert cached_snapshot(REPO) == path.parent
    assert [e.done for e in events] == sorted(e.done for e in events)
    assert (events[-1].done, events[-1].total) == (len(DATA), len(DATA))
    assert not any(e.checking for e in events)
    assert len(events) >= 5


def test_a_complete_download_needs_no_network(published):
    list(download(plan()))
    published.requests.clear()
    after = plan()
    assert after.cached == (True,)
    assert after.remaining_bytes == 0
    assert list(download(after)) == []
    assert published.requests == []


def test_an_interrupted_download_leaves_a_partial_file_and_resumes(published):
    interrupt(events=3)
    have = partial(published).stat().st_size
    assert 0 < have < len(DATA)
    assert [path.name for path in blobs(published).iterdir()] == [partial(published).name]
    assert cached_path(FILE) is None
    assert plan().cached_bytes == have
    assert plan().remaining_bytes == len(DATA) - have

    published.requests.clear()
    events = list(download(plan()))
    assert cached_path(FILE).read_bytes() == DATA
    assert [h["range"] for h in published.asked("GET", "/storage/")] == [f"bytes={have}-"]
    assert events[0].checking
    assert events[0].done == have
    assert events[0].total == len(DATA)
    assert [e.done for e in events] == sorted(e.done for e in events)


def test_keyboard_interrupt_leaves_a_resumable_partial_file(published, monkeypatch):
    chunks = 0
    update = hub_module._Transfer._stream

    def stop(self, start):
        nonlocal chunks
        for item in update(self, start):
            chunks += 1
            if chunks == 3:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(hub_module._Transfer, "_stream", stop)
    with pytest.raises(KeyboardInterrupt):
        list(download(plan()))
    have = partial(published).read_bytes()
    assert 0 < len(have) < len(DATA)
    assert DATA.startswith(have)


def test_a_broken_connection_is_resumed_within_one_download(published):
    published.cut_after = 1_500_000
    list(download(plan()))
    assert cached_path(FILE).read_bytes() == DATA
    assert len(published.asked("GET", "/storage/")) == 4


def test_a_server_that_sends_nothing_is_given_up(published):
    published.cut_after = 0
    with pytest.raises(UserError, match="cannot reach"):
        list(download(plan()))
    assert len(published.asked("GET", "/storage/")) == hub_module.ATTEMPTS


def test_a_server_that_ignores_ranges_starts_over(published):
    interrupt(events=2)
    published.ignore_ranges = True
    list(download(plan()))
    assert cached_path(FILE).read_bytes() == DATA


def test_damaged_data_is_removed_and_told(published):
    published.corrupt = True
    with pytest.raises(UserError, match="arrived damaged"):
        list(download(plan()))
    assert list(blobs(published).iterdir()) == []
    published.corrupt = False
    list(download(plan()))
    assert cached_path(FILE).read_bytes() == DATA


def test_a_damaged_partial_file_is_noticed(published):
    interrupt(events=2)
    partial(published).write_bytes(bytes(1000))
    with pytest.raises(UserError, match="arrived damaged"):
        list(download(plan()))


def test_two_processes_do_not_write_one_file(published):
    interrupt(events=2)
    with open(partial(published), "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process"):
            list(download(plan()))


def test_the_token_goes_to_the_hub_and_not_to_the_storage_server(published):
    list(download(plan()))
    assert all(h.get("authorization") == "Bearer hf_secret" for h in published.asked("GET", "/resolve/")[:1])
    assert published.asked("GET", "/resolve/")[0]["authorization"] == "Bearer hf_secret"
    assert all("authorization" not in headers for headers in published.asked("GET", "/storage/"))


def test_a_text_encoder_is_complete_with_all_its_shards(hub):
    hub.files[GEMMA.repo] = GEMMA_FILES
    assert cached_text_encoder(GEMMA) is None
    list(download(plan_parts("text", [GEMMA])))
    folder = cached_text_encoder(GEMMA)
    assert folder is not None
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        set(GEMMA_FILES) - {"README.md", "pytorch_model.bin"}
    )
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert cached_text_encoder(GEMMA) is None
    hub.requests.clear()
    list(download(plan_parts("text", [GEMMA])))
    assert cached_text_encoder(GEMMA) == folder
    assert not hub.asked("GET", "/storage/")  # the blob was still there: only the link was missing


def test_the_disk_is_checked_before_anything_is_fetched(published, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(UserError) as caught:
        list(download(plan()))
    assert "5 MB to download, but only 1 kB free" in str(caught.value)
    assert str(published.cache) in str(caught.value)
    assert not published.asked("GET", "/resolve/")
    assert not published.cache.exists()


def test_space_counts_only_what_is_missing(published, monkeypatch):
    interrupt(events=3)
    left = len(DATA) - partial(published).stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, left))
    list(download(plan()))
    assert cached_path(FILE).read_bytes() == DATA


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOSPC, "the disk is full; make room"), (errno.EROFS, "cannot be written"), (errno.EACCES, "HF_HOME")],
)
def test_a_disk_that_fails_midway_is_told_in_one_line(published, monkeypatch, number, message):
    def fail(self, file):
        raise OSError(number, "no")
        yield

    monkeypatch.setattr(hub_module._Transfer, "_fill", fail)
    with pytest.raises(UserError, match=message) as caught:
        list(download(plan()))
    assert "\n" not in str(caught.value)


def test_a_read_only_cache_is_told_in_one_line(published):
    published.cache.parent.mkdir(parents=True)
    published.cache.write_text("a file where the cache should be")
    with pytest.raises(UserError, match="cannot be written") as caught:
        list(download(plan()))
    assert str(published.cache) in str(caught.value)


def test_gated_repositories_say_where_to_accept_the_licence(published):
    published.gated.add(REPO)
    for action in (lambda: list(download(plan())), lambda: list_repository(REPO)):
        with pytest.raises(UserError) as caught:
            action()
        assert f"{published.url}/{REPO}" in str(caught.value)
        assert "hf auth login" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_missing_repositories_and_files_are_named(published):
    with pytest.raises(UserError, match=r"someone/nothing: no such repository"):
        list_repository("someone/nothing")
    with pytest.raises(UserError, match=r"someone/model: has no file lost\.safetensors"):
        list(download(plan_parts("x", [RemoteFile(REPO, "lost.safetensors", 1)])))
    with pytest.raises(UserError, match="not a repository name"):
        list_repository("a/b/c")


@pytest.mark.parametrize(("status", "advice"), [(500, "try again later"), (403, "hf auth whoami")])
def test_a_failing_hub_is_told_with_its_status(published, status, advice):
    published.status = status
    with pytest.raises(UserError, match=advice) as caught:
        list(download(plan()))
    assert str(status) in str(caught.value)


def test_an_unreachable_hub_is_told_in_one_line(no_hub):
    with pytest.raises(UserError, match=r"cannot reach 127\.0\.0\.1:1") as caught:
        list(download(plan()))
    assert "\n" not in str(caught.value)


def test_offline_mode_is_named(no_hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        list(download(plan()))


def test_plans_need_no_network_and_say_everything(no_hub):
    entry = MODELS["ltx-2.3-distilled"]
    found = plan_download(entry)
    sizes = [entry.checkpoint.nbytes, entry.spatial_upsampler.nbytes, entry.text_encoder.nbytes]
    assert found.nbytes == sum(sizes)
    assert found.cached_bytes == 0
    assert found.approximate
    assert found.folder == no_hub
    text = found.summary()
    for expected in (
        entry.checkpoint.name,
        entry.spatial_upsampler.name,
        entry.text_encoder.repo,
        "46.1 GB",
        "~14.3 GB",
        "to download: ~61.4 GB",
        str(no_hub),
        entry.licence.url,
        GEMMA_LICENCE.url,
    ):
        assert expected in text
    assert plan_download(MODELS["demo"]).parts == ()


def test_an_unknown_repository_points_to_its_page_for_the_licence(no_hub):
    assert plan().licences[0].url.endswith("/someone/model")


def test_partial_files_of_huggingface_hub_itself_do_not_count(no_hub):
    folder = no_hub / "models--someone--model" / "blobs"
    folder.mkdir(parents=True)
    (folder / "abc.0123abcd.incomplete").write_bytes(bytes(1000))
    assert plan().cached_bytes == 0
    (folder / "abc.incomplete").write_bytes(bytes(10))
    assert plan().cached_bytes == 10


def test_no_progress_bar_is_printed(published, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(download(plan()))
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (10**9, "1.0 GB"),
        (46_149_345_334, "46.1 GB"),
    ],
)
def test_bytes_are_formatted_as_the_hub_does(nbytes, text):
    assert format_bytes(nbytes) == text
