"""Web services of a target: `python -m tunesmith.job.services.manager --base DIR VERB NAME`.

LLaMA Board, the API and TensorBoard run detached, each bound to 127.0.0.1 with a record in
DIR/services/, so that any client can find it again. One JSON object is read from stdin (start
only), one is printed; an error is {"error": ..., "detail": [...]} with exit code 1 or 2.

start NAME           start it, or take the one that lives
wait NAME [SECONDS]  say how it is, as soon as it no longer starts
stop NAME [--force]  end it; a training started in the Board keeps it, unless forced

Light as the agent: up in a fraction of a second, without torch, on Python 3.10.
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

# The port people know each by, where it is free.
PORTS = {"webui": 7860, "api": 8000, "tensorboard": 6006}
# Module that serves each, and the path that answers 200 when it is up.
MODULES = {"webui": "board", "api": "api", "tensorboard": "tensorboard"}
PATHS = {"webui": "/", "api": "/v1/models", "tensorboard": "/"}

# What the last line of a log begins with when the service itself knows what is wrong.
REFUSED = "refused: "

# Folder of a service that is the only process of its container, in the folder for such.
_PASSING = "tunesmith-"
_TAIL_LINES = 12
_SHORTEST_WAIT = 0.25


@dataclass(frozen=True)
class Service:
    """Names of the files of one service below a base folder."""

    base: Path
    name: str

    @property
    def folder(self) -> Path:
        """Where all services have their records."""
        return self.base / "services"

    @property
    def record_file(self) -> Path:
        """Port, process, and what it was started with."""
        return self.folder / f"{self.name}.json"

    @property
    def key_file(self) -> Path:
        """The key that opens it to programs; ours too, when they ask how it is."""
        return self.folder / f"{self.name}.key"

    @property
    def tokens(self) -> Path:
        """Digests of the tokens that open it to a browser, each once."""
        return self.folder / f"{self.name}.tokens"

    @property
    def log_file(self) -> Path:
        """Its output since the last start."""
        return self.folder / f"{self.name}.log"

    def record(self) -> ServiceRecord | None:
        """Return the record, or None when there is none (or only half of one)."""
        return ServiceRecord.read_or_none(self.record_file)

    def process(self) -> Identity | None:
        """Return the process of the record while it lives."""
        record = self.record()
        process = record.process if record else None
        return process if process and process.alive() else None

    def key(self) -> str | None:
        """Return the key, or None when there is none: not started, or by a version without."""
        return self.key_file.read_text(encoding="utf-8") if self.key_file.is_file() else None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Let one client at a time start or stop it; the kernel lets go when that one dies."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)  # keys and logs are in it, whoever made the folder
        lock = os.open(self.folder / f".{self.name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def start(service: Service, request: ServiceRequest) -> ServiceState:
    """Start a service in a session of its own, or reuse the running one; return its state.

    Raises UsageError when the running one serves something else.
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
    """Return how a service is: absent, starting, ready or ended."""
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
    # While it loads, somebody else may have taken the port, and would be shown its key.
    ours = access.holders(port) == {os.getuid()}
    ready = ours and http_status(port, PATHS[service.name], service.key()) == 200
    answer["state"] = "ready" if ready else "starting"
    answer["training"] = board_training(owner.pid)
    return answer


def wait(service: Service, seconds: float) -> ServiceState:
    """Return `state` as soon as it is no longer starting, after `seconds` at the latest."""
    deadline = time.monotonic() + seconds
    while True:
        answer = state(service)
        if answer["state"] != "starting" or time.monotonic() >= deadline:
            return answer
        time.sleep(_SHORTEST_WAIT)


def stop(service: Service, *, force: bool) -> ServiceState:
    """End a service with all its processes.

    Unless forced, one with a training in it stays: the answer's state is then `kept`.
    """
    with service.locked():
        owner = service.process()
        busy = board_training(owner.pid) if owner else None
        if busy and not force:
            kept = state(service)
            kept["state"] = "kept"
            return kept
        if owner:
            end_tree(owner.pid)
        died = service.record() is not None
        service.record_file.unlink(missing_ok=True)
        _forget_secrets(service)
        word = "stopped" if owner else "ended" if died else "absent"
        return {"name": service.name, "state": word, "training": busy}


