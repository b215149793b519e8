"""What tunesmith on a host answers about its runs: a type for each verb of the agent.

job/supervisor/agent.py writes them, hosts/agent.py reads them with the bounds of what a host may
say. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from tunesmith.job.run.codec import Between, Exact, Most, Prose, omitted
from tunesmith.job.run.events import Event
from tunesmith.job.run.schema import (
    Count,
    FileName,
    Line,
    ListedRun,
    RunName,
    RunRequest,
    RunStatus,
    Sha256,
    Values,
    Word,
)


@dataclass(frozen=True)
class RunNamed:
    """create, renew, start, stop, find: the run."""

    run_id: RunName


@dataclass(frozen=True)
class RunShown:
    """show: what was asked, the config of the training (None without one), where it stands."""

    request: RunRequest
    status: RunStatus
    config: Values | None = None


@dataclass(frozen=True)
class RunList:
    """runs: all of them, oldest first."""

    runs: Annotated[tuple[ListedRun, ...], Most(100_000)]


@dataclass(frozen=True)
class RunSnapshot:
    """watch: the status, what is new, and where the next poll continues (bytes).

    `more`: the next piece is there already. An offset of the log of -1 leaves the log out.
    """

    status: RunStatus
    events: Annotated[tuple[Event, ...], Most(1_000_000)]
    events_offset: Count
    # A piece of watch.py is a quarter of this.
    log: Annotated[str, Prose(1 << 20)] = ""
    log_offset: Annotated[int, Between(-1)] = -1
    more: bool = omitted(False)


@dataclass(frozen=True)
class ListedFile:
    """A file of a run that may be pulled; `path` where it lies outside of the run's folder."""

    size: Count
    sha256: Sha256
    path: FileName | None = omitted(None)


@dataclass(frozen=True)
class Leftovers:
    """How many files are no part of a run's results, and the names of some."""

    count: Count = 0
    names: tuple[Line, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """manifest: what a pull brings. While a run is `busy` its record and log still grow."""

    files: Annotated[Mapping[Annotated[str, Exact(4096)], ListedFile], Most(200_000)]
    state: Word = ""
    busy: bool = False
    left: Leftovers = field(default_factory=Leftovers)


@dataclass(frozen=True)
class Removed:
    """remove: the bytes that became free, and a folder of results that lies elsewhere."""

    freed: Count
    left: FileName | None = omitted(None)


@dataclass(frozen=True)
class CommandResult:
    """afterwards: the exit code; None: it could not be run, and `why`."""

    code: Annotated[int, Between(-10_000, 10_000)] | None
    why: Line | None = None


@dataclass(frozen=True)
class Resumed:
    """resume-all: the runs that were started, and those that were refused, with the reason."""

    started: tuple[RunName, ...] = ()
    refused: Mapping[RunName, Line] = field(default_factory=dict)


@dataclass(frozen=True)
class Refusal:
    """What is said instead, where a verb is refused."""

    error: Line
    detail: Annotated[tuple[Line, ...], Most(1000)] = ()
    hint: Line = omitted("")


@dataclass(frozen=True)
class UploadedFile:
    """A file that a client has uploaded for a run, and what it must be."""

    source: FileName
    size: Count
    sha256: Sha256


@dataclass(frozen=True)
class RunOrder:
    """What a client sends with create and renew: `inputs` are links to make, by name."""

    request: RunRequest
    run_id: RunName = omitted("")
    config: Values | None = None
    inputs: Annotated[Mapping[FileName, UploadedFile], Most(1_000_000)] = field(
        default_factory=dict
    )


@dataclass(frozen=True)
class CommandOrder:
    """What a client sends with afterwards."""

    command: tuple[FileName, ...]
