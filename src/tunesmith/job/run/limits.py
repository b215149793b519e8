"""What follows a run that has succeeded: the command of run.json's `after`, or of a client."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Callable
from typing import Any

from tunesmith.core.errors import UsageError
from tunesmith.job.run import queue
from tunesmith.job.run.events import CommandAnnounced, CommandEnded, read_events
from tunesmith.job.run.folder import RunFolder
from tunesmith.job.run.schema import PostRunCommand
from tunesmith.job.system import disk

_AFTER_TIMEOUT_SECONDS = 60.0

Emit = Callable[..., None]


def carry_out(
    after: PostRunCommand,
    run: RunFolder,
    emit: Emit,
    stop_wanted: Callable[[], bool],
    *,
    in_turn: bool,
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
        slot, busy = queue.take(run.path.parent, run.run_id) if in_turn else (None, [])
        busy = busy or _busy_if_known(run)
        if busy:
            why = f"run {busy[0]} needs the host"
        else:
            code, why = _call(after, run)
        if slot:
            slot.release()
    emit("after_command_ended", code=code, why=why)


def once(run: RunFolder, command: list[str]) -> tuple[int | None, str | None]:
    """Run the command now: a client has what it wanted of a run that has succeeded.

    With the turn of the folder of runs, so that none begins meanwhile, and once for a run:
    of two clients one does it, and one that comes another day finds it done, unless the run's
    disk took no record of it. Returns the exit code, or None and why there is none. Raises
    UsageError when it must not be run.
    """
    slot, ahead = queue.take(run.path.parent, run.run_id)
    try:
        if ahead := ahead or _busy(run):
            raise UsageError(f"run {ahead[0]} needs the host")
        if (state := run.status().state) != "succeeded":
            raise UsageError(f"run {run.run_id} is {state}")
        if _done(run):
            raise UsageError(f"run {run.run_id} has had its `{shlex.join(command)}`")
        # Before it is done: after a power-off nobody is left to write.
        _tell(run, "after_command", text=f"now `{shlex.join(command)}`", command=command)
        code, why = _call(PostRunCommand(tuple(command), "succeeded", 0.0), run)
        _tell(run, "after_command_ended", code=code, why=why)
    finally:
        if slot:
            slot.release()
    return code, why


def _done(run: RunFolder) -> bool:
    """Whether a command was begun after the run, and not found to fail."""
    kinds = (CommandAnnounced, CommandEnded)
    last = [event for event in read_events(run.events_file) if isinstance(event, kinds)][-1:]
    return bool(last) and (not isinstance(last[0], CommandEnded) or last[0].code == 0)


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


def _call(after: PostRunCommand, run: RunFolder) -> tuple[int | None, str | None]:
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
