"""One endpoint: whether it is reachable, and a process that talks to it.

Standard library, Python 3.10. The process is `tunesmith.basemodel.hub_client`.
"""

from __future__ import annotations

import json
import os
import queue
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

from tunesmith.basemodel.files import FileRecord
from tunesmith.basemodel.judge import Seen, require_trainable
from tunesmith.basemodel.kinds import Kind
from tunesmith.core import formats, isolated
from tunesmith.core.documents import JsonObject
from tunesmith.core.errors import UsageError
from tunesmith.core.mirrors import Mirror

OFFICIAL = "https://huggingface.co"

_TICK = 0.25
_SECRETS = re.compile(r"hf_[A-Za-z0-9]{8,}|(?<=://)[^/\s@]+(?=@)")


@dataclass(frozen=True)
class Patience:
    """Timeouts in seconds; after `attempts` in a row without a new byte a source is given up."""

    connect: float = 5.0
    listing: float = 45.0
    stall: float = 60.0
    pause: float = 1.0
    attempts: int = 6


class SourceError(Exception):
    """A source could not provide the model.

    `kind`: unreachable, gated, token, no_model, forbidden, busy, cut, broken, pickle,
    checksum, disk or unfit. `text` describes what happened.
    """

    def __init__(
        self, kind: str, text: str, *, retry: bool = False, after: float | None = None
    ) -> None:
        super().__init__(text)
        self.kind = kind
        self.text = scrub(text)
        self.retry = retry
        self.after = after


@dataclass(frozen=True)
class DownloadSpec:
    """What to download and how. `token` is sent only to `OFFICIAL`, unless opted in."""

    name: str
    revision: str
    pins: Mapping[str, FileRecord]
    mirror: Mirror
    hf_home: Path
    token: str | None
    allow_pickle: bool
    limits: Patience
    # Told of a model's small files before the weights are fetched; raises UsageError to refuse.
    judge: Callable[[Seen], object] = require_trainable
    kind: Kind = "model"

    @property
    def storage(self) -> Path:
        """The model's folder in huggingface_hub's cache."""
        return self.hf_home / "hub" / f"models--{self.name.replace('/', '--')}"


def scrub(text: str) -> str:
    """Return `text` without tokens and without passwords in URLs."""
    return _SECRETS.sub("***", text)


def reach(endpoint: str, mirror: Mirror, seconds: float) -> None:
    """Raise SourceError unless a TCP connection to the endpoint, or its proxy, succeeds.

    In a thread with one deadline: name resolution and each address have separate timeouts, so a
    blocked hub would cost minutes.
    """
    parts = urlsplit(endpoint)
    proxy = mirror.http_proxy or urllib.request.getproxies().get(parts.scheme)
    host = parts.hostname or ""
    if proxy and host != "127.0.0.1" and not urllib.request.proxy_bypass(host):
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    faults: queue.Queue[str] = queue.Queue()

    def connect() -> None:
        try:
            socket.create_connection((parts.hostname or "", port), timeout=seconds).close()
        except socket.gaierror:
            faults.put(f"the name {parts.hostname} cannot be resolved: no network, or no DNS")
        except TimeoutError:
            faults.put(f"no answer from {parts.hostname}:{port} within {formats.duration(seconds)}")
        except OSError as error:
            faults.put(f"no connection to {parts.hostname}:{port} ({error.strerror or error})")
        else:
            faults.put("")

    threading.Thread(target=connect, daemon=True).start()
    try:
        fault = faults.get(timeout=seconds)
    except queue.Empty:
        fault = f"no answer from {parts.hostname}:{port} within {formats.duration(seconds)}"
    if fault:
        raise SourceError("unreachable", fault)


