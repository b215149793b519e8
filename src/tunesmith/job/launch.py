"""Start a run in a session of its own, and ask one to stop. Standard library and yaml only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tunesmith import isolated
from tunesmith.errors import TunesmithError, UsageError
from tunesmith.files import read_json
from tunesmith.job.identity import Identity, identify
from tunesmith.job.rundir import RunFolder

_START_SECONDS = 30.0


def start(run_dir: Path, phases: list[str]) -> None:
    """Start a supervisor that nothing here can take down, and wait until it has the lock.

    Its session, stdin and output are its own, so a dropped SSH connection or a closed
    terminal changes nothing for it. A run that waits for its turn counts as started.
    Raises what the supervisor refused with.
    """
    run = RunFolder(run_dir.resolve())
    run.request()
    with run.log_file.open("ab") as log:
        began = log.tell()
        process = subprocess.Popen(
            isolated.argv(sys.executable, "tunesmith.job", "run", str(run.path), *phases),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=isolated.NOWHERE,
            env=isolated.variables(os.environ),
            start_new_session=True,
        )
    try:
        identity = identify(process.pid).to_json()
    except ProcessLookupError:
        identity = {}  # it has ended already
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        # Before the status is read: what it wrote last must not be missed.
        code = process.poll()
        if code == 0 or _supervisor(run) == identity:
            return
        if code is not None:
            said = run.log_file.read_bytes()[began:].decode("utf-8", "replace").strip()
            first, *detail = said.splitlines() or [f"exit code {code}"]
            kind = UsageError if code == UsageError.exit_code else TunesmithError
            raise kind(first, [line.strip() for line in detail])
        time.sleep(0.05)
    raise TunesmithError(f"run {run.run_id}: no supervisor after {_START_SECONDS:.0f} s")


def stop(run_dir: Path) -> None:
    """Ask the run's supervisor for a checkpoint and an end. Raises UsageError if none runs."""
    run = RunFolder(run_dir.resolve())
    run.request()
    status = run.status()
    owner = Identity.from_json(status["supervisor"]) if "supervisor" in status else None
    if owner is None or not owner.alive():
        raise UsageError(f"run {run.run_id} is not running (state: {status['state']})")
    os.kill(owner.pid, signal.SIGTERM)


def _supervisor(run: RunFolder) -> Any:
    """Return the identity in status.json: a pid alone comes again after a restart."""
    try:
        return read_json(run.status_file)["supervisor"]
    except FileNotFoundError:
        return None
