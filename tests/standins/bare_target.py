"""A target that has what `Target` lists, and none of the capabilities beside it.

As a program it is `inv` with this target under the name of `bare`: what a new target of
docs/how-to/add-a-target.md is before it can do more than run jobs. It has one run, r1, in memory.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath

from tunesmith.basemodel.judge import Machine
from tunesmith.core import documents
from tunesmith.core.errors import UsageError
from tunesmith.job.run.events import Event
from tunesmith.job.run.schema import Cause, FetchSpec, ListedRun, RunRequest
from tunesmith.plan.plan import Plan, RunLocation
from tunesmith.plan.target import RunUpdate, Target


class BareTarget:
    """Runs jobs nowhere; the run it has has succeeded."""

    name = "bare"
    shared = False

    def __init__(self) -> None:
        self._runs = ["r1"]

    def location(self, run_id: str) -> RunLocation:
        """Return a folder of another machine."""
        return RunLocation(PurePosixPath("/bare/runs") / run_id, PurePosixPath("/bare/python"), {})

    def remote_path(self, run_id: str, name: str, path: Path) -> str:
        """Return the path below the run's inputs."""
        return f"/bare/runs/{run_id}/inputs/{name}"

    def extras(self) -> Collection[str]:
        """Return none."""
        return ()

    def adding(self, extra: str) -> str:
        """Return that nobody knows."""
        return f"install {extra} there"

    def room(self) -> tuple[str, int]:
        """Return room for everything."""
        return "/bare", 10**15

    def machine(self) -> Machine | None:
        """Return what nobody knows."""
        return None

    def fetch_spec(self, name: str, revision: str | None, mirror: str | None) -> FetchSpec | None:
        """Return how a run would fetch its base model."""
        return FetchSpec(name, mirror or "default", "/bare/models", revision)

    def find(self, run_id: str | None) -> str:
        """Return the one run."""
        if run_id not in (None, *self._runs):
            raise UsageError(f"no run {run_id!r}")
        return self._runs[0]

    def exists(self, run_id: str) -> bool:
        """Return whether it is the one run."""
        return run_id in self._runs

    def create(self, plan: Plan) -> None:
        """Take a run."""
        self._runs.append(plan.run_id)

    def renew(self, plan: Plan) -> None:
        """Take it again."""

    def request(self, run_id: str) -> RunRequest:
        """Return next to nothing."""
        return RunRequest(run_id)

    def config(self, run_id: str) -> documents.Config:
        """Return none."""
        return {}

    def start(self, run_id: str, phases: Sequence[str], cause: Cause) -> None:
        """Start nothing."""

    def stop(self, run_id: str) -> None:
        """End nothing."""

    def status(self, run_id: str) -> ListedRun:
        """Return the end of a training."""
        return ListedRun(
            "succeeded",
            run_id,
            phases={"train": "succeeded"},
            message="all phases succeeded",
            step=3,
            total_steps=3,
            loss=1.5,
            on=self.name,
        )

    def events(self, run_id: str, offset: int) -> tuple[list[Event], int]:
        """Return none."""
        return [], offset

    def watch(self, run_id: str, events: int = 0, log: int | None = None) -> Iterator[RunUpdate]:
        """Yield the end."""
        yield RunUpdate(self.status(run_id), (), events, "the log\n", 0)

    def runs(self) -> list[ListedRun]:
        """Return the one run."""
        return [self.status(run_id) for run_id in self._runs]

    def results(self, run_id: str) -> Path:
        """Return a folder that is empty."""
        return Path("/nonexistent")

    def remove(self, run_id: str) -> int:
        """Delete a run."""
        self._runs.remove(run_id)
        return 1000

    def interact(self, module: str, arguments: Sequence[str]) -> int:
        """Run nothing."""
        return 0


def main() -> int:
    """Be `inv` where `--on bare` is a target."""
    from invoke.main import program

    from tunesmith.targets import factory

    def bare(*_: object) -> Target:
        return BareTarget()

    factory.TARGETS = {**factory.TARGETS, "bare": bare}
    sys.argv[0] = "inv"
    program.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
