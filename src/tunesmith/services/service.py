"""The client side of a target's web services: requests to tunesmith.job.services.manager."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Protocol, TypedDict, cast, runtime_checkable

from tunesmith.core import formats
from tunesmith.core.callbacks import OnText
from tunesmith.core.documents import JsonObject
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import read_json
from tunesmith.hosts import replies
from tunesmith.hosts.answers import AnswerSource, parse_json
from tunesmith.hosts.remote import Remote
from tunesmith.job.run.replies import Refusal
from tunesmith.job.services.manager import PORTS, REFUSED

# Entries of a dataset_info.json by name, as LLaMA-Factory reads them.
Registry = Mapping[str, JsonObject]

# A wait is split into several commands, so that Ctrl-C is handled soon.
_PIECE_SECONDS = 5
_REGISTRY = "dataset_info.json"


@dataclass(frozen=True)
class Kind:
    """A service: its title, its task, and its usual local port.

    `patience` is the longest time from start to answer, in seconds: a cold disk reads
    gigabytes of libraries first, and the API its model.
    """

    name: str
    title: str
    port: int
    patience: float
    path: str
    browsed: bool
    """Accessed by an address with a token; otherwise only by the key."""


KINDS = {
    "webui": Kind("webui", "LLaMA Board", PORTS["webui"], 300.0, "/", browsed=True),
    "api": Kind("api", "the API", PORTS["api"], 900.0, "/v1/models", browsed=False),
    "tensorboard": Kind(
        "tensorboard", "TensorBoard", PORTS["tensorboard"], 300.0, "/", browsed=True
    ),
}
# The form of our own secrets; a host's answer goes into a header and onto the screen.
_KEY = re.compile(r"[A-Za-z0-9_-]{43,128}")


class _Body(TypedDict):
    serves: Mapping[str, str]
    settings: Mapping[str, str]
    datasets: Registry
    key: str


class Body(_Body, total=False):
    """The request to start a service: JSON on stdin of job.services.manager.

    `settings` are for the service's module, `serves` is what a living one must serve to be taken.
    """

    run: str
    tokens: Sequence[str]


class Training(TypedDict):
    """A training that runs in the Board."""

    folder: str


class _State(TypedDict):
    state: str


class ServiceState(_State, total=False):
    """The state of a service: job.services.manager.state, read by hosts.replies.Service.

    `state` is absent, starting, ready, ended, stopped or kept; only that is always there.
    """

    port: int
    log: str
    tail: list[str]
    serves: dict[str, str]
    key: str | None
    reused: bool
    training: Training | None


@dataclass(frozen=True)
class Folders:
    """Folders of a target, as paths on that target."""

    base: PurePath
    data: PurePath
    models: PurePath
    runs: PurePath

    def settings(self) -> dict[str, str]:
        """Return the settings of every service's module."""
        return {
            "data": str(self.data),
            "models": str(self.models),
            "runs": str(self.runs),
        }


class ServiceAccess(Protocol):
    """Access to the web services of one target: starts, queries and stops them."""

    name: str
    folders: Folders
    remote: Remote | None
    """How its ports are reached, None if they are this machine's."""
    mends: str
    """The command that repairs a broken environment."""

    def ask(
        self, verb: str, *words: str, body: Body | None = None, timeout: float = 60
    ) -> ServiceState:
        """Send a request to tunesmith.job.services.manager there. Raises its refusal."""
        ...

    def stage_data(self, tell: OnText) -> Registry:
        """Upload this clone's data sets; return the entries to register there."""
        ...

    def stage_packages(self, folder: Path, tell: OnText) -> PurePath:
        """Upload a folder of packages; return its path there."""
        ...


@runtime_checkable
class Services(Protocol):
    """A target that LLaMA Board, the API and TensorBoard can run on."""

    def ports(self) -> Remote | None:
        """Return how its ports are reached, None if they are this machine's."""
        ...

    def services(self, *, ending: bool = False) -> ServiceAccess:
        """Return the access to its services; with `ending` only to stop one.

        Raises UsageError if the target is not ready for a service.
        """
        ...


def registered(data: Path) -> tuple[Registry, dict[str, Path], list[str]]:
    """Return the entries of a dataset_info.json, the files they need, and what is missing.

    Names are relative to the folder. An entry whose file is outside of it or missing is reported
    and omitted; one that refers to a hub is kept. Raises UsageError if it is not JSON.
    """
    registry = data / _REGISTRY
    try:
        content = read_json(registry) if registry.is_file() else {}
    except ValueError as error:
        raise UsageError(f"{registry}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{registry}: expected data sets by name, found {type(content).__name__}")
    entries: dict[str, JsonObject] = {}
    files: dict[str, Path] = {}
    missing = []
    for key, entry in content.items():
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
    access: ServiceAccess,
    kind: Kind,
    *,
    serves: Mapping[str, str] | None = None,
    datasets: Registry | None = None,
    settings: Mapping[str, str] | None = None,
    run: str | None = None,
) -> Body:
    """Return the body of `start`, with a new key: `settings` are for the service's module,
    beside those that all have; `run` is the run to serve."""
    chinese = os.environ.get("LC_ALL", os.environ.get("LANG", "")).startswith("zh")
    own = {"language": "zh" if chinese else "en", **(settings or {})}
    body = Body(
        serves=dict(serves or {}),
        settings=access.folders.settings() | own,
        datasets=dict(datasets or {}),
        key=new_secret(),
    )
    return {**body, "run": run} if run else body


