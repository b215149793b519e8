"""What a client requests of a service, what its record holds, and what is answered.

Standard library only, as job/services/manager.py.
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
    """What a client starts a service with."""

    serves: Mapping[str, str]  # what it must get: a living service of something else is refused
    settings: Mapping[str, str]  # what the service's module reads: folders, language, packages
    key: str | None = None  # opens it to programs
    tokens: tuple[str, ...] = ()  # each opens it to one browser
    datasets: Mapping[str, object] = field(default_factory=dict)  # for dataset_info.json
    of_run: bool = False  # it serves a run: that of `run`
    run: str | None = None  # id; None: the newest
    allowed: tuple[str, ...] = ()  # further names of its Host
    hint: str | None = None  # how one gets in

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> ServiceRequest:
        """Read it from JSON; there `run` is absent where no run is served."""
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
    """NAME.json: where a service listens, its process, and what it was started with."""

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
        """Read a record. Raises FileNotFoundError, and ValueError for what is none."""
        value = read_json(file)
        if not isinstance(value, dict) or "port" not in value:
            raise ValueError(f"{file}: no record of a service")
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
        """Read a record; None when there is none, or only half of one."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            return cls.read(file)
        return None

    def write(self, file: Path) -> None:
        """Write it as JSON."""
        process = None if self.process is None else self.process.to_json()
        write_json(file, {**asdict(self), "process": process})


class BoardTraining(TypedDict):
    """A training that was started in the Board: its process and the folder of its output."""

    pid: int
    folder: str


class ServiceState(TypedDict, total=False):
    """How a service is, as a client is answered."""

    name: str
    # absent (never started, or stopped), starting, ready, ended (it died); of a stop also
    # stopped and kept (a training runs in it).
    state: str
    training: BoardTraining | None
    port: int
    serves: Mapping[str, str]
    version: str | None
    log: str  # path
    tail: list[str]  # last lines of the log of one that ended
    reused: bool  # of a start: it ran already
    key: str | None  # of a start
