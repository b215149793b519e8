"""The supervisor: owns a run from its first phase to its last.

One process, in a session of its own, with the run's lock: it starts a worker for each
phase, follows its heartbeat, passes a stop on, starts a fallen worker again from the
newest sealed checkpoint, and writes status.json. Standard library and yaml only, so
that it is up at once and cannot be hurt by what hurts the worker.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from tunesmith import isolated
from tunesmith.errors import UsageError
from tunesmith.files import read_json, write_json
from tunesmith.job import checkpoints, turns, workplace
from tunesmith.job.attempt import Attempt, Ended
from tunesmith.job.failures import CLASSES, classify_exit
from tunesmith.job.gpu import Sampler
from tunesmith.job.orders import After, Limits, carry_out
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
class Outcome:
    """How a worker, a phase or the run ended: succeeded, stopped, or failed with a class.

    `retry` overrules whether the class is tried again.
    """

    state: str
    failure: str | None = None
    message: str = ""
    detail: tuple[str, ...] = ()
    retry: bool | None = None


def supervise(run_dir: Path, phases: list[str] | None = None) -> int:
    """Run the phases of `run_dir`, by default those not yet succeeded.

    Returns 0 when they succeeded or were stopped on request, 1 when one failed. Raises
    UsageError when the folder is no run, a phase is unknown, another process works in it,
    another run has the turn, or its time is used up: then nothing was changed.
    """
    run = RunFolder(run_dir.resolve())
    request = run.request()
    unknown = [phase for phase in phases or [] if phase not in PHASES]
    if unknown:
        raise UsageError(f"unknown phase {unknown[0]!r}; known are {', '.join(PHASES)}")
    lock = acquire(run)
    try:
        mend_events(run.events_file)
        with workplace.of(run) as place:
            supervisor = _Supervisor(run, request, lock, place)
            code = supervisor.run(phases or supervisor.unfinished())
    finally:
        lock.release()
    supervisor.afterwards()
    return code


class _Supervisor:
    def __init__(self, run: RunFolder, request: dict[str, Any], lock: RunLock, place: Path) -> None:
        self._run = run
        self._place = place
        self._request = request
        self._lock = lock
        self._limits = Limits.from_request(request)
        self._after = After.from_request(request)
        self._ordered = False
        self._turn: turns.Turn | None = None
        self._sampler = Sampler()
        self._stop_requests = 0
        self._spent = False
        size = run.events_file.stat().st_size if run.events_file.exists() else 0
        self._tail = EventTail(run.events_file, size)
        self._failure: dict[str, Any] | None = None
        self._written_at = 0.0
        previous = read_json(run.status_file) if run.status_file.exists() else {}
        self._worked_before = float(previous.get("worked_seconds") or 0.0)
        self._began: float | None = None
        self._status: dict[str, Any] = {
            "run_id": run.run_id,
            "state": "running",
            "phase": None,
            "phases": dict(previous.get("phases", {})),
            "failure": None,
            "message": "",
            "detail": [],
            "started": previous.get("started"),
            "worked_seconds": self._worked_before,
            "step": previous.get("step", 0),
            "total_steps": previous.get("total_steps"),
            "loss": previous.get("loss"),
            "learning_rate": previous.get("learning_rate"),
            "tokens_per_second": None,
            "eta_seconds": None,
            "supervisor": lock.owner.to_json(),
            "price": request.get("price"),
        }

    def unfinished(self) -> list[str]:
        """Return the phases that were asked for, or begun, and have not succeeded yet."""
        known = self._status["phases"]
        begun = [phase for phase in PHASES if phase in known]
        phases = [*self._request["phases"], *begun]
        return [p for p in dict.fromkeys(phases) if known.get(p) != "succeeded"]

    def run(self, phases: list[str]) -> int:
        self._refuse_spent()
        signal.signal(signal.SIGTERM, self._request_stop)
        signal.signal(signal.SIGINT, self._request_stop)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        owed = any(self._status["phases"].get(p) != "succeeded" for p in self._request["phases"])
        if not self._await_turn(phases):
            message = f"it left the queue; `inv resume --run {self._run.run_id}` joins it again"
            self._end(Outcome("stopped", None, message))
            return 0
        try:
            return self._work(phases, owed=owed)
        finally:
            if self._turn:
                self._turn.release()

    def afterwards(self) -> None:
        """Do what was ordered for after the success."""
        if self._after and self._ordered:
            in_turn = self._turn is not None
            carry_out(self._after, self._run, lambda: self._stop_requests > 0, in_turn=in_turn)

    def _work(self, phases: list[str], *, owed: bool) -> int:
        self._began = time.monotonic()
        self._status["started"] = self._status["started"] or time.time()
        self._status["state"] = "running"
        self._sampler.start()
        self._run.emit("run_started", phases=phases)
        self._queue(phases)
        outcome = Outcome("succeeded")
        for phase in phases:
            outcome = self._run_phase(phase)
            self._status["phases"][phase] = outcome.state
            if outcome.state != "succeeded":
                break
            # The fetch phase writes there where the base model lies.
            self._request = self._run.request()
        done = outcome.state == "succeeded" and owed
        if self._after and done and set(self._request["phases"]) <= self._succeeded():
            self._ordered = True
            told = f"`{shlex.join(self._after.command)}` in {self._after.seconds:.0f} s; "
            told += f"`inv stop --run {self._run.run_id}` prevents it"
            self._run.emit("after_command", text=told, **asdict(self._after))
        self._end(outcome)
        return 1 if outcome.state == "failed" else 0

    def _end(self, outcome: Outcome) -> None:
        # The event first: whoever reads a final state has everything that came before.
        self._run.emit("run_ended", state=outcome.state, failure=outcome.failure)
        self._write(
            state=outcome.state,
            failure=outcome.failure,
            message=outcome.message,
            detail=list(outcome.detail),
        )

    def _succeeded(self) -> set[str]:
        return {phase for phase, state in self._status["phases"].items() if state == "succeeded"}

    def _queue(self, phases: list[str]) -> None:
        for phase in phases:
            self._status["phases"][phase] = "queued"

    def _await_turn(self, phases: list[str]) -> bool:
        """Take the turn of the folder of runs, if the request wants one; wait if it says so.

        Returns False when a stop was asked for meanwhile. Raises UsageError when another
        run has it and this one does not wait.
        """
        wanted = self._request.get("turn")
        if wanted is None:
            return True
        if wanted not in ("refuse", "wait"):
            raise UsageError(f"run.json: unknown turn {wanted!r}; known are refuse, wait")
        runs, run_id = self._run.path.parent, self._run.run_id
        self._turn, ahead = turns.take(runs, run_id)
        if self._turn is None and wanted == "refuse":
            raise UsageError(
                f"run {ahead[0]} works on this host, and one run works at a time; `inv attach "
                f"--run {ahead[0]}` follows it, `inv train --queue` waits for its end"
            )
        if self._turn is None:
            self._queue(phases)
            with turns.Ticket(runs, run_id) as ticket:
                self._wait(ticket)
        return self._turn is not None

    def _wait(self, ticket: turns.Ticket) -> None:
        told: list[str] = []
        while not self._stop_requests:
            self._turn, ahead = ticket.take()
            if self._turn is not None:
                break
            if ahead != told:
                told = ahead
                self._run.emit("queued", ahead=ahead)
                self._write(state="queued", ahead=ahead)
            time.sleep(_POLL_SECONDS)
        self._status.pop("ahead", None)

    def _worked(self) -> float:
        """Return how many seconds this run has worked in all, its resumes included."""
        now = 0.0 if self._began is None else time.monotonic() - self._began
        return self._worked_before + now

    def _refuse_spent(self) -> None:
        limit = self._limits.max_seconds
        if limit is not None and self._worked_before >= limit:
            raise UsageError(
                f"run {self._run.run_id} has worked {_hours(self._worked_before)}, and its "
                f"max-hours is {_hours(limit)}; `inv resume --run {self._run.run_id} "
                "--max-hours N` gives it more"
            )

    def _mind_limit(self) -> None:
        """Ask for a checkpoint and an end when the run has worked as long as it may."""
        limit = self._limits.max_seconds
        if limit is None or self._stop_requests or self._worked() < limit:
            return
        self._spent = True
        self._stop_requests += 1
        self._run.emit("limit", what="max-hours", seconds=limit)

    def _pause(self, seconds: float) -> None:
        """Wait, unless a stop is asked for."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._stop_requests:
            time.sleep(_POLL_SECONDS)

    def _request_stop(self, _signum: int, _frame: FrameType | None) -> None:
        self._stop_requests += 1

    def _run_phase(self, phase: str) -> Outcome:
        began = time.monotonic()
        outcome = self._attempts(phase)
        if outcome.failure is not None:
            advice = CLASSES[outcome.failure].advice.replace("RUN", self._run.run_id)
            outcome = replace(outcome, message=f"{outcome.message}; {advice}")
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
            locks = [self._lock.descriptor, *([self._turn.descriptor] if self._turn else [])]
            variables = self._environment()
            ended = self._follow(Attempt(self._run, phase, variables, locks, self._place))
            outcome = self._judge(ended)
            if outcome.failure is None or self._stop_requests:
                return outcome
            if outcome.failure == "gpu_oom" and phase == "train" and self._step_down():
                continue
            restarts += 1
            stalls += ended.stalled
            retry = CLASSES[outcome.failure].retry if outcome.retry is None else outcome.retry
            if not retry or restarts > self._limits.restarts or stalls > 1:
                return outcome
            self._run.emit("restarting", phase=phase, failure=outcome.failure, why=outcome.message)
            if outcome.retry:
                self._pause(self._limits.retry_seconds * 2 ** (restarts - 1))
                if self._stop_requests:
                    return self._stopped()

    def _follow(self, attempt: Attempt) -> Ended:
        """Watch a worker until it ends, and keep status.json fresh."""
        asked = 0
        asked_at = 0.0
        self._failure = None
        while (ended := attempt.poll()) is None:
            self._mind_limit()
            if self._stop_requests > asked:
                # A second request means: now.
                attempt.request_stop() if asked == 0 else attempt.kill()
                asked, asked_at = self._stop_requests, time.monotonic()
            if asked and time.monotonic() - asked_at > self._limits.stop_seconds:
                attempt.kill()
            if attempt.silent_seconds() > self._patience(attempt):
                attempt.mark_stalled(self._limits.dump_seconds)
            self._take_events(attempt)
            self._refresh(attempt)
            time.sleep(_POLL_SECONDS)
        self._take_events(attempt)
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
            return self._stopped()
        if ended.code == FAILED and self._failure is not None:
            return Outcome(
                "failed",
                self._failure["failure"],
                self._failure["message"],
                tuple(self._failure["detail"]),
                self._failure.get("retry"),
            )
        failure, message = classify_exit(ended.code, ended.log_tail, oom_killed=ended.oom_killed)
        tail = ended.log_tail.splitlines()[-12:]
        self._run.emit("failure", failure=failure, message=message, detail=tail)
        return Outcome("failed", failure, message, tuple(tail))

    def _stopped(self) -> Outcome:
        resume = f"inv resume --run {self._run.run_id}"
        if not self._spent:
            return Outcome("stopped", None, f"`{resume}` continues it")
        limit = _hours(self._limits.max_seconds or 0.0)
        return Outcome(
            "stopped", None, f"max-hours reached ({limit}); `{resume} --max-hours N` continues it"
        )

    def _take_events(self, attempt: Attempt) -> None:
        """Carry what the worker reported into the status."""
        for event in self._tail.new():
            if event["event"] == "progress":
                # A phase without steps: a download may well take hours.
                attempt.sign()
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
        self._status["worked_seconds"] = round(self._worked(), 1)
        if gpus := self._sampler.newest():
            self._status["gpu"] = gpus
        else:
            self._status.pop("gpu", None)
        self._status["updated"] = time.time()
        self._written_at = time.monotonic()
        write_json(self._run.status_file, self._status)

    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = yaml.safe_load(self._run.config_file.read_text(encoding="utf-8"))
        return self._run.settled(config | self._adjustments())

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

        PYTHONPATH and user site-packages are left out unless the request names them, and then
        they are for what a worker starts: itself it takes code from its environment alone.
        """
        environment = isolated.variables(os.environ)
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        programs = str(Path(sys.executable).parent)
        environment["PATH"] = f"{programs}{os.pathsep}{environment['PATH']}"
        environment["PYTHONUNBUFFERED"] = "1"
        return environment | {k: str(v) for k, v in (self._request.get("env") or {}).items()}


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h"
