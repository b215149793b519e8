"""A process and its descendants: found through /proc, ended together."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from tunesmith.job.run.process import Identity, identify
from tunesmith.job.services.records import BoardTraining
from tunesmith.job.system.processes import stat_fields

_GRACE_SECONDS = 8.0


def descendants(pid: int) -> list[int]:
    """Return the processes below `pid`, parents before their children."""
    below: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = stat_fields(int(entry.name))
        except OSError:
            continue  # ended meanwhile
        if fields[0] != "Z":
            below.setdefault(int(fields[1]), []).append(int(entry.name))
    pids = [pid]
    for one in pids:
        pids += below.get(one, [])
    return pids[1:]


def command_of(pid: int) -> list[str]:
    """Return the argv of a process, empty if it has ended."""
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return []
    return [word.decode(errors="replace") for word in raw.split(b"\0")[:-1]]


def board_training(pid: int) -> BoardTraining | None:
    """Return the training that a Board runs, None if there is none.

    The Board starts `llamafactory-cli train FOLDER/training_args.yaml` (webui/runner.py,
    0.9.3), for evaluations too.
    """
    for child in descendants(pid):
        argv = command_of(child)
        if "train" in argv and any(Path(word).name == "llamafactory-cli" for word in argv):
            return {"pid": child, "folder": str(Path(argv[-1]).parent)}
    return None


def end_tree(pid: int) -> None:
    """End a process and its descendants: terminate them first, kill them after a grace period."""
    everyone = []
    for one in (pid, *descendants(pid)):
        with contextlib.suppress(ProcessLookupError):  # ended meanwhile
            everyone.append(identify(one))
    for number in (signal.SIGTERM, signal.SIGKILL):
        for member in everyone:
            if not _has_ended(member):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member.pid, number)
        deadline = time.monotonic() + _GRACE_SECONDS
        while time.monotonic() < deadline:
            if all(_has_ended(member) for member in everyone):
                return
            time.sleep(0.05)


def _has_ended(process: Identity) -> bool:
    """Whether a process has ended with all its threads.

    If only its first thread has ended, the process is a zombie, but its sockets are still open.
    """
    if process.alive():
        return False
    try:
        return len(list(Path(f"/proc/{process.pid}/task").iterdir())) <= 1
    except (FileNotFoundError, ProcessLookupError):
        return True
