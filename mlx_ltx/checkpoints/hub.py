"""Downloads from the Hugging Face hub into its ordinary cache, resumable and with plain error messages.

The cache, the login and the listing are huggingface_hub's; the transfer itself is ours, because huggingface_hub
(since 1.18; its issue 4196) throws a partial file away when a download is interrupted, and these files have 46 GB.
A partial file lies where older versions of huggingface_hub kept theirs, ``blobs/<etag>.incomplete`` in the cache.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    get_session,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import HfFileMetadata, repo_folder_name
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, validate_repo_id

from mlx_ltx.checkpoints.catalogue import MODELS, Licence, ModelEntry, RemoteFile, TextEncoderEntry
from mlx_ltx.checkpoints.lora_catalogue import LORAS
from mlx_ltx.checkpoints.recognise import missing_gemma_files
from mlx_ltx.errors import UserError

Part = RemoteFile | TextEncoderEntry

CHUNK_BYTES = 1 << 20
SECONDS_BETWEEN_EVENTS = 0.1
ATTEMPTS = 5  # without a single byte in between
SECONDS_BETWEEN_ATTEMPTS = 1.0
TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class DownloadPlan:
    """What a download will fetch, known without touching the network.

    Attributes:
        title: what it is for.
        parts: the files and folders, including those on disk already.
        cached: for each part, whether it is complete in the cache.
        nbytes: the size of all parts; ``approximate`` if any of them is.
        cached_bytes: how much of it is in the cache already, partial files included.
        folder: the hub cache that it goes to.
        licences: the terms of the parts.
    """

    title: str
    parts: tuple[Part, ...]
    cached: tuple[bool, ...]
    nbytes: int
    cached_bytes: int
    approximate: bool
    folder: Path
    licences: tuple[Licence, ...]

    @property
    def remaining_bytes(self) -> int:
        return self.nbytes - self.cached_bytes

    @property
    def size(self) -> str:
        """The bytes still to fetch, as a user reads them: "~61.4 GB"."""
        return ("~" if self.approximate else "") + format_bytes(self.remaining_bytes)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        parts = [
            {
                "repo": part.repo,
                "file": part.name if isinstance(part, RemoteFile) else None,
                "bytes": part.nbytes,
                "approximate": part.approximate,
                "here": cached,
            }
            for part, cached in zip(self.parts, self.cached, strict=True)
        ]
        sizes = {"remaining_bytes": self.remaining_bytes, "approximate": self.approximate}
        return {"title": self.title, "parts": parts, **sizes, "folder": str(self.folder)}

    def summary(self) -> str:
        """The plan in a few lines: each part with its size, the sum, where it goes, and the licences."""
        lines = [self.title]
        for part, cached in zip(self.parts, self.cached, strict=True):
            what = f"{part.repo}: {part.name}" if isinstance(part, RemoteFile) else part.repo
            size = ("~" if part.approximate else "") + format_bytes(part.nbytes)
            lines.append(f"  {what}  {size}{' (on this machine)' if cached else ''}")
        lines.append(f"  to download: {self.size}, into {self.folder} ({format_bytes(_free_bytes(self.folder))} free)")
        lines += [f"  licence: {licence.name}, {licence.url}" for licence in self.licences]
        return "\n".join(lines)


@dataclass(frozen=True)
class DownloadEvent:
    """Progress of a download, in bytes; what lay on disk when it began counts as done.

    ``checking`` is set while the partial file of an earlier attempt is read again.
    """

    file: str
    file_done: int
    file_total: int
    done: int
    total: int
    checking: bool = False


def cached_path(file: RemoteFile) -> Path | None:
    """Where ``file`` lies in the hub cache, or None. No network."""
    found = try_to_load_from_cache(file.repo, file.name)
    return Path(found) if isinstance(found, str) else None


def cached_folder(repo: str, file: str = "config.json") -> Path | None:
    """The cached snapshot of ``repo`` that holds ``file``, complete or not, or None. No network."""
    found = try_to_load_from_cache(repo, file)
    return Path(found).parents[file.count("/")] if isinstance(found, str) else None


def cached_snapshot(repo: str) -> Path | None:
    """The newest cached snapshot of ``repo`` whatever it holds, or None. No network."""
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")
    try:
        snapshot = folder / "snapshots" / (folder / "refs" / constants.DEFAULT_REVISION).read_text().strip()
    except OSError:
        return None
    return snapshot if snapshot.is_dir() else None


def cached_text_encoder(entry: TextEncoderEntry) -> Path | None:
    """The cached folder of a text encoder if it is complete, else None. No network."""
    folder = cached_folder(entry.repo)
    return folder if folder and not missing_gemma_files(folder) else None


def model_parts(entry: ModelEntry) -> tuple[Part, ...]:
    """Everything that a catalogue model consists of; nothing for the embedded demo."""
    return tuple(part for part in (entry.checkpoint, entry.spatial_upsampler, entry.text_encoder) if part)


def plan_download(entry: ModelEntry, parts: Sequence[Part] | None = None) -> DownloadPlan:
    """What to fetch for a catalogue model, or only for those ``parts`` of it. No network."""
    return plan_parts(entry.name, model_parts(entry) if parts is None else parts)


def plan_parts(title: str, parts: Sequence[Part]) -> DownloadPlan:
    """What to fetch for ``parts``, and how much of it is there already. No network."""
    cached = tuple((cached_path(p) if isinstance(p, RemoteFile) else cached_text_encoder(p)) is not None for p in parts)
    missing = [part for part, there in zip(parts, cached, strict=True) if not there]
    partial = sum(_partial_bytes(repo) for repo in {part.repo for part in missing})
    nbytes = sum(part.nbytes for part in parts)
    missing_bytes = sum(part.nbytes for part in missing)
    return DownloadPlan(
        title=title,
        parts=tuple(parts),
        cached=cached,
        nbytes=nbytes,
        cached_bytes=nbytes - missing_bytes + min(partial, missing_bytes),
        approximate=any(part.approximate for part in missing),
        folder=Path(constants.HF_HUB_CACHE),
        licences=tuple(dict.fromkeys(_licence(part) for part in parts)),
    )


def check_repository_name(repo: str) -> None:
    """Raise UserError if ``repo`` cannot be a repository's name."""
    with _one_line_errors(repo):
        validate_repo_id(repo)


