"""What run.json orders beside the phases: how patient to be, and what comes after."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tunesmith.core.errors import UsageError
from tunesmith.job.run import queue
from tunesmith.job.run.folder import RunFolder, read_events
from tunesmith.job.system import disk

# Between the end of a run and what was ordered for after it: time to say no.
AFTER_SECONDS = 10.0
_AFTER_TIMEOUT_SECONDS = 60.0

Emit = Callable[..., None]


@dataclass(frozen=True)
class Limits:
    """How patient the supervisor is. Seconds, unless the name says otherwise.

    A worker is stalled when no step was finished for `stall_seconds` and for
    `stall_steps` times the median step. `restarts` counts restarts in a row that reached
    no new checkpoint: a worker that gets further each time may fall as often as it likes.
    A failure that may pass by itself (a source out of reach) is tried again after
    `retry_seconds`, doubled each time. `max_seconds` is how long the run may work in all,
    restarts and resumes together; None sets no limit. `last_words_seconds`: how long the
    end of a run waits for a disk that takes nothing at all.
    """

    restarts: int = 3
    stall_seconds: float = 900.0
    stall_steps: float = 10.0
    dump_seconds: float = 5.0
    stop_seconds: float = 600.0
    disk_wait_seconds: float = 1800.0
    retry_seconds: float = 15.0
    last_words_seconds: float = 10.0
    max_seconds: float | None = None

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
class After:
    """The command to run, `seconds` after the run has succeeded."""

    command: list[str]
    seconds: float = AFTER_SECONDS

    @classmethod
    def from_request(cls, request: dict[str, Any]) -> After | None:
        """Read request["after"]; None without one."""
        after = request.get("after")
        if after is None:
            return None
        command = after.get("command")
        if after.get("when") != "succeeded" or not command or not isinstance(command, list):
            wanted = '{"command": [...], "when": "succeeded"}'
            raise UsageError(f"run.json: after: expected {wanted}, found {after}")
        words = [str(word) for word in command]
        return cls(words, float(after.get("seconds", AFTER_SECONDS)))


def carry_out(
    after: After, run: RunFolder, emit: Emit, stop_wanted: Callable[[], bool], *, in_turn: bool
) -> None:
    """Run the command, unless a stop is asked for before, or another run needs the host.

    `in_turn`: with the turn of the folder of runs, so that none begins meanwhile. How it
    went is told by an `after_command_ended` event. The run's disk may refuse everything: a
    host that is paid by the hour is switched off all the same.
    """
    until = time.monotonic() + after.seconds
    while time.monotonic() < until and not stop_wanted():
        time.sleep(0.2)
    code, why = None, "a stop was asked for" if stop_wanted() else None
    if why is None:
        turn, busy = queue.take(run.path.parent, run.run_id) if in_turn else (None, [])
        busy = busy or _busy_if_known(run)
        if busy:
            why = f"run {busy[0]} needs the host"
        else:
            code, why = _call(after, run)
        if turn:
            turn.release()
    emit("after_command_ended", code=code, why=why)


def once(run: RunFolder, command: list[str]) -> tuple[int | None, str | None]:
    """Run the command now: a client has what it wanted of a run that has succeeded.

    With the turn of the folder of runs, so that none begins meanwhile, and once for a run:
    of two clients one does it, and one that comes another day finds it done, unless the run's
    disk took no record of it. Returns the exit code, or None and why there is none. Raises
    UsageError when it must not be run.
    """
    turn, ahead = queue.take(run.path.parent, run.run_id)
    try:
        if ahead := ahead or _busy(run):
            raise UsageError(f"run {ahead[0]} needs the host")
        if (state := run.status()["state"]) != "succeeded":
            raise UsageError(f"run {run.run_id} is {state}")
        if _done(run):
            raise UsageError(f"run {run.run_id} has had its `{shlex.join(command)}`")
        # Before it is done: after a power-off nobody is left to write.
        _tell(run, "after_command", text=f"now `{shlex.join(command)}`", command=command)
        code, why = _call(After(command, 0.0), run)
        _tell(run, "after_command_ended", code=code, why=why)
    finally:
        if turn:
            turn.release()
    return code, why


def _done(run: RunFolder) -> bool:
    """Whether a command was begun after the run, and not found to fail."""
    names = ("after_command", "after_command_ended")
    told = [event for event in read_events(run.events_file) if event["event"] in names]
    return bool(told) and (told[-1]["event"] == "after_command" or told[-1]["code"] == 0)


def _busy(run: RunFolder) -> list[str]:
    folders = [file.parent for file in run.path.parent.glob("*/run.json")]
    return sorted(folder.name for folder in folders if RunFolder(folder).busy())


def _busy_if_known(run: RunFolder) -> list[str]:
    try:
        return _busy(run)
    except OSError as error:
        if not disk.refused(error):
            raise
        return []  # nobody works on a disk that cannot even be read


def _call(after: After, run: RunFolder) -> tuple[int | None, str | None]:
    """Return the exit code, or None and why there is none. Output goes to train.log."""
    log = disk.open_log(run.log_file)
    try:
        done = subprocess.run(
            after.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=_AFTER_TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, str(error)
    finally:
        os.close(log)
    return done.returncode, None


def _tell(run: RunFolder, event: str, **fields: Any) -> None:
    """Record an event; the command it is about does not depend on the disk."""
    try:
        run.emit(event, **fields)
    except OSError as error:
        if not disk.refused(error):
            raise
