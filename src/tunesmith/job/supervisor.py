"""The supervisor: owns a run from its first phase to its last.

One process, in a session of its own, with the run's lock: it starts a worker for each
phase, follows its heartbeat, passes a stop on, starts a fallen worker again from the
newest sealed checkpoint, and writes status.json. Standard library and yaml only, so
that it is up at once and cannot be hurt by what hurts the worker.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from tunesmith.errors import UsageError
from tunesmith.files import read_json, write_json
from tunesmith.job import checkpoints
from tunesmith.job.attempt import Attempt, Ended
from tunesmith.job.failures import CLASSES, classify_exit
from tunesmith.job.rundir import (
    PHASES,
    EventTail,
    RunFolder,
    RunLock,
    acquire,
    claim_output,
    mend_events,
)
from tunesmith.job.worker import FAILED, STOPPED

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Limits:
    """How patient the supervisor is. Seconds, unless the name says otherwise.

    A worker is stalled when no step was finished for `stall_seconds` and for
    `stall_steps` times the median step. `restarts` counts restarts in a row that reached
    no new checkpoint: a worker that gets further each time may fall as often as it likes.
    """

    restarts: int = 3
    stall_seconds: float = 900.0
    stall_steps: float = 10.0
    dump_seconds: float = 5.0
    stop_seconds: float = 600.0
    disk_wait_seconds: float = 1800.0

    @classmethod
    def from_request(cls, request: dict[str, Any]) -> Limits:
        """Read request["limits"]; a key that does not exist is refused."""
        limits = request.get("limits") or {}
        unknown = sorted(set(limits) - set(cls.__dataclass_fields__))
        if unknown:
            known = ", ".join(cls.__dataclass_fields__)
            raise UsageError(f"run.json: unknown limit {unknown[0]!r}; known are {known}")
        return cls(**limits)


@dataclass(frozen=True)
class Outcome:
    """How a worker, a phase or the run ended: succeeded, stopped, or failed with a class."""

    state: str
    failure: str | None = None
    message: str = ""


def supervise(run_dir: Path, phases: list[str] | None = None) -> int:
    """Run the phases of `run_dir`, by default those not yet succeeded.

    Returns 0 when they succeeded or were stopped on request, 1 when one failed. Raises
    UsageError when the folder is no run, a phase is unknown or another process works in
    it: then nothing was changed.
    """
    run = RunFolder(run_dir.resolve())
    request = run.request()
    unknown = [phase for phase in phases or [] if phase not in PHASES]
    if unknown:
        raise UsageError(f"unknown phase {unknown[0]!r}; known are {', '.join(PHASES)}")
    lock = acquire(run)
    try:
        mend_events(run.events_file)
        supervisor = _Supervisor(run, request, lock)
        return supervisor.run(phases or supervisor.unfinished())
    finally:
        lock.release()


class _Supervisor:
    def __init__(self, run: RunFolder, request: dict[str, Any], lock: RunLock) -> None:
        self._run = run
        self._request = request
        self._lock = lock
        self._limits = Limits.from_request(request)
        self._stop_requests = 0
        size = run.events_file.stat().st_size if run.events_file.exists() else 0
        self._tail = EventTail(run.events_file, size)
        self._failure: dict[str, Any] | None = None
        self._written_at = 0.0
        previous = read_json(run.status_file) if run.status_file.exists() else {}
        self._status: dict[str, Any] = {
            "run_id": run.run_id,
            "state": "running",
            "phase": None,
            "phases": dict(previous.get("phases", {})),
            "failure": None,
            "message": "",
            "step": previous.get("step", 0),
            "total_steps": previous.get("total_steps"),
            "loss": previous.get("loss"),
            "learning_rate": previous.get("learning_rate"),
            "tokens_per_second": None,
            "eta_seconds": None,
            "supervisor": lock.owner.to_json(),
        }

    def unfinished(self) -> list[str]:
        """Return the requested phases that have not succeeded yet."""
        done = self._status["phases"]
        return [phase for phase in self._request["phases"] if done.get(phase) != "succeeded"]

    def run(self, phases: list[str]) -> int:
        signal.signal(signal.SIGTERM, self._request_stop)
        signal.signal(signal.SIGINT, self._request_stop)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self._run.emit("run_started", phases=phases)
        for phase in phases:
            self._status["phases"][phase] = "queued"
        outcome = Outcome("succeeded")
        for phase in phases:
            outcome = self._run_phase(phase)
            self._status["phases"][phase] = outcome.state
            if outcome.state != "succeeded":
                break
        self._write(state=outcome.state, failure=outcome.failure, message=outcome.message)
        self._run.emit("run_ended", state=outcome.state, failure=outcome.failure)
        return 1 if outcome.state == "failed" else 0

    def _request_stop(self, _signum: int, _frame: FrameType | None) -> None:
        self._stop_requests += 1

    def _run_phase(self, phase: str) -> Outcome:
        began = time.monotonic()
        outcome = self._attempts(phase)
        if outcome.failure is not None:
            advice = CLASSES[outcome.failure].advice.replace("RUN", self._run.run_id)
            outcome = Outcome(outcome.state, outcome.failure, f"{outcome.message}; {advice}")
        seconds = round(time.monotonic() - began, 2)
        self._run.emit("phase_ended", phase=phase, state=outcome.state, seconds=seconds)
        return outcome

    def _attempts(self, phase: str) -> Outcome:
        """Run workers until one succeeds, a stop is asked for, or trying again is no use."""
        attempt, restarts, stalls, reached = 0, 0, 0, -1
        while True:
            if phase == "train":
                step = self._prepare_training()
                restarts = 0 if step > reached else restarts
                reached = max(reached, step)
            attempt += 1
            # Before anybody is told, so that the last worker's is not read as this one's.
            self._run.heartbeat_file.unlink(missing_ok=True)
            self._run.emit("phase_started", phase=phase, attempt=attempt)
            self._status["phases"][phase] = "running"
            self._write(phase=phase)
            ended = self._follow(
                Attempt(self._run, phase, self._environment(), self._lock.descriptor)
            )
            outcome = self._judge(ended)
            if outcome.failure is None or self._stop_requests:
                return outcome
            if outcome.failure == "gpu_oom" and phase == "train" and self._step_down():
                continue
            restarts += 1
            stalls += ended.stalled
            if not CLASSES[outcome.failure].retry or restarts > self._limits.restarts or stalls > 1:
                return outcome
            self._run.emit("restarting", phase=phase, failure=outcome.failure, why=outcome.message)

    def _follow(self, attempt: Attempt) -> Ended:
        """Watch a worker until it ends, and keep status.json fresh."""
        asked = 0
        asked_at = 0.0
        self._failure = None
        while (ended := attempt.poll()) is None:
            if self._stop_requests > asked:
                # A second request means: now.
                attempt.request_stop() if asked == 0 else attempt.kill()
                asked, asked_at = self._stop_requests, time.monotonic()
            if asked and time.monotonic() - asked_at > self._limits.stop_seconds:
                attempt.kill()
            if attempt.silent_seconds() > self._patience(attempt):
                attempt.mark_stalled(self._limits.dump_seconds)
            self._take_events()
            self._refresh(attempt)
            time.sleep(_POLL_SECONDS)
        self._take_events()
        self._refresh(attempt)
        return ended

    def _patience(self, attempt: Attempt) -> float:
        """Return how many silent seconds are still normal.

        Before the first step nothing is known yet (a large data set is tokenised, a large
        model read from a slow disk), so the limit is four times as long.
        """
        step = attempt.heartbeat.get("step_seconds")
        if step is None:
            return 4 * self._limits.stall_seconds
        return max(self._limits.stall_seconds, self._limits.stall_steps * float(step))

    def _judge(self, ended: Ended) -> Outcome:
        if ended.code == 0:
            return Outcome("succeeded")
        if ended.stalled:
            return Outcome("failed", "stalled", "no step was finished for too long")
        if ended.code == STOPPED or (self._stop_requests and ended.code < 0):
            return Outcome("stopped", None, f"`inv resume --run {self._run.run_id}` continues it")
        if ended.code == FAILED and self._failure is not None:
            return Outcome("failed", self._failure["failure"], self._failure["message"])
        failure, message = classify_exit(ended.code, ended.log_tail, oom_killed=ended.oom_killed)
        tail = ended.log_tail.splitlines()[-12:]
        self._run.emit("failure", failure=failure, message=message, detail=tail)
        return Outcome("failed", failure, message)

    def _take_events(self) -> None:
        """Carry what the worker reported into the status."""
        for event in self._tail.new():
            if event["event"] == "log":
                for key in ("step", "total_steps", "loss", "learning_rate", "tokens_per_second"):
                    self._status[key] = event.get(key)
            elif event["event"] == "failure":
                self._failure = event

    def _refresh(self, attempt: Attempt) -> None:
        if time.monotonic() - self._written_at < 1:
            return
        heartbeat = attempt.heartbeat
        if heartbeat:
            self._status["step"] = heartbeat["step"]
            self._status["total_steps"] = heartbeat["total_steps"]
            self._status["paused"] = heartbeat["paused"]
        self._write(eta_seconds=attempt.eta_seconds())

    def _write(self, **fields: Any) -> None:
        self._status |= fields
        self._status["updated"] = time.time()
        self._written_at = time.monotonic()
        write_json(self._run.status_file, self._status)

    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = yaml.safe_load(self._run.config_file.read_text(encoding="utf-8"))
        return config | self._adjustments()

    def _adjustments(self) -> dict[str, Any]:
        file = self._run.adjustments_file
        return dict(read_json(file)) if file.exists() else {}

    def _prepare_training(self) -> int:
        """Set faulty checkpoints aside; return the step training continues from, or -1."""
        output = Path(self._config()["output_dir"])
        claim_output(self._run, output)
        newest, discarded = checkpoints.newest_valid(output)
        for name, why in discarded:
            self._run.emit("discarded", checkpoint=name, why=why)
        return newest.step if newest else -1

    def _step_down(self) -> bool:
        """After a GPU OOM lower what a step needs; False when nothing is left to lower.

        The micro-batch shrinks and the accumulation grows by the same factor, so the
        effective batch stays; at 1, gradient checkpointing is turned on.
        """
        config = self._config()
        batch = int(config.get("per_device_train_batch_size", 8))
        accumulation = int(config.get("gradient_accumulation_steps", 1))
        if batch > 1:
            # Halves even sizes; an odd one goes to its next divisor, which keeps the product.
            smaller = max(d for d in range(1, batch // 2 + 1) if batch % d == 0)
            change: dict[str, Any] = {
                "per_device_train_batch_size": smaller,
                "gradient_accumulation_steps": accumulation * (batch // smaller),
            }
        elif config.get("disable_gradient_checkpointing"):
            change = {"disable_gradient_checkpointing": False}
        else:
            return False
        write_json(self._run.adjustments_file, self._adjustments() | change)
        for key, value in change.items():
            before = {"from": config.get(key)}
            self._run.emit("changed", what=key, to=value, why="GPU out of memory", **before)
        return True

    def _environment(self) -> dict[str, str]:
        """Return the worker's environment: ours, the stack's variables, the env's programs.

        PYTHONPATH and user site-packages are left out unless the request names them:
        packages of the machine's image must not leak into the locked environment.
        """
        environment = {
            key: value
            for key, value in os.environ.items()
            if key not in ("PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE")
        }
        programs = str(Path(sys.executable).parent)
        environment["PATH"] = f"{programs}{os.pathsep}{environment.get('PATH', os.defpath)}"
        environment["PYTHONUNBUFFERED"] = "1"
        environment["PYTHONNOUSERSITE"] = "1"
        return environment | {k: str(v) for k, v in (self._request.get("env") or {}).items()}
