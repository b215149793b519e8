"""Web services of a target: `python -m tunesmith.job.services.manager --base DIR VERB NAME`.

LLaMA Board, the API and TensorBoard run detached, each bound to 127.0.0.1 with a record in
DIR/services/, so that any client can find it again. One JSON object is read from stdin (only by
start), one is printed; an error is {"error": ..., "detail": [...]} with exit code 1 or 2.

start NAME           start it, or reuse the running one
wait NAME [SECONDS]  report its state as soon as it is no longer starting
stop NAME [--force]  stop it; without --force not while a training started in the Board runs

Light like the agent: starts in a fraction of a second, without torch, on Python 3.10.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import http.client
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from tunesmith.core import isolated
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import locked, read_json, replacing, write_json
from tunesmith.job.run.listing import find
from tunesmith.job.run.process import Identity, identify
from tunesmith.job.services import access
from tunesmith.job.services.process_tree import board_training, end_tree
from tunesmith.job.services.records import (
    LOOPBACK,
    ServiceRecord,
    ServiceRequest,
    ServiceState,
)

# The usual port of each service, used if it is free.
PORTS = {"webui": 7860, "api": 8000, "tensorboard": 6006}
# The module of each service, and the path that answers 200 when it is ready.
MODULES = {"webui": "board", "api": "api", "tensorboard": "tensorboard"}
PATHS = {"webui": "/", "api": "/v1/models", "tensorboard": "/"}

# Prefix of the last line of a log if the service itself reports the error.
REFUSED = "refused: "

# Name of the folder of a service that is the only process of its container.
_PASSING = "tunesmith-"
_TAIL_LINES = 12
_SHORTEST_WAIT = 0.25


@dataclass(frozen=True)
class Service:
    """The files of one service below a base folder."""

    base: Path
    name: str

    @property
    def folder(self) -> Path:
        """The folder with the records of all services."""
        return self.base / "services"

    @property
    def record_file(self) -> Path:
        """The file with port, process and options."""
        return self.folder / f"{self.name}.json"

    @property
    def key_file(self) -> Path:
        """The file with the key for programs, including our own state requests."""
        return self.folder / f"{self.name}.key"

    @property
    def tokens(self) -> Path:
        """The folder with digests of the tokens for browsers, each valid once."""
        return self.folder / f"{self.name}.tokens"

    @property
    def log_file(self) -> Path:
        """Its output since the last start."""
        return self.folder / f"{self.name}.log"

    def record(self) -> ServiceRecord | None:
        """Return the record, None if there is none or it is incomplete."""
        return ServiceRecord.read_or_none(self.record_file)

    def process(self) -> Identity | None:
        """Return the process of the record if it is alive."""
        record = self.record()
        process = record.process if record else None
        return process if process and process.alive() else None

    def key(self) -> str | None:
        """Return the key, None if the service was not started, or by a version without keys."""
        return self.key_file.read_text(encoding="utf-8") if self.key_file.is_file() else None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Let one client at a time start or stop it; the kernel releases the lock of a dead one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)  # it contains keys and logs, whoever created it
        lock = os.open(self.folder / f".{self.name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def start(service: Service, request: ServiceRequest) -> ServiceState:
    """Start a service in its own session, or reuse the running one; return its state.

    Raises UsageError if the running one serves something else.
    """
    with service.locked():
        request = _resolved(request)
        reused = service.process() is not None
        if reused:
            record = service.record()
            serves = record.serves if record else {}
            if serves != request.serves:
                raise UsageError(f"serves {_words(serves)}")
        _merge_datasets(request)
        if reused:
            _admit(service, request)
        else:
            _spawn(service, request)
        answer = state(service)
        answer["reused"], answer["key"] = reused, service.key()
        return answer


def state(service: Service) -> ServiceState:
    """Return the state of a service: absent, starting, ready or ended."""
    record = service.record()
    if record is None:
        return {"name": service.name, "state": "absent", "training": None}
    owner = service.process()
    answer: ServiceState = {
        "name": service.name,
        "port": record.port,
        "serves": record.serves,
        "version": record.version,
        "log": str(service.log_file),
        "training": None,
    }
    if owner is None:
        answer["state"], answer["tail"] = "ended", tail(service.log_file)
        return answer
    port = record.port
    # While it loads, another user may have taken the port and would receive the key.
    ours = access.holders(port) == {os.getuid()}
    ready = ours and http_status(port, PATHS[service.name], service.key()) == 200
    answer["state"] = "ready" if ready else "starting"
    answer["training"] = board_training(owner.pid)
    return answer


def wait(service: Service, seconds: float) -> ServiceState:
    """Return `state` once it is no longer starting, after `seconds` at the latest."""
    deadline = time.monotonic() + seconds
    while True:
        answer = state(service)
        if answer["state"] != "starting" or time.monotonic() >= deadline:
            return answer
        time.sleep(_SHORTEST_WAIT)


def stop(service: Service, *, force: bool) -> ServiceState:
    """Stop a service and all its processes.

    Without `force` a service with a training keeps running; the returned state is then `kept`.
    """
    with service.locked():
        owner = service.process()
        busy = board_training(owner.pid) if owner else None
        if busy and not force:
            answer = state(service)
            answer["state"] = "kept"
            return answer
        if owner:
            end_tree(owner.pid)
        died = service.record() is not None
        service.record_file.unlink(missing_ok=True)
        _forget_secrets(service)
        word = "stopped" if owner else "ended" if died else "absent"
        return {"name": service.name, "state": word, "training": busy}


def http_status(port: int, path: str, key: str | None = None, timeout: float = 5.0) -> int | None:
    """Return the status of GET http://127.0.0.1:port/path, None if nothing answers.

    The key is sent because a service answers nobody without it. Proxies of the environment are
    ignored.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=timeout)
    try:
        connection.request("GET", path, headers=headers)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def free_port() -> int:
    """Return a port that is currently free on loopback."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def tail(log: Path) -> list[str]:
    """Return the last non-empty lines of a log."""
    try:
        text = log.read_bytes()[-16_000:].decode("utf-8", "replace")
    except FileNotFoundError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-_TAIL_LINES:]


def gate(record_file: Path, *, browser: bool) -> access.Gate:
    """Return the gate of a record's service; with `browser` tokens grant access, too.

    Raises UsageError without a key: the service would be open to anybody who reaches its port.
    """
    record = ServiceRecord.read(record_file)
    name = record.name
    service = Service(record_file.parent.parent, name)
    key = service.key()
    if not key:
        raise UsageError(f"{name} was started without a key; `inv {name}` creates one")
    hint = record.hint or f"`inv {name}` (with `--on` for a host) prints a new address"
    names = access.names_of(record.listen, record.allowed)
    # An address other than loopback occurs only in a container.
    remedy = "" if record.listen == LOOPBACK else f"; `-e {access.ALLOWED}=NAME` adds one"
    return access.Gate(names, key, service.tokens if browser else None, hint, remedy)


def serve_record(serve: Callable[[Path], None]) -> int:
    """Run a service: call `serve` with the record on the command line; return the exit code.

    An error of the service becomes the last line of its log, where clients find it.
    """
    try:
        serve(Path(sys.argv[1]))
    except TunesmithError as error:
        print(f"{REFUSED}{error.line}")
        return error.exit_code
    return 0


def _resolved(request: ServiceRequest) -> ServiceRequest:
    """Return a request with the run's folder in `settings` and its id in `serves`."""
    if not request.of_run:
        return request
    run = find(Path(request.settings["runs"]), request.run)
    return replace(
        request,
        serves={**request.serves, "run": run.run_id},
        settings={**request.settings, "run": str(run.path)},
    )