def list_repository(repo: str) -> dict[str, int]:
    """Every file of a repository on the hub with its size in bytes.

    Raises:
        UserError: there is no such repository, it is gated, or the hub cannot be reached.
    """
    with _one_line_errors(repo):
        info = HfApi().model_info(repo, files_metadata=True)
    return {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}


def download(plan: DownloadPlan) -> Iterator[DownloadEvent]:
    """Fetch what is missing of ``plan``; stop asking for events, or interrupt it, and the next call resumes.

    Yields:
        About ten events a second.

    Raises:
        UserError: a repository or file is missing or gated, the hub cannot be reached, the disk is too small or full,
            or the cache cannot be written.
    """
    transfers = [
        _Transfer(part.repo, name, size)
        for part, cached in zip(plan.parts, plan.cached, strict=True)
        if not cached
        for name, size in _selected(part).items()
    ]
    for transfer in transfers:
        with _one_line_errors(transfer.repo, transfer.name):
            transfer.look_up()
    total = sum(transfer.size for transfer in transfers)
    done = sum(transfer.present_bytes() for transfer in transfers)
    _check_space(plan.folder, total - done)

    last = 0.0
    for transfer in transfers:
        before = done - transfer.present_bytes()
        with _one_line_errors(transfer.repo, transfer.name):
            for file_done, checking in transfer.run():
                if time.monotonic() - last >= SECONDS_BETWEEN_EVENTS:
                    last = time.monotonic()
                    # While a partial file is read again, all of it counts as done.
                    done = before + (transfer.present_bytes() if checking else file_done)
                    yield DownloadEvent(transfer.name, file_done, transfer.size, done, total, checking)
        done = before + transfer.size
        yield DownloadEvent(transfer.name, transfer.size, transfer.size, done, total)


