"""Embedded prompts on disk, so that making the same clip again with another seed or size needs no text model.

A file per text, named after a hash of everything that decides its embedding, with a hash of its content at its
beginning: what was cut off or damaged is not there. Files appear whole (written beside, then renamed), so that several
processes may share the folder; what has not been used for longest goes when the folder grows too large.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_ltx.sampling.denoise import TextContext

VERSION = 1  # of the files, and of how texts are embedded
LIMIT_BYTES = 1 << 30
SUFFIX = ".text"
DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}
DIGEST_BYTES = hashlib.sha256().digest_size


def cache_folder() -> Path:
    """Where this package keeps what it can make again: in ``XDG_CACHE_HOME`` if that is set, else where the system
    keeps such things."""
    usual = Path("Library", "Caches") if sys.platform == "darwin" else Path(".cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / usual) / "mlx_ltx"


@dataclass(frozen=True)
class Embedded:
    """An embedding as plain bytes, which any thread may read.

    Attributes:
        video, audio: raw values, (1, S, dim) each.
        dtype: its name in MLX.
    """

    video: np.ndarray
    audio: np.ndarray
    dtype: str

    def context(self) -> TextContext:
        """As arrays; to be called on the thread that works with them."""
        dtype = DTYPES[self.dtype]
        return TextContext(mx.array(self.video).view(dtype), mx.array(self.audio).view(dtype))

    @classmethod
    def of(cls, context: TextContext) -> Embedded:
        dtype = next(name for name, kind in DTYPES.items() if kind == context.video.dtype)
        word = mx.uint32 if context.video.dtype.size == 4 else mx.uint16
        return cls(np.array(context.video.view(word)), np.array(context.audio.view(word)), dtype)

    def to_bytes(self) -> bytes:
        header = {"dtype": self.dtype, "video": self.video.shape, "audio": self.audio.shape}
        payload = json.dumps(header).encode() + b"\n" + self.video.tobytes() + self.audio.tobytes()
        return hashlib.sha256(payload).digest() + payload

    @classmethod
    def from_bytes(cls, data: bytes) -> Embedded | None:
        """What :meth:`to_bytes` gave; None if it is damaged."""
        digest, payload = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
        if hashlib.sha256(payload).digest() != digest:
            return None
        header, _, values = payload.partition(b"\n")
        described = json.loads(header)
        words = np.frombuffer(values, np.uint32 if DTYPES[described["dtype"]].size == 4 else np.uint16)
        split = int(np.prod(described["video"]))
        return cls(
            words[:split].reshape(described["video"]), words[split:].reshape(described["audio"]), described["dtype"]
        )


def file_identity(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Name, size and time of change of each file: other weights under the same name are other files."""
    stats = [(path, path.stat()) for path in sorted(paths)]
    return [(path.name, stat.st_size, stat.st_mtime_ns) for path, stat in stats]


class PromptCache:
    """The embeddings that one model made.

    Args:
        identity: what decides an embedding beside the text, as plain JSON data.
        folder: where they lie; None is a folder of :func:`cache_folder`.
        limit: bytes of all files together.
    """

    def __init__(self, identity: object, folder: Path | None = None, limit: int = LIMIT_BYTES):
        self.identity, self.limit = identity, limit
        self.folder = cache_folder() / "prompts" if folder is None else folder

    def path(self, text: str) -> Path:
        key = json.dumps([VERSION, self.identity, text.strip()])
        return self.folder / (hashlib.sha256(key.encode()).hexdigest() + SUFFIX)

    def get(self, text: str) -> Embedded | None:
        """The embedding of a text, or None; a damaged file counts as none."""
        path = self.path(text)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        found = Embedded.from_bytes(data)
        if found is not None:
            with contextlib.suppress(OSError):
                os.utime(path)  # used just now
        return found

    def put(self, text: str, embedded: Embedded) -> None:
        """Keep an embedding, and make room for it. A disk that cannot take it is no reason to stop a job."""
        temporary: str | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".", delete=False) as file:
                temporary = file.name
                file.write(embedded.to_bytes())
            os.replace(temporary, self.path(text))
            self._make_room()
        except OSError:
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)

    def _make_room(self) -> None:
        """Delete what has not been used for longest; others may delete at the same time."""
        files = []
        for path in self.folder.glob(f"*{SUFFIX}"):
            with contextlib.suppress(OSError):
                stat = path.stat()
                files.append((stat.st_mtime_ns, stat.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.limit:
                return
            with contextlib.suppress(OSError):
                path.unlink()
            total -= size
