"""status.json while a supervisor runs: its content and when it is written."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

from tunesmith.job.run import events
from tunesmith.job.run.folder import RunFolder
from tunesmith.job.run.journal import Journal
from tunesmith.job.run.process import Identity
from tunesmith.job.run.schema import CONTRACT, Cause, GpuFigures, Price, RunStatus
from tunesmith.job.supervisor.attempt import Attempt
from tunesmith.job.system.gpu import Sampler

_WRITE_SECONDS = 1.0


class StatusRecord:
    """The run's current status, based on the previous one; written at most once a second."""

    def __init__(
        self,
        run: RunFolder,
        journal: Journal,
        owner: Identity,
        price: float | Price | None,
        cause: Cause,
    ) -> None:
        previous = run.last_status() or RunStatus(state="queued", step=0)
        self._journal = journal
        self._sampler = Sampler()
        self._began: float | None = None
        self._written_at = 0.0
        self.worked_before = float(previous.worked_seconds or 0.0)
        self.now = RunStatus(
            run_id=run.run_id,
            state="running",
            phases=dict(previous.phases),
            started=previous.started,
            worked_seconds=self.worked_before,
            step=previous.step,
            total_steps=previous.total_steps,
            loss=previous.loss,
            learning_rate=previous.learning_rate,
            supervisor=owner,
            price=price,
            cause=cause,
            version=CONTRACT,
        )

    def begin(self) -> None:
        """Start counting time, and query the GPUs."""
        self._began = time.monotonic()
        self.change(state="running", started=self.now.started or time.time())
        self._sampler.start()

    def worked(self) -> float:
        """Return the seconds this run has worked in total, including resumes."""
        now = 0.0 if self._began is None else time.monotonic() - self._began
        return self.worked_before + now

    def change(self, **fields: Any) -> None:
        """Change fields of the status; the next `write` writes them."""
        self.now = replace(self.now, **fields)

    def set_phases(self, phases: Iterable[str], state: str) -> None:
        """Change the state of phases."""
        self.change(phases={**self.now.phases, **dict.fromkeys(phases, state)})

    def succeeded(self) -> set[str]:
        """Return the phases that have succeeded."""
        return {phase for phase, state in self.now.phases.items() if state == "succeeded"}

    def log(self, event: events.Log) -> None:
        """Copy the values of a step to the status."""
        self.now = events.with_step(self.now, event)

    def refresh(self, attempt: Attempt | None) -> None:
        """Write the status with the worker's newest step, unless it was just written."""
        if time.monotonic() - self._written_at < _WRITE_SECONDS:
            self._journal.flush()
            return
        if attempt is None:
            self.write()
            return
        if beat := attempt.heartbeat:
            self.change(step=beat.step, total_steps=beat.total_steps, paused=beat.paused)
        self.write(eta_seconds=attempt.eta_seconds())

    def write(self, **fields: Any) -> None:
        """Change fields, and write the status."""
        gpus = tuple(GpuFigures(**asdict(gpu)) for gpu in self._sampler.newest())
        worked = round(self.worked(), 1)
        self.change(**fields, worked_seconds=worked, gpu=gpus or None, updated=time.time())
        self._written_at = time.monotonic()
        self._journal.status(self.now)
