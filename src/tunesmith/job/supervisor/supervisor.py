"""The supervisor: owns a run from its first phase to its last.

One process with its own session and the run's lock: it starts a worker for each phase, follows
its heartbeat, passes on stop requests, restarts a failed worker from the newest sealed
checkpoint, and writes status.json. Standard library and yaml only, so that it starts at once and
is not affected by problems of the worker. Nor by the run's disk: refused writes are kept in memory
(job/run/journal.py), and limits, stops and the command after the run need no disk.
"""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from tunesmith.core import formats
from tunesmith.core.errors import UsageError
from tunesmith.job.run import events, integrity, queue
from tunesmith.job.run.adjustments import refusal, step_down
from tunesmith.job.run.exit_codes import FAILED, STOPPED
from tunesmith.job.run.failures import CLASSES
from tunesmith.job.run.folder import (
    PHASES,
    RunFolder,
    RunLock,
    acquire,
)
from tunesmith.job.run.journal import Journal
from tunesmith.job.run.limits import carry_out
from tunesmith.job.run.relay import RELAY
from tunesmith.job.run.schema import Cause, Limits, RunRequest
from tunesmith.job.supervisor import preparation, workplace
from tunesmith.job.supervisor.attempt import Attempt, Ended, end_workers
from tunesmith.job.supervisor.intake import Intake
from tunesmith.job.supervisor.outcome import Outcome, crashed, refused, reported
from tunesmith.job.supervisor.record import StatusRecord
from tunesmith.job.system import disk

_POLL_SECONDS = 0.2
_PROBE_SECONDS = 1.0
T = TypeVar("T")


def supervise(run_dir: Path, phases: list[str] | None = None, cause: Cause = "user") -> int:
    """Run the phases of `run_dir`, by default those not yet succeeded; `cause` is the reason.

    Returns 0 if they succeeded or were stopped on request, 1 if one failed. Raises UsageError,
    without changing anything, if the folder is not a run, a phase is unknown, another process
    works in it, another run has the turn, its time is used up, or its disk refuses writes.
    """
    run = RunFolder(run_dir.resolve())
    request = run.request()
    request.needed_phases()
    if run.config_file.exists():
        run.config()
    run.adjustments()
    unknown = [phase for phase in phases or [] if phase not in PHASES]
    if unknown:
        raise UsageError(f"unknown phase {unknown[0]!r}; known are {', '.join(PHASES)}")
    lock = acquire(run)
    journal = Journal(run)
    try:
        end_workers(run)
        preparation.make_room(run, journal)
        with workplace.of(run) as working_folder:
            supervisor = _Supervisor(run, request, lock, journal, working_folder, cause)
            code = supervisor.run(phases or supervisor.unfinished())
    finally:
        journal.close()
        lock.release()
    supervisor.afterwards()
    return code