def serve_here(name: str, request: ServiceRequest, *, base: Path, listen: str, port: int) -> None:
    """Run a service in this process until it ends, as the only process of a container.

    `listen` is its address: ports published by Docker do not reach a container's loopback. Its
    record has a separate folder, because `base` may contain the record of a service that runs
    outside the container. Raises the errors of the service.
    """
    request = _resolved(request)
    with tempfile.TemporaryDirectory(prefix=_PASSING) as folder:
        service = Service(Path(folder), name)
        _keep_key(service, request)
        record = replace(
            _record(service, request),
            base=str(base),
            listen=listen,
            port=port,
            allowed=request.allowed,
            hint=request.hint,
            process=identify(),
        )
        record.write(service.record_file)
        os.environ.update(_environment())
        importlib.import_module(f"tunesmith.job.services.{MODULES[name]}").serve(
            service.record_file
        )


def served_here(name: str) -> Service | None:
    """Return the service that `serve_here` runs in this container, None if it does not run."""
    for file in Path(tempfile.gettempdir()).glob(f"{_PASSING}*/services/{name}.json"):
        service = Service(file.parent.parent, name)
        if file.stat().st_uid == os.getuid() and service.process() is not None:
            return service
    return None


def _record(service: Service, request: ServiceRequest) -> ServiceRecord:
    """Return the record for a service's module. A request can never open more than loopback."""
    return ServiceRecord(
        name=service.name,
        port=free_port(),
        base=str(service.base),
        listen=LOOPBACK,
        serves=request.serves,
        settings=request.settings,
        version=metadata.version("llamafactory"),
        started=time.time(),
    )