def new_secret() -> str:
    """Return a key or token of 256 bits that needs no quotes in a shell or address.

    It is generated on the client, so that no text of a host is opened as an address.
    """
    return secrets.token_urlsafe(32)


def start(access: ServiceAccess, kind: Kind, body: Body, tell: OnText) -> ServiceState:
    """Start a service, or reuse the running one; return its state once it answers.

    Raises UsageError if the running one serves something else, TunesmithError with the end of its
    log if it does not start.
    """
    try:
        began = access.ask("start", kind.name, body=body)
    except UsageError as error:
        if not error.message.startswith("serves "):
            raise
        raise UsageError(
            f"{kind.title} of {access.name} {error.message}",
            hint=f"end that one first: {_stops(access, kind)}",
        ) from None
    if began.get("key") is not None and not _KEY.fullmatch(str(began["key"])):
        raise TunesmithError(
            f"{access.name}: {kind.title} answers with a key that is none of ours",
            hint=f"{_stops(access, kind)} ends it",
        )
    if not began["reused"]:
        tell(f"{access.name}: starting {kind.title}; loading its libraries takes a while")
    elif folder := folder_of_training(began):
        tell(f"{access.name}: {kind.title} is there already, training {folder}")
    else:
        tell(f"{access.name}: {kind.title} is there already")
    deadline = time.monotonic() + kind.patience
    while time.monotonic() < deadline:
        state = _patient(access, kind, tell)
        if state["state"] == "ready":
            return {**began, **state}
        if state["state"] != "starting":
            raise ended(access, kind, state, "ended while it started")
    raise TunesmithError(
        f"{access.name}: {kind.title} did not answer within {formats.duration(kind.patience)}",
        [f"log: {began['log']}"],
        hint=f"{_stops(access, kind)} ends it",
    )


def folder_of_training(state: ServiceState) -> str | None:
    """Return the folder of the training that runs in the Board, or None."""
    training = state.get("training")
    return training["folder"] if training else None


def _stops(access: ServiceAccess, kind: Kind) -> str:
    return f"`inv {kind.name} --on {access.name} --stop`"


def _patient(access: ServiceAccess, kind: Kind, tell: OnText) -> ServiceState:
    """Query a starting service, repeatedly if necessary: it starts without us."""
    for pause in (1.0, 2.0, 4.0, 8.0):
        try:
            return access.ask("wait", kind.name, str(_PIECE_SECONDS))
        except UsageError:
            raise
        except TunesmithError as error:
            tell(f"{error.line}; asking again")
            time.sleep(pause)
    return access.ask("wait", kind.name, str(_PIECE_SECONDS))


def ended(access: ServiceAccess, kind: Kind, state: ServiceState, how: str) -> TunesmithError:
    """Return the error for a service that has ended: the last line of its log, then more."""
    lines = [str(line) for line in state.get("tail") or ()]
    last = lines[-1].strip() if lines else "its log is empty"
    if last.startswith(REFUSED):
        return TunesmithError(f"{access.name}: {last.removeprefix(REFUSED)}")
    return TunesmithError(
        f"{access.name}: {kind.title} {how}: {last}",
        [*lines[:-1], f"log: {state.get('log')}"],
        hint=f"{access.mends} repairs the environment",
    )


def answer_of(
    access: ServiceAccess, verb: str, done: subprocess.CompletedProcess[str]
) -> ServiceState:
    """Return the manager's typed answer to `verb`. Raises its refusal."""
    asked = AnswerSource(access.name, f"its answer to `{verb}` of a service")
    value = _last_object(asked, done.stdout.splitlines())
    if value is not None and "error" in value:
        kind = UsageError if done.returncode == UsageError.exit_code else TunesmithError
        refusal = replies.read(asked, Refusal, value)
        raise kind(refusal.error, refusal.detail, hint=refusal.hint)
    if value is None or done.returncode != 0:
        raise TunesmithError(
            f"{access.name}: asking for `{verb}` failed with exit code {done.returncode}",
            done.stderr.splitlines()[-5:],
            hint=f"{access.mends} repairs the environment",
        )
    return cast(ServiceState, replies.Service(verb).read(asked, value))


def _last_object(asked: AnswerSource, lines: Sequence[str]) -> JsonObject | None:
    for line in reversed(lines):
        if line.startswith("{"):
            value = parse_json(asked, line)
            return value if isinstance(value, dict) else None
    return None