class _Supervisor:
    def __init__(
        self,
        run: RunFolder,
        request: RunRequest,
        lock: RunLock,
        journal: Journal,
        working_folder: Path,
        cause: Cause = "user",
    ) -> None:
        self._run = run
        self._working_folder = working_folder
        self._journal = journal
        self._cause = cause
        self._emit = journal.emit
        self._intake = Intake(run, journal)
        self._request = request
        self._lock = lock
        self._limits = request.limits or Limits()
        self._after = request.after
        self._command_due = False
        self._slot: queue.Slot | None = None
        self._stop_requests = 0
        self._spent = False
        self._failure: events.Failure | None = None
        self._record = StatusRecord(run, journal, lock.owner, request.price, cause)

    def unfinished(self) -> list[str]:
        """Return the phases that were requested or begun and have not succeeded yet."""
        states = self._record.now.phases
        begun = [phase for phase in PHASES if phase in states]
        phases = [*self._request.needed_phases(), *begun]
        return [p for p in dict.fromkeys(phases) if states.get(p) != "succeeded"]

    def run(self, phases: list[str]) -> int:
        worked = self._record.worked_before
        preparation.refuse_spent(self._run.run_id, worked, self._limits.max_seconds)
        signal.signal(signal.SIGTERM, self._request_stop)
        signal.signal(signal.SIGINT, self._request_stop)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        owed = not set(self._request.needed_phases()) <= self._record.succeeded()
        if not self._await_slot(phases):
            message = f"it left the queue; `inv resume --run {self._run.run_id}` joins it again"
            self._end(Outcome("stopped", None, message))
            return 0
        try:
            return self._work(phases, owed=owed)
        finally:
            if self._slot:
                self._slot.release()

    def afterwards(self) -> None:
        """Run the command that was requested for after a success."""
        if self._after and self._command_due:
            in_turn = self._slot is not None
            after, run = self._after, self._run
            carry_out(after, run, self._emit, lambda: self._stop_requests > 0, in_turn=in_turn)

    def _work(self, phases: list[str], *, owed: bool) -> int:
        self._record.begin()
        self._record.change(cause=self._cause)
        self._emit("run_started", phases=phases, cause=self._cause)
        now = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime())
        self._journal.log(
            f"{now} run {self._run.run_id} started ({self._cause}): {', '.join(phases)}"
        )
        self._record.set_phases(phases, "queued")
        outcome = Outcome("succeeded")
        for phase in phases:
            outcome = self._run_phase(phase)
            self._record.set_phases([phase], outcome.state)
            if outcome.state != "succeeded":
                break
        done = outcome.state == "succeeded" and owed
        if self._after and done and set(self._request.needed_phases()) <= self._record.succeeded():
            self._command_due = True
            text = (
                f"`{shlex.join(self._after.command)}` in {formats.duration(self._after.seconds)}; "
            )
            text += f"`inv stop --run {self._run.run_id}` prevents it"
            self._emit("after_command", text=text, **asdict(self._after))
        self._end(outcome)
        return 1 if outcome.state == "failed" else 0

    def _end(self, outcome: Outcome) -> None:
        # The event first, so that a reader of a final state has everything before it.
        self._emit("run_ended", state=outcome.state, failure=outcome.failure)
        self._record.write(
            state=outcome.state,
            failure=outcome.failure,
            message=outcome.message,
            detail=list(outcome.detail),
        )
        stops_before = self._stop_requests
        seconds = self._limits.last_words_seconds
        if not self._journal.last_words(seconds, lambda: self._stop_requests > stops_before):
            why = self._journal.trouble and disk.describe(self._run.path, self._journal.trouble)
            message = f"run {self._run.run_id}: {outcome.state}, not recorded there: {why}"
            print(message, file=sys.stderr, flush=True)

    def _await_slot(self, phases: list[str]) -> bool:
        """Take the turn in the folder of runs, if the request needs one; wait if it says so.

        Returns False if a stop was requested meanwhile. Raises UsageError if another run has the
        turn and this one does not wait.
        """
        turn = self._request.turn
        if turn is None:
            return True
        runs, run_id = self._run.path.parent, self._run.run_id
        self._slot, ahead = queue.take(runs, run_id)
        if self._slot is None and turn == "refuse":
            raise UsageError(
                f"run {ahead[0]} works on this host, and one run works at a time; `inv attach "
                f"--run {ahead[0]}` follows it, `inv train --queue` waits for its end"
            )
        if self._slot is None:
            self._record.set_phases(phases, "queued")
            with queue.QueueEntry(runs, run_id) as entry:
                self._wait(entry)
        return self._slot is not None

    def _wait(self, entry: queue.QueueEntry) -> None:
        announced: list[str] = []
        while not self._stop_requests:
            self._slot, ahead = entry.take()
            if self._slot is not None:
                self._cause = "queue"
                break
            if ahead != announced:
                announced = ahead
                self._emit("queued", ahead=ahead)
                self._record.write(state="queued", ahead=tuple(ahead))
            self._journal.flush()
            time.sleep(_POLL_SECONDS)
        self._record.change(ahead=())

    def _mind_limit(self) -> None:
        """Request a checkpoint and a stop when the run has reached its time limit."""
        limit = self._limits.max_seconds
        if limit is None or self._stop_requests or self._record.worked() < limit:
            return
        self._spent = True
        self._stop_requests += 1
        self._emit("limit", what="max-hours", seconds=limit)

    def _pause(self, seconds: float) -> None:
        """Wait, unless a stop is requested."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._stop_requests:
            self._mind_limit()
            self._journal.flush()
            time.sleep(_POLL_SECONDS)

    def _request_stop(self, _signum: int, _frame: FrameType | None) -> None:
        self._stop_requests += 1

    def _run_phase(self, phase: str) -> Outcome:
        began = time.monotonic()
        self._record.change(cause=self._cause, retried=None)
        outcome = self._attempts(phase)
        if outcome.failure is not None:
            advice = CLASSES[outcome.failure].advice.replace("RUN", self._run.run_id)
            outcome = replace(outcome, message=f"{outcome.message}; {advice}")
        seconds = round(time.monotonic() - began, 2)
        self._emit("phase_ended", phase=phase, state=outcome.state, seconds=seconds)
        return outcome

    def _attempts(self, phase: str) -> Outcome:
        """Run workers until one succeeds, a stop is requested, or a retry cannot help."""
        attempt, restarts, stalls, reached = 0, 0, 0, -1
        while True:
            attempt += 1
            step, ended, outcome = self._attempt(phase, attempt)
            restarts = 0 if step > reached else restarts
            reached = max(reached, step)
            if outcome.failure is None or self._stop_requests:
                return outcome
            if outcome.failure == "gpu_oom" and phase == "train":
                lowered = self._tried(lambda: step_down(self._run, self._emit))
                if lowered is True:
                    continue
                outcome = lowered or outcome
            restarts += 1
            stalls += ended is not None and ended.stalled
            if not outcome.may_pass() or restarts > self._limits.restarts or stalls > 1:
                return outcome
            if outcome.failure in (disk.FULL, disk.READ_ONLY) and not self._await_disk(outcome):
                return self._stopped() if self._stop_requests else outcome
            self._emit("restarting", phase=phase, failure=outcome.failure, why=outcome.message)
            self._record.change(cause="retry", retried=outcome.failure)
            if outcome.retry and outcome.failure not in (disk.FULL, disk.READ_ONLY):
                self._pause(self._limits.retry_seconds * 2 ** (restarts - 1))
                if self._stop_requests:
                    return self._stopped()

    def _attempt(self, phase: str, attempt: int) -> tuple[int, Ended | None, Outcome]:
        """Run one worker; return its first step (-1: none), its end and the outcome."""
        changed = self._tried(lambda: self._compared(phase))
        if changed is not None:
            return -1, None, changed
        newest = preparation.newest_step
        step = self._tried(lambda: newest(self._run, self._emit)) if phase == "train" else -1
        if isinstance(step, Outcome):
            return -1, None, step
        worker = self._tried(lambda: self._start(phase, attempt))
        if isinstance(worker, Outcome):
            return step, None, worker
        ended = self._follow(worker)
        outcome = self._judge(ended)
        if outcome.state == "succeeded":
            # The fetch phase writes the path of the base model there.
            request = self._tried(self._run.request)
            if isinstance(request, Outcome):
                return step, ended, request
            self._request = request
        return step, ended, outcome

    def _tried(self, do: Callable[[], T]) -> T | Outcome:
        """Return the result of `do`, or an outcome if the run's disk refused it."""
        try:
            return do()
        except OSError as error:
            if not disk.refused(error):
                raise
            return self._failed(refused(self._run.path, error))

    def _start(self, phase: str, attempt: int) -> Attempt:
        # Before the start is reported, so that the last worker's is not read as this one's.
        self._run.heartbeat_file.unlink(missing_ok=True)
        self._emit("phase_started", phase=phase, attempt=attempt)
        self._record.set_phases([phase], "running")
        self._record.write(phase=phase)
        locks = [self._lock.descriptor, *([self._slot.descriptor] if self._slot else [])]
        environment = preparation.worker_environment(self._request) | {RELAY: self._intake.address}
        return Attempt(self._run, phase, environment, locks, self._working_folder)

    def _await_disk(self, outcome: Outcome) -> bool:
        """Wait until the disk accepts writes again; return False if it did not in time."""
        full = outcome.failure == disk.FULL
        seconds = self._limits.disk_wait_seconds
        until = time.monotonic() + (seconds if full else min(seconds, disk.READ_ONLY_SECONDS))
        paused = False
        while (error := refusal(self._run)) is not None:
            self._mind_limit()
            if self._stop_requests or time.monotonic() > until:
                return False
            if not paused:
                paused = True
                why = disk.describe(self._run.path, error)
                self._emit("paused", step=self._record.now.step, why=why)
            self._record.refresh(None)
            time.sleep(_PROBE_SECONDS)
        if paused:
            self._emit("continued", step=self._record.now.step)
        return not self._stop_requests

    def _compared(self, phase: str) -> Outcome | None:
        """Compare the phase's inputs with seals and record; return None if nothing changed."""
        self._record.change(phase=phase)

        def on_text(text: str) -> None:
            self._emit("note", phase=phase, text=text)

        def on_progress(done: int, total: int) -> None:
            figures = {"done": done // 1_000_000, "total": max(1, total // 1_000_000)}
            self._emit("progress", phase=phase, **figures, unit="MB compared")
            self._mind_limit()
            self._record.write()
            if self._stop_requests:
                raise _StopRequested

        try:
            integrity.check(self._run.path, phase, on_text, on_progress)
        except _StopRequested:
            return self._stopped()
        except UsageError as error:
            self._emit("failure", phase=phase, failure="changed", **_words(error))
            return Outcome("failed", "changed", error.line, error.detail)
        return None

    def _follow(self, attempt: Attempt) -> Ended:
        """Watch a worker until it ends, and keep status.json fresh."""
        stops_seen = 0
        stopped_at = 0.0
        self._failure = None
        while (ended := attempt.poll()) is None:
            self._mind_limit()
            if self._stop_requests > stops_seen:
                # A second request means: at once.
                attempt.request_stop() if stops_seen == 0 else attempt.kill()
                stops_seen, stopped_at = self._stop_requests, time.monotonic()
            if stops_seen and time.monotonic() - stopped_at > self._limits.stop_seconds:
                attempt.kill()
            if attempt.silent_seconds() > self._patience(attempt):
                attempt.mark_stalled(self._limits.dump_seconds)
            self._take_events(attempt)
            self._record.refresh(attempt)
            time.sleep(_POLL_SECONDS)
        self._take_events(attempt)
        self._record.refresh(attempt)
        return ended

    def _patience(self, attempt: Attempt) -> float:
        """Return the seconds without a step that are still normal.

        Before the first step the pace is unknown (a large data set is tokenised, a large model
        read from a slow disk), so the limit is four times as long.
        """
        beat = attempt.heartbeat
        if beat is None or beat.step_seconds is None:
            return 4 * self._limits.stall_seconds
        return max(self._limits.stall_seconds, self._limits.stall_steps * beat.step_seconds)

    def _judge(self, ended: Ended) -> Outcome:
        if ended.code == 0:
            return Outcome("succeeded")
        if ended.stalled:
            return Outcome("failed", "stalled", "no step was finished for too long")
        if ended.code == STOPPED or (self._stop_requests and ended.code < 0):
            return self._stopped()
        if ended.code == FAILED and self._failure is not None:
            return reported(self._failure)
        return self._failed(crashed(ended, self._run.path, self._journal.trouble))

    def _failed(self, outcome: Outcome) -> Outcome:
        """Report a failure that no worker has reported."""
        self._emit(
            "failure",
            failure=outcome.failure,
            message=outcome.message,
            detail=list(outcome.detail),
        )
        return outcome

    def _stopped(self) -> Outcome:
        resume = f"inv resume --run {self._run.run_id}"
        if not self._spent:
            return Outcome("stopped", None, f"`{resume}` continues it")
        limit = formats.duration(self._limits.max_seconds or 0.0)
        return Outcome(
            "stopped", None, f"max-hours reached ({limit}); `{resume} --max-hours N` continues it"
        )

    def _take_events(self, attempt: Attempt) -> None:
        """Copy the worker's events to the status."""
        news = self._intake.new()
        for heartbeat in news.heartbeats:
            attempt.hear(heartbeat)
        for event in news.events:
            if isinstance(event, events.Progress):
                # A phase without steps: a download may take hours.
                attempt.sign()
            elif isinstance(event, events.Log):
                self._record.log(event)
            elif isinstance(event, events.Failure) and event.phase is not None:
                # Without a phase it is our own event, about the previous worker.
                self._failure = event


class _StopRequested(Exception):
    """A stop was requested while files were compared."""


def _words(error: UsageError) -> dict[str, Any]:
    return {"message": error.line, "detail": list(error.detail)}
