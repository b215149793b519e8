"""`python -m tunesmith.job run|start RUN [PHASE ...]`: work on a run folder.

run    work here, in the foreground, until the phases are done (the image's way)
start  start the same in a session of its own and return when it has the run's lock
stop   ask the supervisor of RUN for a checkpoint and an end
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tunesmith.errors import TunesmithError, UsageError
from tunesmith.files import read_json
from tunesmith.job.identity import Identity
from tunesmith.job.rundir import RunFolder
from tunesmith.job.supervisor import supervise

_START_SECONDS = 30.0


def start(run_dir: Path, phases: list[str]) -> None:
    """Start a supervisor that nothing here can take down, and wait until it has the lock.

    Its session, stdin and output are its own, so a dropped SSH connection or a closed
    terminal changes nothing for it. Raises what the supervisor refused with.
    """
    run = RunFolder(run_dir.resolve())
    run.request()
    with run.log_file.open("ab") as log:
        began = log.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "tunesmith.job", "run", str(run.path), *phases],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=run.path,
            start_new_session=True,
        )
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        code = process.poll()
        if code is not None and code != 0:
            message = run.log_file.read_bytes()[began:].decode("utf-8", "replace").strip()
            raise (UsageError if code == 2 else TunesmithError)(message or f"exit code {code}")
        if code == 0 or _supervisor_pid(run) == process.pid:
            return
        time.sleep(0.05)
    raise TunesmithError(f"run {run.run_id}: no supervisor after {_START_SECONDS:.0f} s")


def stop(run_dir: Path) -> None:
    """Ask the run's supervisor for a checkpoint and an end. Raises UsageError if none runs."""
    run = RunFolder(run_dir.resolve())
    status = run.status()
    owner = Identity.from_json(status["supervisor"]) if "supervisor" in status else None
    if owner is None or not owner.alive():
        raise UsageError(f"run {run.run_id} is not running (state: {status['state']})")
    os.kill(owner.pid, signal.SIGTERM)


def _supervisor_pid(run: RunFolder) -> int | None:
    try:
        return int(read_json(run.status_file)["supervisor"]["pid"])
    except FileNotFoundError:
        return None


def main() -> int:
    """Parse the command line, do it, and return the exit code (2: misuse)."""
    parser = argparse.ArgumentParser(prog="python -m tunesmith.job", description=__doc__)
    parser.add_argument("verb", choices=("run", "start", "stop"))
    parser.add_argument("run", type=Path)
    parser.add_argument("phases", nargs="*")
    arguments = parser.parse_args()
    try:
        if arguments.verb == "run":
            return supervise(arguments.run, arguments.phases or None)
        if arguments.verb == "start":
            start(arguments.run, arguments.phases)
        else:
            stop(arguments.run)
    except TunesmithError as error:
        print(error.render(), file=sys.stderr, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
