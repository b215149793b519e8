"""What the rest of the house may ask of the place a run lives in: Target, and its capabilities.

A capability is a Protocol of its own: a target that has its methods has it. Whoever needs one asks
`targets.capability.require`; web services are one, too (`services.service.Services`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from tunesmith.basemodel.judge import Machine
from tunesmith.basemodel.store import ModelFolder
from tunesmith.core import documents
from tunesmith.job.run.events import Event
from tunesmith.job.run.schema import Cause, FetchSpec, ListedRun, RunRequest, RunStatus
from tunesmith.plan.plan import Plan, RunLocation


@dataclass(frozen=True)
class RunUpdate:
    """What one poll of a run brought.

    `events` are those since the last poll and `log` is the log's text since then; both
    offsets are bytes, and a new `watch` goes on from them. `lost` says why nothing could be
    seen (a host out of reach); then the rest is as it was. `more`: the next piece is there
    already.
    """

    status: RunStatus
    events: tuple[Event, ...]
    events_offset: int
    log: str
    log_offset: int
    lost: str | None = None
    more: bool = False

    @property
    def over(self) -> bool:
        """Whether nobody works on the run any more."""
        return self.lost is None and not self.more and not self.status.active


class Target(Protocol):
    """A place that runs jobs.

    Run ids name runs. A path of the target is text for its own configs and for people; it
    is never opened here. Every method that names a run raises UsageError when there is none.
    """

    name: str
    shared: bool
    """Whether others may use it too, so that runs have to take turns."""

    def location(self, run_id: str) -> RunLocation:
        """Return where a run of this id lives, or would live."""
        ...

    def remote_path(self, run_id: str, name: str, path: Path) -> str:
        """Return what a config key says on the target for a path of this machine.

        `name` is where it would lie below RUN/inputs; its last part is the key. Raises
        UsageError for a path that cannot be had there.
        """
        ...

    def extras(self) -> Collection[str]:
        """Return the names of the extras (configs/stack.yml) that its environment has."""
        ...

    def adding(self, extra: str) -> str:
        """Return how its environment gets an extra, as a hint begins: "run `inv ...`"."""
        ...

    def room(self) -> tuple[str, int]:
        """Return where runs are kept, and the free bytes there."""
        ...

    def machine(self) -> Machine | None:
        """Return the memory of the machine that trains; None where only it can tell."""
        ...

    def fetch_spec(self, name: str, revision: str | None, mirror: str | None) -> FetchSpec | None:
        """Return how a run fetches its base model there; None: it is fetched here."""
        ...

    def find(self, run_id: str | None) -> str:
        """Return the id of a run that exists, by default the newest one's."""
        ...

    def exists(self, run_id: str) -> bool:
        """Return whether there is such a run."""
        ...

    def create(self, plan: Plan) -> None:
        """Make the plan's run folder with request, config and inputs.

        Raises UsageError when it exists already.
        """
        ...

    def renew(self, plan: Plan) -> None:
        """Give a run the plan's request and inputs. Raises UsageError while it is worked on."""
        ...

    def request(self, run_id: str) -> RunRequest:
        """Return what was asked: run.json."""
        ...

    def config(self, run_id: str) -> documents.Config:
        """Return the config of the training; empty when the run has none."""
        ...

    def start(self, run_id: str, phases: Sequence[str], cause: Cause) -> None:
        """Start phases of a run, detached; return when it is under way. `cause` is why."""
        ...

    def stop(self, run_id: str) -> None:
        """Ask a run for a checkpoint and an end."""
        ...

    def status(self, run_id: str) -> RunStatus:
        """Return the status as status.json has it."""
        ...

    def events(self, run_id: str, offset: int) -> tuple[list[Event], int]:
        """Return the events from byte `offset` on, and the offset behind them."""
        ...

    def watch(self, run_id: str, events: int = 0, log: int | None = None) -> Iterator[RunUpdate]:
        """Yield updates of a run, at least one every few seconds, until it is over.

        `events` and `log` are the byte offsets to begin at; None: the log is not wanted. A
        target out of reach is told by `lost`, and looked for until it is back.
        """
        ...

    def runs(self) -> list[ListedRun]:
        """Return the status of every run, oldest first."""
        ...

    def results(self, run_id: str) -> Path:
        """Return a local folder with the run's results, without what is large."""
        ...

    def remove(self, run_id: str) -> int:
        """Delete a run; return the bytes that became free. Refuses one that is worked on."""
        ...

    def interact(self, module: str, arguments: Sequence[str]) -> int:
        """Run a module of the job half in the user's terminal; return its exit code."""
        ...


@runtime_checkable
class PullSource(Protocol):
    """A target whose runs are brought to this machine by `inv pull`."""

    def check_pull(self, run_id: str) -> None:
        """Raise UsageError when a run cannot be pulled now, or would replace one made here."""
        ...

    def pull(self, run_id: str, parts: Sequence[str]) -> Path:
        """Bring parts of a run here, complete or not at all; return its folder here."""
        ...


@runtime_checkable
class PullDestination(Protocol):
    """A target that works on pulled runs: they lie where its own runs do."""

    def adopt_pulled_run(self, run_id: str, fetch: Callable[[str], ModelFolder]) -> None:
        """Let a pulled run be used here; `fetch` returns a base model by its name.

        One that was made here is left alone. Raises UsageError where the base model is not the
        run's.
        """
        ...


@dataclass(frozen=True)
class Rental:
    """What a rented machine costs when it is off: `note` in words, `release_days` until the
    platform deletes it with its disk (None: it does not)."""

    platform: str
    note: str
    release_days: int | None


@runtime_checkable
class PowerControl(Protocol):
    """A target whose machine is paid for as long as it is on."""

    def rental(self) -> Rental:
        """Return what the machine costs when it is off."""
        ...

    def poweroff_command(self) -> tuple[str, ...]:
        """Return the command, run there, that ends the machine. Raises UsageError without one."""
        ...

    def power_off(self, run_id: str) -> None:
        """Power the machine off after a run that has succeeded, and wait until it is off.

        Raises UsageError when it must stay on, TunesmithError when it does not go off.
        """
        ...


@runtime_checkable
class ModelReceiver(Protocol):
    """A target that takes a base model from this machine."""

    def send_model(self, name: str, folder: Path) -> None:
        """Bring a base model's folder from here into the target's store."""
        ...


@dataclass(frozen=True)
class Provisioning:
    """What a host was provisioned for. `mirror` is a profile's name; `flavour` None: the one
    that its GPU and driver ask for."""

    mirror: str
    flavour: str | None
    toolkit: bool


@runtime_checkable
class Resumable(Protocol):
    """A target that may be restarted or rebuilt under its runs, and continues them."""

    def provisioning(self) -> Provisioning:
        """Return what the target was provisioned for."""
        ...

    def resume_all(self) -> tuple[list[str], list[str]]:
        """Continue every run that a restart cut off; return their ids, and why others were
        not continued."""
        ...

    def start_hook(self) -> str | None:
        """Return the file there that a start of the machine runs; None: there is none."""
        ...

    def autostart(self, *, wanted: bool) -> None:
        """Let the target resume its runs at each start, or not any more."""
        ...

    def renew_autostart(self) -> None:
        """Bring back what a rebuild of the target has taken of it."""
        ...
