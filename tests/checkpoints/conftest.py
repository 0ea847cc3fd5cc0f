"""A Hugging Face hub on 127.0.0.1, small enough to read: what tests need of its API, and its ways to fail."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

COMMIT = "1234567890123456789012345678901234567890"


@dataclass
class FakeHub:
    """What the server holds, how it misbehaves, and what it was asked."""

    port: int = 0
    cache: Path = Path()
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)  # repository -> name -> contents
    gated: set[str] = field(default_factory=set)
    status: int | None = None  # answer every download with this
    cut_after: int | None = None  # close each transfer after so many bytes
    ignore_ranges: bool = False
    corrupt: bool = False
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def asked(self, method: str, part: str) -> list[dict[str, str]]:
        """The headers of the requests with this method whose path contains ``part``."""
        return [headers for verb, path, headers in self.requests if verb == method and part in path]


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path, {k.lower(): v for k, v in self.headers.items()}))
        if path.startswith("/api/models/"):
            return self.answer_listing("/".join(path.split("/")[3:5]), body)
        owner, name, _, _, *rest = path.strip("/").removeprefix("storage/").split("/")
        repo, file = f"{owner}/{name}", "/".join(rest)
        if self.refuse(repo, body):
            return None
        if file not in self.hub.files[repo]:
            return self.error(404, "EntryNotFound", body)
        data = self.hub.files[repo][file]
        if not path.startswith("/storage/"):  # as the hub does, send large files to another host
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{self.hub.port}/storage{path}")
            self.send_header("X-Linked-Size", str(len(data)))
            self.send_header("X-Linked-Etag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        return self.answer_data(data)

    def refuse(self, repo: str, body: bool) -> bool:
        if repo not in self.hub.files:
            self.error(404, "RepoNotFound", body)
        elif repo in self.hub.gated:
            self.error(403, "GatedRepo", body)
        elif self.hub.status:
            self.error(self.hub.status, "", body)
        else:
            return False
        return True

    def answer_listing(self, repo: str, body: bool) -> None:
        if self.refuse(repo, body):
            return
        siblings = [{"rfilename": name, "size": len(data)} for name, data in self.hub.files[repo].items()]
        text = json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def answer_data(self, data: bytes) -> None:
        if self.hub.corrupt:
            data = bytes(len(data))
        start = 0
        if (wanted := self.headers.get("Range")) and not self.hub.ignore_ranges:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        rest = data[start:]
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if self.hub.cut_after is not None:
            rest = rest[: self.hub.cut_after]
            self.close_connection = True
        self.wfile.write(rest)

    def error(self, status: int, code: str, body: bool) -> None:
        text = b"{}"
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if body:
            self.wfile.write(text)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A running fake hub with an empty cache; huggingface_hub talks to nothing else."""
    fake = FakeHub(cache=tmp_path / "cache" / "hub")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": fake}))
    fake.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    point_hub_at(monkeypatch, fake.url, fake.cache)
    yield fake
    server.shutdown()
    server.server_close()
    thread.join()
    huggingface_hub.close_session()


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and a hub that nobody can reach; the value is the cache's folder."""
    cache = tmp_path / "cache" / "hub"
    point_hub_at(monkeypatch, "http://127.0.0.1:1", cache)
    return cache


def point_hub_at(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    huggingface_hub.close_session()
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
