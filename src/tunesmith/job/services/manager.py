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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from tunesmith.core import isolated
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import locked, read_json, replacing, write_json
from tunesmith.job.run.listing import find
from tunesmith.job.run.process import Identity, identify
from tunesmith.job.services import access
from tunesmith.job.services.process_tree import command_of, descendants, end_tree

LOOPBACK = "127.0.0.1"
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

    def record(self) -> dict[str, Any] | None:
        """Return the record, or None when there is none (or only half of one)."""
        try:
            value = read_json(self.record_file)
        except (FileNotFoundError, ValueError):
            return None
        return value if isinstance(value, dict) and "port" in value else None

    def process(self) -> Identity | None:
        """Return the process of the record while it lives."""
        record = self.record()
        if record is None or not record.get("process"):
            return None
        found = Identity.from_json(record["process"])
        return found if found.alive() else None

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


def start(service: Service, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Start a service in a session of its own, or take the living one, and return `state`.

    `asked` has `serves` (what a client must get: a living service that serves something else
    is refused), `settings` (what its module reads from the record), `key` (what opens it to
    programs), `tokens` (each opens it to one browser), `datasets` (entries to merge into
    dataset_info.json) and `run` (id; null: the newest).
    """
    with service.locked():
        asked = _resolved(asked)
        if service.process() is not None:
            record = service.record() or {}
            if record.get("serves") != asked["serves"]:
                raise UsageError(f"serves {_words(record.get('serves'))}")
            _merge_datasets(asked)
            _admit(service, asked)
            return state(service) | {"reused": True, "key": service.key()}
        _merge_datasets(asked)
        _spawn(service, asked)
        return state(service) | {"reused": False, "key": service.key()}


def state(service: Service) -> dict[str, Any]:
    """Return how a service is, as a client is told.

    `state` is absent (never started, or stopped), starting, ready or ended (it died); `log`
    the path of its log and `tail` the last lines of it; `training` what runs in the Board.
    """
    record = service.record()
    if record is None:
        return {"name": service.name, "state": "absent", "training": None}
    owner = service.process()
    said: dict[str, Any] = {
        "name": service.name,
        "port": record["port"],
        "serves": record.get("serves") or {},
        "version": record.get("version"),
        "log": str(service.log_file),
        "training": None,
    }
    if owner is None:
        return said | {"state": "ended", "tail": tail(service.log_file)}
    port = int(record["port"])
    # While it loads, somebody else may have taken the port, and would be shown its key.
    ours = access.holders(port) == {os.getuid()}
    answered = ours and http_status(port, PATHS[service.name], service.key()) == 200
    return said | {"state": "ready" if answered else "starting", "training": training(owner.pid)}


def wait(service: Service, seconds: float) -> dict[str, Any]:
    """Return `state` as soon as it is no longer starting, after `seconds` at the latest."""
    deadline = time.monotonic() + seconds
    while True:
        said = state(service)
        if said["state"] != "starting" or time.monotonic() >= deadline:
            return said
        time.sleep(_SHORTEST_WAIT)


def stop(service: Service, *, force: bool) -> dict[str, Any]:
    """End a service with all its processes.

    Unless forced, one with a training in it stays: the answer's state is then `kept`.
    """
    with service.locked():
        owner = service.process()
        busy = training(owner.pid) if owner else None
        if busy and not force:
            return state(service) | {"state": "kept"}
        if owner:
            end_tree(owner.pid)
        there = service.record() is not None
        service.record_file.unlink(missing_ok=True)
        _forget_secrets(service)
        word = "stopped" if owner else "ended" if there else "absent"
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


def training(pid: int) -> dict[str, Any] | None:
    """Return what a Board trains: `pid` and `folder` of its output, or None.

    The Board starts `llamafactory-cli train FOLDER/training_args.yaml` (webui/runner.py,
    0.9.3), for evaluations too.
    """
    for child in descendants(pid):
        words = command_of(child)
        if "train" in words and any(Path(word).name == "llamafactory-cli" for word in words):
            return {"pid": child, "folder": str(Path(words[-1]).parent)}
    return None


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
    record = read_json(record_file)
    name = str(record["name"])
    service = Service(record_file.parent.parent, name)
    key = service.key()
    if not key:
        raise UsageError(f"{name} was started without a key; `inv {name}` makes one")
    hint = record.get("hint") or f"`inv {name}` (with `--on` for a host's) tells the way in"
    names = access.names_of(str(record["listen"]), record.get("allowed") or ())
    # Where another address than loopback leads there, it is one of a container.
    remedy = "" if record["listen"] == LOOPBACK else f"; `-e {access.ALLOWED}=NAME` adds one"
    return access.Gate(names, key, service.tokens if browser else None, hint, remedy)


def refused(error: TunesmithError) -> int:
    """End a service's process: its client finds the message as the last line of the log."""
    print(f"{REFUSED}{error.line}")
    return error.exit_code


def _resolved(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return `asked` with the run's folder in its settings and its id in what is served."""
    if "run" not in asked:
        return dict(asked)
    run = find(Path(asked["settings"]["runs"]), asked["run"])
    return {
        **asked,
        "serves": {**asked["serves"], "run": run.run_id},
        "settings": {**asked["settings"], "run": str(run.path)},
    }


def serve_here(name: str, asked: Mapping[str, Any], *, base: Path, listen: str, port: int) -> None:
    """Be a service in this process until it ends: the only one of a container, whose log is ours.

    `asked` is that of `start`, with `allowed` (further names of its Host) and `hint` (how one
    gets in). `listen` is the address of its port: what Docker publishes does not reach a
    container's loopback. Its record lies in a folder of its own: in `base` there
    may be one of a service outside, which goes on. Raises what the service refuses.
    """
    asked = _resolved(asked)
    with tempfile.TemporaryDirectory(prefix=_PASSING) as folder:
        service = Service(Path(folder), name)
        _keep_key(service, asked)
        record = _record(service, asked)
        here = {"base": str(base), "listen": listen, "port": port}
        here |= {"allowed": list(asked.get("allowed", ())), "hint": asked.get("hint")}
        here |= {"process": identify().to_json()}
        write_json(service.record_file, record | here)
        os.environ.update(_environment())
        importlib.import_module(f"tunesmith.job.services.{MODULES[name]}").serve(
            service.record_file
        )


def served_here(name: str) -> Service | None:
    """Return the service of this container that `serve_here` is, or None: it does not run."""
    for file in Path(tempfile.gettempdir()).glob(f"{_PASSING}*/services/{name}.json"):
        found = Service(file.parent.parent, name)
        if file.stat().st_uid == os.getuid() and found.process() is not None:
            return found
    return None


def _record(service: Service, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a service's module reads. Nothing in `asked` opens more than loopback."""
    return {
        "name": service.name,
        "base": str(service.base),
        "listen": LOOPBACK,
        "port": free_port(),
        "process": None,
        "serves": asked["serves"],
        "settings": asked["settings"],
        "version": metadata.version("llamafactory"),
        "started": time.time(),
    }


def _keep_key(service: Service, asked: Mapping[str, Any]) -> None:
    """Keep the key and the tokens where only the owner reads them: never in argv, environment
    or record. Those of an earlier start are gone."""
    _forget_secrets(service)
    if asked.get("key"):
        with replacing(service.key_file) as part:
            part.chmod(0o600)  # before there is anything in it
            part.write_text(str(asked["key"]), encoding="utf-8")
    _admit(service, asked)


def _admit(service: Service, asked: Mapping[str, Any]) -> None:
    for token in asked.get("tokens") or ():
        access.admit(service.tokens, str(token))


def _forget_secrets(service: Service) -> None:
    service.key_file.unlink(missing_ok=True)
    shutil.rmtree(service.tokens, ignore_errors=True)


def _spawn(service: Service, asked: Mapping[str, Any]) -> None:
    _keep_key(service, asked)
    record = _record(service, asked)
    # Before its process: that reads the port from it.
    write_json(service.record_file, record)
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
    write_json(service.record_file, record | {"process": identify(process.pid).to_json()})


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


def _merge_datasets(asked: Mapping[str, Any]) -> None:
    """Bring the client's entries into dataset_info.json; those of others stay."""
    entries = asked.get("datasets")
    if not entries:
        return
    file = Path(asked["settings"]["data"]) / "dataset_info.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    with locked(file):
        try:
            known = read_json(file) if file.exists() else {}
        except ValueError as error:
            raise UsageError(f"{file}: not JSON ({error}); mend or remove it there") from None
        if not isinstance(known, dict):
            raise UsageError(f"{file}: expected data sets by name, found {type(known).__name__}")
        if {**known, **entries} != known:
            write_json(file, {**known, **entries})


def _words(serves: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{key} {value}" for key, value in (serves or {}).items()) or "nothing"


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
    # Records hold what was asked, and a key lies beside them.
    os.umask(0o077)
    try:
        answer = _answer(options)
    except TunesmithError as error:
        print(json.dumps({"error": error.line, "detail": list(error.detail)}))
        return error.exit_code
    print(json.dumps(answer, ensure_ascii=False))
    return 0


def _answer(options: argparse.Namespace) -> dict[str, Any]:
    if options.name not in MODULES:
        raise UsageError(f"no service {options.name!r}; these are: {', '.join(MODULES)}")
    service = Service(options.base, options.name)
    if options.verb == "start":
        return start(service, json.load(sys.stdin))
    if options.verb == "stop":
        return stop(service, force=options.force)
    return wait(service, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
