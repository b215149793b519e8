"""The web services of a target, from this side: what is asked of tunesmith.job.services.manager."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Protocol

from tunesmith.core import files as core_files
from tunesmith.core import formats, isolated
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import read_json
from tunesmith.hosts import layout, replies, transfer
from tunesmith.hosts.answers import Asked, parse_json
from tunesmith.hosts.remote import Remote
from tunesmith.job.run.replies import Refusal
from tunesmith.job.services.manager import PORTS, REFUSED
from tunesmith.project import Project
from tunesmith.stack.sources import app_digest

Tell = Callable[[str], None]

# A service is waited for in pieces, each one command, so that Ctrl-C is answered soon.
_PIECE_SECONDS = 5
_REGISTRY = "dataset_info.json"


@dataclass(frozen=True)
class Kind:
    """A service: what people call it, its task, the local port people know it by.

    `patience` is the longest time from start to answer, in seconds: a cold disk reads
    gigabytes of libraries first, and the API its model.
    """

    name: str
    title: str
    port: int
    patience: float
    path: str
    browsed: bool
    """Opened by an address with a token; else by the key alone."""


KINDS = {
    "webui": Kind("webui", "LLaMA Board", PORTS["webui"], 300.0, "/", browsed=True),
    "api": Kind("api", "the API", PORTS["api"], 900.0, "/v1/models", browsed=False),
    "tensorboard": Kind(
        "tensorboard", "TensorBoard", PORTS["tensorboard"], 300.0, "/", browsed=True
    ),
}
# What we make ourselves; a host's answer goes into a header and onto the screen.
_KEY = re.compile(r"[A-Za-z0-9_-]{43,128}")


@dataclass(frozen=True)
class Folders:
    """Folders of a target, as paths of its own."""

    base: PurePath
    data: PurePath
    models: PurePath
    runs: PurePath

    def settings(self) -> dict[str, str]:
        """Return what every service's module reads."""
        return {
            "data": str(self.data),
            "models": str(self.models),
            "runs": str(self.runs),
        }


class Place(Protocol):
    """A target that services run on."""

    name: str
    folders: Folders
    remote: Remote | None
    """How its ports are reached; None: they are this machine's."""
    mends: str
    """The command that makes a broken environment whole."""

    def ask(self, verb: str, *words: str, body: Any = None, timeout: float = 60) -> dict[str, Any]:
        """Ask tunesmith.job.services.manager there. Raises what it refused with."""
        ...

    def bring_data(self, tell: Tell) -> Mapping[str, Any]:
        """Bring the data sets of this clone there; return entries to register there."""
        ...

    def bring_packages(self, folder: Path, tell: Tell) -> PurePath:
        """Bring a folder of packages there; return where it is."""
        ...


class HostPlace:
    """A provisioned host, with conda or a container of the image.

    Raises UsageError when it is not, or has other sources than we: those may only end things.
    """

    def __init__(self, project: Project, name: str, *, ending: bool = False) -> None:
        self.name = name
        self.remote: Remote | None = Remote(name, project.inventory)
        self.mends = f"`inv provision --on {name}`"
        self._remote = self.remote
        self._project = project
        self._layout = layout.look(self._remote)
        other = self._layout.app != core_files.short_digest(app_digest(project.root))
        if self._layout.app and other and not ending:
            raise UsageError(
                f"{name} has other sources of tunesmith than this clone; `inv provision --on "
                f"{name}` brings these"
            )
        self.folders = Folders(
            self._layout.base,
            self._layout.data,
            self._layout.models,
            self._layout.runs,
        )

    def ask(self, verb: str, *words: str, body: Any = None, timeout: float = 60) -> dict[str, Any]:
        """Ask tunesmith.job.services.manager there, by one SSH command."""
        script = '. "$1" && cd "$2" || exit 1\nshift 2\nexec "$@"\n'
        words = ("--base", str(self._layout.base), verb, *words)
        argv = isolated.argv(self._layout.python, "tunesmith.job.services.manager", *words)
        done = self._remote.run(
            script,
            arguments=[str(self._layout.variables), str(self._layout.base), *argv],
            # Inside the connection: keys and tokens must not stand in a process list.
            stdin=None if body is None else json.dumps(body),
            timeout=timeout,
        )
        return _answer(self, verb, done)

    def bring_data(self, tell: Tell) -> Mapping[str, Any]:
        """Upload the files that the local dataset_info.json names; nothing is deleted there."""
        entries, files, missing = registered(self._project.root / "data")
        if missing:
            tell(f"data: not here, so not uploaded: {', '.join(missing)}")
        if files:
            size = sum(path.stat().st_size for path in files.values())
            tell(f"data: {len(files)} files ({formats.size(size)}); uploading what changed")
            transfer.upload(self._remote, files, str(self.folders.data), tell)
        return entries

    def bring_packages(self, folder: Path, tell: Tell) -> PurePath:
        """Upload a folder of packages; one of this name that arrived whole is taken as it is."""
        there = self.folders.base / "services" / folder.name
        whole = there / ".whole"
        if self._remote.run('[ -e "$1" ]', arguments=[str(whole)]).returncode != 0:
            files = {
                path.relative_to(folder).as_posix(): path
                for path in folder.rglob("*")
                if path.is_file()
            }
            size = sum(path.stat().st_size for path in files.values())
            tell(f"uploading {folder.name} ({formats.size(size)})")
            transfer.upload(self._remote, files, str(there), tell)
            self._remote.run(': >"$1"', arguments=[str(whole)])
        return there


