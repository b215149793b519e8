"""Start a run in a session of its own, and ask one to stop. Standard library and yaml only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tunesmith.core import formats, isolated
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.job.run.folder import RunFolder
from tunesmith.job.run.manifest import output_of
from tunesmith.job.run.process import Identity, identify
from tunesmith.job.run.schema import Cause
from tunesmith.job.system import disk

_START_SECONDS = 30.0


def start(run_dir: Path, phases: list[str], cause: Cause = "user") -> None:
    """Start a supervisor that nothing here can take down, and wait until it has the lock.

    Its session, stdin and output are its own, so a dropped SSH connection or a closed
    terminal changes nothing for it. A run that waits for its turn counts as started.
    Raises what the supervisor refused with, and UsageError naming a disk that takes nothing.
    """
    run = RunFolder(run_dir.resolve())
    run.request()
    words = ("run", str(run.path), *phases, "--cause", cause)
    _refuse_disk(run)
    with run.log_file.open("ab") as log:
        began = log.tell()
        process = subprocess.Popen(
            isolated.argv(sys.executable, "tunesmith.job", *words),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=isolated.NOWHERE,
            env=isolated.variables(os.environ),
            start_new_session=True,
            # What a run makes in its own folder is its owner's alone, as the folder is.
            umask=0o077 if _keeps_to_itself(run) else -1,
        )
    try:
        identity = identify(process.pid)
    except ProcessLookupError:
        identity = None  # it has ended already
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        # Before the status is read: what it wrote last must not be missed.
        code = process.poll()
        if code == 0 or (identity is not None and _supervisor(run) == identity):
            return
        if code is not None:
            said = run.log_file.read_bytes()[began:].decode("utf-8", "replace").strip()
            if not said:
                _refuse_disk(run)  # it was full by then
            first, *detail = said.splitlines() or [f"exit code {code}"]
            kind = UsageError if code == UsageError.exit_code else TunesmithError
            raise kind(first, [line.strip() for line in detail])
        time.sleep(0.05)
    if run.busy():
        return  # it works; its disk has filled up and does not take its first status
    raise TunesmithError(
        f"run {run.run_id}: no supervisor after {formats.duration(_START_SECONDS)}"
    )


def _refuse_disk(run: RunFolder) -> None:
    # Where a reserve lies a supervisor works, or the next one has its room.
    size = 1 if run.reserve_file.exists() else disk.RESERVE_BYTES
    if (error := disk.refusal(run.path, size)) is not None and not run.busy():
        raise UsageError(
            f"run {run.run_id} cannot start: {disk.describe(run.path, error)}, then "
            f"`inv resume --run {run.run_id}`"
        )


def stop(run_dir: Path) -> None:
    """Ask the run's supervisor for a checkpoint and an end. Raises UsageError if none runs."""
    run = RunFolder(run_dir.resolve())
    run.request()
    status = run.status()
    # Of a run that lives on a host the supervisor does too, whatever pid it has there.
    own = run.busy() or not run.is_copy
    owner = status.supervisor if own else None
    if owner is None or not owner.alive():
        owner = run.owner()  # its disk may not have taken its status
    if owner is None or not owner.alive():
        raise UsageError(f"run {run.run_id} is not running (state: {status.state})")
    os.kill(owner.pid, signal.SIGTERM)


def _keeps_to_itself(run: RunFolder) -> bool:
    """Whether results lie in the run's folder; elsewhere the user's umask says who sees them."""
    return output_of(run).is_relative_to(run.path)


def _supervisor(run: RunFolder) -> Identity | None:
    """Return the identity in status.json: a pid alone comes again after a restart."""
    status = run.last_status()
    return status.supervisor if status else None
