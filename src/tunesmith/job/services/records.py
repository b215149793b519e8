"""Requests to a service, its record, and the answers to clients.

Standard library only, like job/services/manager.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from tunesmith.core.files import read_json, write_json
from tunesmith.job.run.process import Identity

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class ServiceRequest:
    """A client's request to start a service."""

    serves: Mapping[str, str]  # what is served; a running service of something else is refused
    settings: Mapping[str, str]  # options of the service's module: folders, language, packages
    key: str | None = None  # grants access to programs
    tokens: tuple[str, ...] = ()  # each grants access to one browser
    datasets: Mapping[str, object] = field(default_factory=dict)  # for dataset_info.json
    of_run: bool = False  # whether it serves a run, the one in `run`
    run: str | None = None  # id; None: the newest
    allowed: tuple[str, ...] = ()  # further names accepted as Host
    hint: str | None = None  # how to get access

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> ServiceRequest:
        """Read it from JSON, where `run` is absent if no run is served."""
        return cls(
            serves=value["serves"],
            settings=value["settings"],
            key=value.get("key"),
            tokens=tuple(value.get("tokens") or ()),
            datasets=value.get("datasets") or {},
            of_run="run" in value,
            run=value.get("run"),
            allowed=tuple(value.get("allowed") or ()),
            hint=value.get("hint"),
        )


@dataclass(frozen=True)
class ServiceRecord:
    """NAME.json: where a service listens, its process and its options."""

    name: str
    port: int
    base: str = ""
    listen: str = LOOPBACK
    process: Identity | None = None
    serves: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    version: str | None = None  # of LLaMA-Factory
    started: float = 0.0  # seconds since 1970
    allowed: tuple[str, ...] = ()
    hint: str | None = None

    @classmethod
    def read(cls, file: Path) -> ServiceRecord:
        """Read a record. Raises FileNotFoundError, and ValueError if it is not a record."""
        value = read_json(file)
        if not isinstance(value, dict) or "port" not in value:
            raise ValueError(f"{file}: not a record of a service")
        process = value.get("process")
        return cls(
            name=str(value.get("name", file.stem)),
            port=int(value["port"]),
            base=str(value.get("base", "")),
            listen=str(value.get("listen", LOOPBACK)),
            process=Identity.from_json(process) if process else None,
            serves=value.get("serves") or {},
            settings=value.get("settings") or {},
            version=value.get("version"),
            started=float(value.get("started", 0)),
            allowed=tuple(value.get("allowed") or ()),
            hint=value.get("hint"),
        )

    @classmethod
    def read_or_none(cls, file: Path) -> ServiceRecord | None:
        """Read a record; return None if there is none or it is incomplete."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            return cls.read(file)
        return None

    def write(self, file: Path) -> None:
        """Write it as JSON."""
        process = None if self.process is None else self.process.to_json()
        write_json(file, {**asdict(self), "process": process})


class BoardTraining(TypedDict):
    """A training started in the Board: its process and output folder."""

    pid: int
    folder: str


class ServiceState(TypedDict, total=False):
    """The state of a service in an answer to a client."""

    name: str
    # absent (never started, or stopped), starting, ready, ended (it died); after a stop also
    # stopped, or kept (a training runs in it).
    state: str
    training: BoardTraining | None
    port: int
    serves: Mapping[str, str]
    version: str | None
    log: str  # path
    tail: list[str]  # last lines of the log, if it ended
    reused: bool  # after a start: it was already running
    key: str | None  # after a start