def http_status(port: int, path: str, key: str | None = None, timeout: float = 5.0) -> int | None:
    """Return the status of GET http://127.0.0.1:port/path, or None when nothing answers.

    With the key, as without one a service answers nobody. Straight to the port, whatever proxy
    the environment names.
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
    """Return a port that is free on loopback now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def tail(log: Path) -> list[str]:
    """Return the last lines of a log that say something."""
    try:
        text = log.read_bytes()[-16_000:].decode("utf-8", "replace")
    except FileNotFoundError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-_TAIL_LINES:]


def gate(record_file: Path, *, browser: bool) -> access.Gate:
    """Return what stands before the service of a record; `browser`: tokens open it, too.

    Raises UsageError without a key: it would serve anybody who reaches its port.
    """
    record = ServiceRecord.read(record_file)
    name = record.name
    service = Service(record_file.parent.parent, name)
    key = service.key()
    if not key:
        raise UsageError(f"{name} was started without a key; `inv {name}` makes one")
    hint = record.hint or f"`inv {name}` (with `--on` for a host's) tells the way in"
    names = access.names_of(record.listen, record.allowed)
    # Where another address than loopback leads there, it is one of a container.
    remedy = "" if record.listen == LOOPBACK else f"; `-e {access.ALLOWED}=NAME` adds one"
    return access.Gate(names, key, service.tokens if browser else None, hint, remedy)


def serve_record(serve: Callable[[Path], None]) -> int:
    """Run a service's process: `serve` the record named on the command line; return exit code.

    A client finds what the service refuses as the last line of its log.
    """
    try:
        serve(Path(sys.argv[1]))
    except TunesmithError as error:
        print(f"{REFUSED}{error.line}")
        return error.exit_code
    return 0


def _resolved(request: ServiceRequest) -> ServiceRequest:
    """Return a request with the run's folder in its settings and its id in what is served."""
    if not request.of_run:
        return request
    run = find(Path(request.settings["runs"]), request.run)
    return replace(
        request,
        serves={**request.serves, "run": run.run_id},
        settings={**request.settings, "run": str(run.path)},
    )


def serve_here(name: str, request: ServiceRequest, *, base: Path, listen: str, port: int) -> None:
    """Be a service in this process until it ends: the only one of a container, whose log is ours.

    `listen` is the address of its port: what Docker publishes does not reach a container's
    loopback. Its record lies in a folder of its own: in `base` there may be one of a service
    outside the container, which goes on. Raises what the service refuses.
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
    """Return the service of this container that `serve_here` is, or None: it does not run."""
    for file in Path(tempfile.gettempdir()).glob(f"{_PASSING}*/services/{name}.json"):
        service = Service(file.parent.parent, name)
        if file.stat().st_uid == os.getuid() and service.process() is not None:
            return service
    return None


def _record(service: Service, request: ServiceRequest) -> ServiceRecord:
    """Return what a service's module reads. Nothing in a request opens more than loopback."""
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
    """Keep the key and the tokens where only the owner reads them: never in argv, environment
    or record. Those of an earlier start are gone."""
    _forget_secrets(service)
    if request.key:
        with replacing(service.key_file) as part:
            part.chmod(0o600)  # before there is anything in it
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
    # Before its process: that reads the port from it.
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
    """Return the environment of a service: nothing sent home, no proxy before loopback, and
    the programs of its own environment first (the Board starts llamafactory-cli from PATH)."""
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
    """Register the client's data sets in dataset_info.json; those of others stay."""
    entries = request.datasets
    if not entries:
        return
    file = Path(request.settings["data"]) / "dataset_info.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    with locked(file):
        try:
            known = read_json(file) if file.exists() else {}
        except ValueError as error:
            raise UsageError(f"{file}: not JSON ({error}); repair or delete it") from None
        if not isinstance(known, dict):
            raise UsageError(f"{file}: expected data sets by name, found {type(known).__name__}")
        if {**known, **entries} != known:
            write_json(file, {**known, **entries})


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
    # Records hold what was requested, and a key lies beside them.
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
        raise UsageError(f"no service {options.name!r}; these are: {', '.join(MODULES)}")
    service = Service(options.base, options.name)
    if options.verb == "start":
        return start(service, ServiceRequest.of(json.load(sys.stdin)))
    if options.verb == "stop":
        return stop(service, force=options.force)
    return wait(service, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