def _keep_key(service: Service, request: ServiceRequest) -> None:
    """Store the key and the tokens where only the owner can read them, never in argv, environment
    or record. Those of an earlier start are deleted."""
    _forget_secrets(service)
    if request.key:
        with replacing(service.key_file) as part:
            part.chmod(0o600)  # while it is still empty
            part.write_text(request.key, encoding="utf-8")
    _admit(service, request)


def _admit(service: Service, request: ServiceRequest) -> None:
    for token in request.tokens:
        access.admit(service.tokens, str(token))


def _forget_secrets(service: Service) -> None:
    service.key_file.unlink(missing_ok=True)
    shutil.rmtree(service.tokens, ignore_errors=True)


def _spawn(service: Service, request: ServiceRequest) -> None:
    _keep_key(service, request)
    record = _record(service, request)
    # Before the process starts, which reads the port from it.
    record.write(service.record_file)
    module = f"tunesmith.job.services.{MODULES[service.name]}"
    argv = isolated.argv(
        sys.executable, module, str(service.record_file), options=isolated.UNBUFFERED
    )
    with service.log_file.open("wb") as log:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=service.folder,
            env=_environment(),
            start_new_session=True,
        )
    replace(record, process=identify(process.pid)).write(service.record_file)


def _environment() -> dict[str, str]:
    """Return a service's environment variables: no telemetry, no proxy for loopback, and its own
    environment's programs first on PATH (the Board starts llamafactory-cli from there)."""
    bare = f"localhost,{LOOPBACK}"
    variables = isolated.variables(os.environ)
    return {
        **variables,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), variables["PATH"]]),
        "PYTHONUNBUFFERED": "1",
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_SHARE": "0",
        "GRADIO_SERVER_NAME": LOOPBACK,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "no_proxy": bare,
        "NO_PROXY": bare,
    }


def _merge_datasets(request: ServiceRequest) -> None:
    """Register the client's data sets in dataset_info.json; other entries stay."""
    entries = request.datasets
    if not entries:
        return
    file = Path(request.settings["data"]) / "dataset_info.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    with locked(file):
        try:
            registry = read_json(file) if file.exists() else {}
        except ValueError as error:
            raise UsageError(f"{file}: not JSON ({error}); repair or delete it") from None
        if not isinstance(registry, dict):
            raise UsageError(f"{file}: expected data sets by name, found {type(registry).__name__}")
        if {**registry, **entries} != registry:
            write_json(file, {**registry, **entries})


def _words(serves: Mapping[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in serves.items()) or "nothing"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, print the answer, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tunesmith.job.services.manager", description=__doc__
    )
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("verb", choices=("start", "wait", "stop"))
    parser.add_argument("name")
    parser.add_argument("seconds", type=float, nargs="?", default=0.0)
    parser.add_argument("--force", action="store_true")
    options = parser.parse_args(argv)
    # Records contain requests, and keys are stored beside them.
    os.umask(0o077)
    try:
        answer = _answer(options)
    except TunesmithError as error:
        print(json.dumps({"error": error.line, "detail": list(error.detail)}))
        return error.exit_code
    print(json.dumps(answer, ensure_ascii=False))
    return 0


def _answer(options: argparse.Namespace) -> ServiceState:
    if options.name not in MODULES:
        raise UsageError(f"no service {options.name!r}; choose from: {', '.join(MODULES)}")
    service = Service(options.base, options.name)
    if options.verb == "start":
        return start(service, ServiceRequest.of(json.load(sys.stdin)))
    if options.verb == "stop":
        return stop(service, force=options.force)
    return wait(service, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
