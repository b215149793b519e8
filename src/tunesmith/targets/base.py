"""What the rest of the house needs to know about the place a run lives in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tunesmith.plan import Place, Plan


class Target(Protocol):
    """A place that runs jobs. Run ids name runs; paths never cross this line outward."""

    name: str

    def place(self, run_id: str) -> Place:
        """Return where a run of this id lives, or would live."""
        ...

    def create(self, plan: Plan) -> None:
        """Make the plan's run folder with its request and config; it must not exist yet."""
        ...

    def start(self, run_id: str, phases: Sequence[str]) -> None:
        """Start phases of a run, detached; return when it is under way."""
        ...

    def stop(self, run_id: str) -> None:
        """Ask a run for a checkpoint and an end."""
        ...

    def status(self, run_id: str) -> dict[str, Any]:
        """Return the status as status.json has it."""
        ...

    def events(self, run_id: str, offset: int) -> tuple[list[dict[str, Any]], int]:
        """Return the events from byte `offset` on, and the offset behind them."""
        ...

    def log(self, run_id: str, offset: int) -> tuple[str, int]:
        """Return the log from byte `offset` on, and the offset behind it."""
        ...

    def runs(self) -> list[dict[str, Any]]:
        """Return the status of every run, oldest first."""
        ...

    def results(self, run_id: str) -> Path:
        """Return a local folder with the run's results."""
        ...

    def interact(self, module: str, arguments: Sequence[str]) -> int:
        """Run a module of the job half in the user's terminal; return its exit code."""
        ...