class _Transfer:
    """One file on its way into the cache."""

    def __init__(self, repo: str, name: str, size: int):
        self.repo = repo
        self.name = name
        self.size = size
        self.metadata: HfFileMetadata | None = None

    def look_up(self) -> None:
        """Ask the hub for the file's commit, hash and exact size."""
        metadata = get_hf_file_metadata(hf_hub_url(self.repo, self.name), timeout=constants.HF_HUB_ETAG_TIMEOUT)
        if not metadata.etag or not metadata.commit_hash:
            raise UserError(f"{self.repo}: {constants.ENDPOINT} does not answer like the Hugging Face hub")
        self.metadata = metadata
        self.size = self.size if metadata.size is None else metadata.size
        folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=self.repo, repo_type="model")
        self.blob = folder / "blobs" / metadata.etag
        self.partial = self.blob.with_name(f"{metadata.etag}.incomplete")

    def present_bytes(self) -> int:
        """How much of the file is on disk."""
        for path in (self.blob, self.partial):
            if path.exists():
                return min(path.stat().st_size, self.size)
        return 0

    def run(self) -> Iterator[tuple[int, bool]]:
        """Fetch the file and link it into the cache's snapshot; yields (bytes on disk, whether only checking)."""
        if not self.blob.exists():
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            self.partial.touch()
            with open(self.partial, "r+b") as file:
                self._lock(file)
                yield from self._fill(file)
                self.partial.replace(self.blob)
        # The blob is there, so this only links it and notes the revision, as huggingface_hub itself would.
        hf_hub_download(self.repo, self.name)

    def _lock(self, file: BinaryIO) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.name}: another process is downloading it; wait for that one") from None
        except OSError:
            pass  # some network file systems have no locks; the checksum still guards the result

    def _fill(self, file: BinaryIO) -> Iterator[tuple[int, bool]]:
        """Complete the partial file, with retries, and check its SHA-256 where the hub gives one."""
        assert self.metadata is not None
        digest = hashlib.sha256()
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            yield file.tell(), True
        failures = 0
        while (have := file.tell()) < self.size:
            try:
                for chunk, restarted in self._stream(have):
                    if restarted:
                        file.seek(0)
                        file.truncate()
                        digest = hashlib.sha256()
                    digest.update(chunk)
                    file.write(chunk)
                    yield file.tell(), False
            except HTTPError as error:
                status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
                if status is not None and status not in TRANSIENT_STATUS:
                    raise
                failures = 0 if file.tell() > have else failures + 1
                if failures >= ATTEMPTS:
                    raise
                time.sleep(SECONDS_BETWEEN_ATTEMPTS)
            else:
                if file.tell() <= have:
                    raise UserError(f"{self.name}: the server sends no more data; try again later")
        etag = self.metadata.etag or ""
        if file.tell() != self.size or (SHA256.fullmatch(etag) and digest.hexdigest() != etag):
            self.partial.unlink()
            raise UserError(f"{self.name}: arrived damaged and was removed; run the command again")

    def _stream(self, start: int) -> Iterator[tuple[bytes, bool]]:
        """The file's bytes from ``start``; the flag is set on the first chunk if the server begins at 0 instead."""
        assert self.metadata is not None
        # The commit, not the branch: the bytes must go on matching those that we have. The session follows the
        # redirect to the storage server afresh each time (its address expires) and keeps the token from it.
        url = hf_hub_url(self.repo, self.name, revision=self.metadata.commit_hash)
        headers = build_hf_headers(headers={"Accept-Encoding": "identity", "Range": f"bytes={start}-"})
        with get_session().stream(
            "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, follow_redirects=True
        ) as response:
            hf_raise_for_status(response)
            restarted = start > 0 and response.status_code != 206
            for chunk in response.iter_bytes():
                yield chunk, restarted
                restarted = False