class LocalPlace:
    """This machine. Raises UsageError when it has no training environment."""

    name = "local"
    mends = "`inv stack.install`"

    def __init__(self, project: Project) -> None:
        self.remote: Remote | None = None
        self._project = project
        self._environment = project.environment()
        if not self._environment.current():
            raise UsageError(
                f"{self._environment.path}: no finished training environment; `inv stack.install` "
                "makes it"
            )
        self.folders = Folders(
            project.folder(),
            project.root / "data",
            project.models,
            project.runs,
        )

    def ask(self, verb: str, *words: str, body: Any = None, timeout: float = 60) -> dict[str, Any]:
        """Ask tunesmith.job.services.manager here."""
        words = ("--base", str(self._project.home), verb, *words)
        argv = isolated.argv(self._environment.python, "tunesmith.job.services.manager", *words)
        variables = {"HF_HOME": str(self._project.hf_home), **self._project.stack.variables}
        try:
            done = subprocess.run(
                argv,
                input="" if body is None else json.dumps(body),
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
                cwd=self._project.root,
                env={**os.environ, **variables},
            )
        except subprocess.TimeoutExpired:
            raise TunesmithError(
                f"local: no answer after {timeout:g} s, this machine is overloaded; the same "
                "command can be given again"
            ) from None
        return _answer(self, verb, done)

    def bring_data(self, tell: Tell) -> Mapping[str, Any]:
        """Nothing to bring: the Board looks into the clone's own data folder."""
        return {}

    def bring_packages(self, folder: Path, tell: Tell) -> PurePath:
        """Nothing to bring: the folder is here."""
        return folder


def place_of(project: Project, on: str, *, ending: bool = False) -> Place:
    """Return the target of `--on`, to start a service or for `ending` one only.

    Raises UsageError for one that services cannot run on.
    """
    if "," in on:
        raise UsageError(f"--on {on}: one target at a time; `inv host.list` shows the hosts")
    if on == "container":
        raise UsageError(
            "--on container: the image brings its own; `docker compose -f docker/compose.yaml up "
            "webui` (or api) starts it"
        )
    return LocalPlace(project) if on == "local" else HostPlace(project, on, ending=ending)


def registered(data: Path) -> tuple[dict[str, Any], dict[str, Path], list[str]]:
    """Return the entries of a dataset_info.json, the files they need, and what is not there.

    Names are relative to the folder; an entry whose file lies outside of it, or is missing, is
    told and left out, one that names a hub is kept. Raises UsageError when it is not JSON.
    """
    registry = data / _REGISTRY
    try:
        known = read_json(registry) if registry.is_file() else {}
    except ValueError as error:
        raise UsageError(f"{registry}: not JSON: {error}") from None
    if not isinstance(known, dict):
        raise UsageError(f"{registry}: expected data sets by name, found {type(known).__name__}")
    entries: dict[str, Any] = {}
    files: dict[str, Path] = {}
    missing = []
    for key, entry in known.items():
        name = entry.get("file_name") if isinstance(entry, dict) else None
        if name is None:
            entries[key] = entry
            continue
        source = data / str(name)
        inside = not Path(str(name)).is_absolute() and ".." not in Path(str(name)).parts
        if not inside or not source.exists():
            missing.append(f"{key} ({name})")
            continue
        entries[key] = entry
        below = sorted(path for path in source.rglob("*") if path.is_file())
        for path in below if source.is_dir() else [source]:
            files[path.relative_to(data).as_posix()] = path
    return entries, files, missing


