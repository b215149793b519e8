"""What the rest of the house needs to know about the place a run lives in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tunesmith.job.run.events import Event
from tunesmith.job.run.schema import Cause, FetchSpec, ListedRun, RunRequest, RunStatus
from tunesmith.plan.plan import Place, Plan


@dataclass(frozen=True)
class Look:
    """What one look at a run brought.

    `events` are those since the last look and `log` is the log's text since then; both
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


@runtime_checkable
class PowerControl(Protocol):
    """What a target can do whose machine is paid for as long as it is on."""

    def poweroff_command(self) -> tuple[str, ...]:
        """Return the command, run there, that ends the machine. Raises UsageError without one."""
        ...


class Target(Protocol):
    """A place that runs jobs.

    Run ids name runs. A path of the target is text for its own configs and for people; it
    is never opened here. Every method that names a run raises UsageError when there is none.
    """

    name: str
    shared: bool
    """Whether others may use it too, so that runs have to take turns."""

    def place(self, run_id: str) -> Place:
        """Return where a run of this id lives, or would live."""
        ...

    def seen(self, run_id: str, name: str, path: Path) -> str:
        """Return what a config key says on the target for a path of this machine.

        `name` is where it would lie below RUN/inputs; its last part is the key. Raises
        UsageError for a path that cannot be had there.
        """
        ...

    def room(self) -> tuple[str, int]:
        """Return where runs are kept, and the free bytes there."""
        ...

    def fetch_order(self, name: str, revision: str | None, mirror: str | None) -> FetchSpec | None:
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

    def config(self, run_id: str) -> dict[str, Any]:
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

    def watch(self, run_id: str, events: int = 0, log: int | None = None) -> Iterator[Look]:
        """Yield looks at a run, at least one every few seconds, until it is over.

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