def _selected(part: Part) -> dict[str, int]:
    """The files of ``part`` on the hub, with their sizes."""
    listing = list_repository(part.repo)
    selected = {name: size for name, size in listing.items() if part.selects(name)}
    if not selected:
        raise UserError(f"{part.repo}: has no file {part.name}; the repository may have been reorganised")
    return selected


def _partial_bytes(repo: str) -> int:
    """The size of the resumable partial files of ``repo``; huggingface_hub's own have one more part in their names."""
    blobs = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model") / "blobs"
    return sum(path.stat().st_size for path in blobs.glob("*.incomplete") if path.name.count(".") == 1)


def _licence(part: Part) -> Licence:
    if isinstance(part, TextEncoderEntry):
        return part.licence
    for entry in MODELS.values():
        if entry.checkpoint and entry.checkpoint.repo == part.repo:
            return entry.licence
    for lora in LORAS.values():
        if lora.file == part:
            return lora.licence
    return page_licence(part.repo)


def page_licence(repo: str) -> Licence:
    """The terms of a repository that the catalogue does not know: its own page says them."""
    return Licence(f"see the page of {repo}", f"{constants.ENDPOINT}/{repo}")


def _free_bytes(folder: Path) -> int:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(existing).free


def _check_space(folder: Path, needed: int) -> None:
    free = _free_bytes(folder)
    if needed > free:
        raise UserError(
            f"{folder}: {format_bytes(needed)} to download, but only {format_bytes(free)} free; make room, or set "
            "HF_HOME to a folder on a larger disk"
        )


def format_bytes(nbytes: float) -> str:
    """Bytes as a user reads them, in powers of 1000 as disks and the hub count: "46.1 GB"."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 999.5:
            return f"{nbytes:.0f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} GB"


def _disk_trouble(error: OSError) -> str | None:
    """What to tell of an error that the cache's disk or folder causes, or None for any other."""
    folder = constants.HF_HUB_CACHE
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{folder}: the disk is full; make room and run the command again, it resumes where it stopped"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return f"{folder}: cannot be written ({error.strerror}); set HF_HOME to a folder of yours"
    return None


@contextmanager
def _one_line_errors(repo: str, name: str = "") -> Iterator[None]:
    """Turn what huggingface_hub raises into one line that says what the user can do."""
    subject = f"{repo}: {name}" if name else repo
    page = f"{constants.ENDPOINT}/{repo}"
    host = constants.ENDPOINT.split("//")[-1]
    try:
        yield
    except GatedRepoError:
        raise UserError(
            f"{repo}: is gated; accept its licence at {page}, log in with `hf auth login`, and run the command again"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{repo}: no such repository on {host} (if it is private, log in with `hf auth login`)"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{repo}: has no revision {constants.DEFAULT_REVISION}") from None
    except HFValidationError:
        raise UserError(f"{repo}: is not a repository name; one is written owner/name") from None
    except (OfflineModeIsEnabled, LocalEntryNotFoundError):
        raise UserError(
            f"{subject}: not on this machine, and the hub is off or out of reach; unset HF_HUB_OFFLINE, or connect"
        ) from None
    except EntryNotFoundError:
        raise UserError(f"{subject}: no such file in the repository; see {page}/tree/main") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        advice = "the token lacks access; check `hf auth whoami`" if status in (401, 403) else "try again later"
        raise UserError(f"{subject}: {host} answered {status}; {advice}") from None
    except HTTPError as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"{subject}: cannot reach {host} ({reason}); check the connection and run it again") from None
    except OSError as error:
        if message := _disk_trouble(error):
            raise UserError(message) from None
        raise