class Worker:
    """A `tunesmith.basemodel.hub_client` process for one endpoint; ends with the `with` block."""

    def __init__(self, order: DownloadSpec, endpoint: str) -> None:
        self._said: queue.Queue[str | None] = queue.Queue()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        self._process = subprocess.Popen(
            isolated.argv(sys.executable, "tunesmith.basemodel.hub_client", options=("-X", "utf8")),
            cwd=isolated.NOWHERE,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=_environment(order, endpoint),
            text=True,
        )
        threading.Thread(target=self._read, daemon=True).start()
        self._send(
            {
                "endpoint": endpoint,
                "name": order.name,
                "revision": order.revision,
                "cache": str(order.hf_home.absolute() / "hub"),
                "timeout": order.limits.listing / 2,
                # Not in the environment, which child processes inherit.
                "token": order.token,
            }
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._stderr.close()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def await_listing(self, seconds: float) -> JsonObject:
        """Return the endpoint's list of the model's files."""
        until = time.monotonic() + seconds
        for event in self.events():
            if event and "listing" in event:
                return dict(event["listing"])
            if time.monotonic() > until:
                break
        raise SourceError("cut", f"no list of files within {formats.duration(seconds)}", retry=True)

    def take(self, names: Sequence[str]) -> None:
        """Request the download of these files."""
        self._send({"files": list(names)})

    def events(self) -> Iterator[JsonObject | None]:
        """Yield its messages, None after each quarter second without one; end with "done".

        Raises SourceError if it reports an error or dies.
        """
        while True:
            try:
                line = self._said.get(timeout=_TICK)
            except queue.Empty:
                yield None
                continue
            if line is None:
                raise self._death()
            event: JsonObject = json.loads(line)
            if error := event.get("error"):
                raise SourceError(
                    error["kind"], error["text"], retry=error["retry"], after=error["after"]
                )
            yield event
            if event.get("done"):
                return

    def _send(self, value: JsonObject) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(value) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            # It died; events() raises the reason from its last message or stderr.
            return

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._said.put(line)
        self._said.put(None)

    def _death(self) -> SourceError:
        code = self._process.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        last = lines[-1] if lines else "no message"
        return SourceError("broken", f"the download process ended with code {code}: {last}")


def _environment(order: DownloadSpec, endpoint: str) -> dict[str, str]:
    """Return a worker's environment: the user's, without variables of huggingface_hub.

    Xet is off for every endpoint: it only gets a token there and then downloads from its own host
    (huggingface_hub#4475), bypassing the mirror, and its partial files cannot be resumed.
    hf_transfer, which deletes partial files, is removed with the other HF_* variables.
    """
    variables = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("HF_", "HUGGINGFACE", "HUGGING_FACE", "PYTHON"))
    }
    seconds = str(max(1, int(min(30, order.limits.stall / 2))))
    variables |= {
        "HF_HOME": str(order.hf_home.absolute()),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": seconds,
        "HF_HUB_ETAG_TIMEOUT": seconds,
        # requests would send a password of ~/.netrc to an endpoint listed there.
        "NETRC": os.devnull,
    }
    return variables | network_environment(order.mirror)


def network_environment(mirror: Mirror) -> dict[str, str]:
    """Return the variables of a mirror's proxy and certificate authorities.

    Raises UsageError if the CA bundle does not exist.
    """
    variables: dict[str, str] = {}
    if mirror.http_proxy:
        for key in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            variables[key] = mirror.http_proxy
    if mirror.ca_bundle:
        if not mirror.ca_bundle.is_file():
            raise UsageError(
                f"configs/mirrors/{mirror.name}.yml: `ca_bundle`: no file {mirror.ca_bundle}"
            )
        for key in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"):
            variables[key] = str(mirror.ca_bundle)
    return variables


def token_of(hf_home: Path) -> str | None:
    """Return the user's token, from where huggingface_hub looks for it."""
    for key in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if token := os.environ.get(key, "").strip():
            return token
    named = os.environ.get("HF_TOKEN_PATH")
    # Where `hf auth login` puts it, though our cache may lie elsewhere.
    usual = Path.home() / ".cache" / "huggingface" / "token"
    for path in (Path(named) if named else None, hf_home / "token", usual):
        if path and path.is_file() and (token := path.read_text(encoding="utf-8").strip()):
            return token
    return None