def asked_of(
    place: Place,
    kind: Kind,
    *,
    serves: Mapping[str, str] | None = None,
    datasets: Mapping[str, Any] | None = None,
    settings: Mapping[str, str] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Return the body of `start`, with a new key: `settings` are for the service's module,
    beside those that all have; `more` are further keys of the body, as `run`."""
    chinese = os.environ.get("LC_ALL", os.environ.get("LANG", "")).startswith("zh")
    own = {"language": "zh" if chinese else "en", **(settings or {})}
    body: dict[str, Any] = {
        "serves": dict(serves or {}),
        "settings": place.folders.settings() | own,
        "datasets": dict(datasets or {}),
        "key": new_secret(),
    }
    return body | more


def new_secret() -> str:
    """Return a key or token of 256 bits, of letters that need no quotes in a shell or address.

    Made on this side, so that no text of a host is opened as an address.
    """
    return secrets.token_urlsafe(32)


def start(place: Place, kind: Kind, body: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
    """Start a service, or take the living one; return its state once it answers there.

    Raises UsageError when the living one serves something else, TunesmithError with the end
    of its log when it does not come up.
    """
    try:
        began = place.ask("start", kind.name, body=body)
    except UsageError as error:
        if not error.message.startswith("serves "):
            raise
        raise UsageError(
            f"{kind.title} of {place.name} {error.message}; end that one first: `inv "
            f"{kind.name} --on {place.name} --stop`"
        ) from None
    if began.get("key") is not None and not _KEY.fullmatch(str(began["key"])):
        raise TunesmithError(
            f"{place.name}: {kind.title} answers with a key that is none of ours; `inv "
            f"{kind.name} --on {place.name} --stop` ends it"
        )
    if not began["reused"]:
        tell(f"{place.name}: starting {kind.title}; loading its libraries takes a while")
    elif began.get("training"):
        tell(f"{place.name}: {kind.title} is there already, training {began['training']['folder']}")
    else:
        tell(f"{place.name}: {kind.title} is there already")
    deadline = time.monotonic() + kind.patience
    while time.monotonic() < deadline:
        said = _patient(place, kind, tell)
        if said["state"] == "ready":
            return began | said
        if said["state"] != "starting":
            raise ended(place, kind, said, "ended while it started")
    raise TunesmithError(
        f"{place.name}: {kind.title} did not answer within {formats.duration(kind.patience)}; "
        f"`inv {kind.name} --on {place.name} --stop` ends it, its log is {began['log']}"
    )


def _patient(place: Place, kind: Kind, tell: Tell) -> dict[str, Any]:
    """Ask how a service that starts is, some times if need be: it goes on without us."""
    for pause in (1.0, 2.0, 4.0, 8.0):
        try:
            return place.ask("wait", kind.name, str(_PIECE_SECONDS))
        except UsageError:
            raise
        except TunesmithError as error:
            tell(f"{error.line}; asking again")
            time.sleep(pause)
    return place.ask("wait", kind.name, str(_PIECE_SECONDS))


def ended(place: Place, kind: Kind, said: Mapping[str, Any], how: str) -> TunesmithError:
    """Return the error for a service that is gone: the last line of its log, then more."""
    lines = [str(line) for line in said.get("tail") or ()]
    last = lines[-1].strip() if lines else "its log is empty"
    if last.startswith(REFUSED):
        return TunesmithError(f"{place.name}: {last.removeprefix(REFUSED)}")
    return TunesmithError(
        f"{place.name}: {kind.title} {how}: {last}; {place.mends} mends the environment",
        [*lines[:-1], f"log: {said.get('log')}"],
    )


def _answer(place: Place, verb: str, done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    asked = Asked(place.name, f"its answer to `{verb}` of a service")
    value = _last_object(asked, done.stdout.splitlines())
    if value is not None and "error" in value:
        kind = UsageError if done.returncode == UsageError.exit_code else TunesmithError
        refusal = replies.read(asked, Refusal, value)
        raise kind(refusal.error, refusal.detail, hint=refusal.hint)
    if value is None or done.returncode != 0:
        raise TunesmithError(
            f"{place.name}: asking for `{verb}` failed with exit code {done.returncode}; "
            f"{place.mends} mends the environment",
            done.stderr.splitlines()[-5:],
        )
    return replies.Service(verb).read(asked, value)


def _last_object(asked: Asked, lines: Sequence[str]) -> dict[str, Any] | None:
    for line in reversed(lines):
        if line.startswith("{"):
            value = parse_json(asked, line)
            return value if isinstance(value, dict) else None
    return None
