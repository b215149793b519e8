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
    arguments = ("run", str(run.path), *phases, "--cause", cause)
    _refuse_disk(run)
    with run.log_file.open("ab") as log:
        offset = log.tell()
        process = subprocess.Popen(
            isolated.argv(sys.executable, "tunesmith.job", *arguments),
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
        # Before reading the status, so that its last write is not missed.
        code = process.poll()
        if code == 0 or (identity is not None and _supervisor(run) == identity):
            return
        if code is not None:
            output = run.log_file.read_bytes()[offset:].decode("utf-8", "replace").strip()
            if not output:
                _refuse_disk(run)  # it was full by then
            first, *detail = output.splitlines() or [f"exit code {code}"]
            kind = UsageError if code == UsageError.exit_code else TunesmithError
            raise kind(first, [line.strip() for line in detail])
        time.sleep(0.05)
    if run.busy():
        return  # it runs; its disk is full and did not take the first status
    raise TunesmithError(
        f"run {run.run_id}: no supervisor after {formats.duration(_START_SECONDS)}"
    )


def _refuse_disk(run: RunFolder) -> None:
    # With a reserve file a supervisor is running, or the next one has its space.
    size = 1 if run.reserve_file.exists() else disk.RESERVE_BYTES
    if (error := disk.refusal(run.path, size)) is not None and not run.busy():
        raise UsageError(
            f"run {run.run_id} cannot start: {disk.describe(run.path, error)}, then "
            f"`inv resume --run {run.run_id}`"
        )


def stop(run_dir: Path) -> None:
    """Request a checkpoint and the end of a run. Raises UsageError if it is not running."""
    run = RunFolder(run_dir.resolve())
    run.request()
    status = run.status()
    # The supervisor of a host's run is on that host, whatever its pid there.
    own = run.busy() or not run.is_copy
    owner = status.supervisor if own else None
    if owner is None or not owner.alive():
        owner = run.owner()  # the disk may have refused its status
    if owner is None or not owner.alive():
        raise UsageError(f"run {run.run_id} is not running (state: {status.state})")
    os.kill(owner.pid, signal.SIGTERM)


def _keeps_to_itself(run: RunFolder) -> bool:
    """Whether results are in the run's folder; elsewhere the user's umask applies."""
    return output_of(run).is_relative_to(run.path)


def _supervisor(run: RunFolder) -> Identity | None:
    """Return the process identity in status.json: a pid alone is reused after a restart."""
    status = run.last_status()
    return status.supervisor if status else None
