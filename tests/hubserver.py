"""A local hub: as much of the Hub's HTTP API as huggingface_hub 0.36 uses, and its faults.

    with Hub() as hub:
        hub.add("org/tiny", tiny_model())
        hub.cut["model.safetensors"] = [1_500_000]   # the first body ends there
        fetch("org/tiny", mirror=hub.mirror(), ...)
        assert hub.count("GET", "model.safetensors") == 2

Each fault is used up: a list holds one entry a request. Everything is standard library, so
that the tests see the real client against a real socket.
"""

from __future__ import annotations

import hashlib
import json
import random
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from tunesmith.core.mirrors import Mirror

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def safetensors(tensors: Mapping[str, tuple[int, ...]], seed: int = 0) -> bytes:
    """Return a safetensors file of random F32 tensors: {name: shape}."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        size = 4
        for length in shape:
            size *= length
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + random.Random(seed).randbytes(end)


def tiny_model(rows: int = 64, seed: int = 0) -> dict[str, bytes]:
    """Return the files of a model folder: whole for every check that reads no weights."""
    return {
        "config.json": json.dumps({"model_type": "llama", "architectures": ["X"]}).encode(),
        "tokenizer.json": b'{"version": "1.0", "model": {"type": "BPE"}}',
        "tokenizer_config.json": b'{"tokenizer_class": "PreTrainedTokenizerFast"}',
        "model.safetensors": safetensors({"a.weight": (rows, 256), "b.weight": (4,)}, seed),
    }


@dataclass(frozen=True)
class Seen:
    """A request the hub got."""

    method: str
    path: str
    headers: Mapping[str, str]


@dataclass
class _Repo:
    commit: str
    files: dict[str, bytes]
    claimed: dict[str, int] = field(default_factory=dict)


class Hub:
    """A hub at an address of this machine, for a `with` block. The attributes are its faults."""

    def __init__(self, address: str = "127.0.0.1") -> None:
        self.seen: list[Seen] = []
        self.repos: dict[str, _Repo] = {}
        # By file: one entry a GET.
        self.cut: dict[str, list[int]] = defaultdict(list)
        self.stall: dict[str, list[int]] = defaultdict(list)
        self.flip: dict[str, int] = defaultdict(int)
        # Bytes of bodies that were sent.
        self.sent: dict[str, int] = defaultdict(int)
        self.ignore_range = False
        # Answered to every request for metadata: (status, headers).
        self.refuse: tuple[int, dict[str, str]] | None = None
        self.etag: str | None = None
        # Answered to every request for a file of a gated model, which is listed all the same.
        self.gated: int | None = None
        self._server = ThreadingHTTPServer((address, 0), _handler(self))
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://{self._server.server_address[0]}:{self.port}"

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def add(self, name: str, files: Mapping[str, bytes], commit: str = COMMIT) -> None:
        self.repos[name] = _Repo(commit, dict(files))

    def claim(self, name: str, file: str, size: int) -> None:
        """Let the list of files give another size than the file has."""
        self.repos[name].claimed[file] = size

    def mirror(self, *before: str, after: tuple[str, ...] = ()) -> Mirror:
        """Return a mirror of endpoints: `before`, this hub, `after`."""
        return mirror(*before, self.url, *after)

    def count(self, method: str, ending: str) -> int:
        return sum(s.method == method and s.path.endswith(ending) for s in self.seen)

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def mirror(*endpoints: str) -> Mirror:
    """Return a mirror with these hub endpoints and no other address."""
    return Mirror("test", endpoints, ("http://127.0.0.1:9/simple",), (), (), (), ())


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing: `hub.seen` is the log."""

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.seen.append(
                Seen(self.command, path, {k.lower(): v for k, v in self.headers.items()})
            )
            if path.startswith("/api/models/"):
                self._listing(path.removeprefix("/api/models/"))
            else:
                self._file(path.lstrip("/"))

        def _listing(self, rest: str) -> None:
            name, _, revision = rest.partition("/revision/")
            repo = hub.repos.get(name)
            if hub.refuse:
                self._send(*hub.refuse)
            elif repo is None:
                self._send(404, {"X-Error-Code": "RepoNotFound"})
            elif revision not in ("main", repo.commit):
                self._send(404, {"X-Error-Code": "RevisionNotFound"})
            else:
                siblings = [_sibling(repo, file, data) for file, data in repo.files.items()]
                body = json.dumps({"id": name, "sha": repo.commit, "siblings": siblings})
                self._send(200, {"Content-Type": "application/json"}, body.encode())

        def _file(self, path: str) -> None:
            name, _, rest = path.partition("/resolve/")
            revision, _, file = rest.partition("/")
            repo = hub.repos.get(name)
            if repo is None or file not in repo.files or revision != repo.commit:
                self._send(404, {"X-Error-Code": "EntryNotFound"})
                return
            if hub.gated:
                self._send(hub.gated, {"X-Error-Code": "GatedRepo"})
                return
            data = repo.files[file]
            headers = {
                "X-Repo-Commit": repo.commit,
                "ETag": f'"{hub.etag or _etag(file, data)}"',
                "Accept-Ranges": "bytes",
            }
            if file.endswith(".safetensors"):
                headers["X-Linked-Etag"] = headers["ETag"]
                headers["X-Linked-Size"] = str(len(data))
            if self.command == "HEAD":
                self._send(200, {**headers, "Content-Length": str(len(data))})
                return
            if hub.flip[file] > 0:
                hub.flip[file] -= 1
                data = data[:-1] + bytes([data[-1] ^ 1])
            wanted = self.headers.get("Range")
            status, start = 200, 0
            if wanted and not hub.ignore_range:
                status, start = 206, int(wanted.removeprefix("bytes=").rstrip("-"))
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self._body(status, headers, file, data[start:])

        def _body(self, status: int, headers: dict[str, str], file: str, data: bytes) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            cut = hub.cut[file].pop(0) if hub.cut[file] else len(data)
            stall = hub.stall[file].pop(0) if hub.stall[file] else None
            piece = data[: cut if stall is None else stall]
            hub.sent[file] += len(piece)
            try:
                self.wfile.write(piece)
                self.wfile.flush()
                if stall is not None:
                    time.sleep(30)
            except (BrokenPipeError, ConnectionResetError):
                # The client gave up, which is what a stall is for.
                self.close_connection = True
            if cut < len(data) or stall is not None:
                self.close_connection = True

        def _send(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            if "Content-Length" not in headers:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Handler


def _sibling(repo: _Repo, file: str, data: bytes) -> dict[str, Any]:
    size = repo.claimed.get(file, len(data))
    entry: dict[str, Any] = {"rfilename": file, "size": size, "blobId": _blob_id(data)}
    if file.endswith(".safetensors"):
        entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": size, "pointerSize": 1}
    return entry


def _etag(file: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if file.endswith(".safetensors") else _blob_id(data)


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
