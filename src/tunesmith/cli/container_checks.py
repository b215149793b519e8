"""What a container may lack: a mount, shared memory, a GPU. Said before any work begins."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from tunesmith.cli.command import ROOT
from tunesmith.core import formats
from tunesmith.core.errors import UsageError

WORKSPACE = Path("/workspace")
# NCCL and data loaders pass batches through it; Docker gives 64 MB unless told.
SHM = "/dev/shm"  # noqa: S108 - looked at, not written to
SHM_BYTES = 1_000_000_000


def missing(mounts: str, owner: tuple[int, int], writable: bool) -> UsageError | None:
    """Return why /workspace cannot be worked in, or None.

    `mounts` is /proc/self/mountinfo, whose fifth field is a mount's place; `owner` is the
    uid and gid of /workspace.
    """
    places = [line.split()[4] for line in mounts.splitlines()]
    if str(WORKSPACE) not in places:
        return UsageError(
            f"nothing is mounted on {WORKSPACE}, and a run would be lost with the container",
            hint='add `-v "$PWD:/workspace"` to docker run',
        )
    if not writable:
        return UsageError(
            f"{WORKSPACE} belongs to {owner[0]}:{owner[1]} and this container runs as "
            f"{os.getuid()}:{os.getgid()}",
            hint=f"add `--user {owner[0]}:{owner[1]}` to docker run",
        )
    return None


def short_of_shm(config: Mapping[str, Any], size: int, gpus: int) -> UsageError | None:
    """Return why a config cannot be trained with `size` bytes of /dev/shm, or None."""
    workers = int(config.get("dataloader_num_workers") or 0)
    if size >= SHM_BYTES or (workers == 0 and gpus < 2):
        return None
    who = f"dataloader_num_workers is {workers}" if workers else f"there are {gpus} GPUs"
    return UsageError(
        f"{SHM} has {formats.size(size)} and {who}, which pass data through it",
        hint="add `--shm-size 8g` to docker run",
    )


def gpus() -> int:
    """Return how many GPUs the container was given."""
    devices = [path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()]
    return len(devices) or int(Path("/dev/dxg").exists())


def mount_fault(*, writing: bool = True) -> UsageError | None:
    """Return why this container's /workspace cannot be worked in, or None."""
    status = WORKSPACE.stat()
    mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8")
    may = not writing or os.access(WORKSPACE, os.W_OK)
    return missing(mounts, (status.st_uid, status.st_gid), may)


def prepare() -> None:
    """Refuse a container that cannot do a run's work, and let a signal end it well."""
    if fault := mount_fault():
        raise fault
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)


def _end(number: int, _frame: FrameType | None) -> None:
    """Ask the run that is worked on here for a checkpoint; with none, end."""
    from tunesmith.job.run.folder import RunFolder
    from tunesmith.project import Project

    asked = False
    for file in Project.at(ROOT).runs.glob("*/status.json"):
        owner = RunFolder(file.parent).status().supervisor
        # A pid of another container may be in use here, too: alive() tells them apart.
        if owner and owner.alive():
            os.kill(owner.pid, signal.SIGTERM)
            asked = True
    if not asked:
        raise SystemExit(128 + number)


def say_device() -> None:
    """Say so when the work will be done without a GPU."""
    from tunesmith.cli.console import say

    if not gpus():
        say(
            "no GPU is seen here, so the CPU does it; with the NVIDIA container toolkit "
            "`--gpus all` gives one"
        )


def find_config(config: Path) -> Path:
    """Return a config that is here: below /workspace, or the image's own."""
    from tunesmith.project import Project

    found = Project.at(ROOT).find(config)
    if not found.is_file():
        raise UsageError(
            f"{config}: not in the container, which sees what is mounted on {WORKSPACE}",
            hint="give the path from there, e.g. configs/train/NAME.yaml",
        )
    return found


def check_shm(config: Mapping[str, Any]) -> None:
    """Refuse a config that needs more shared memory than the container has."""
    room = os.statvfs(SHM)
    if fault := short_of_shm(config, room.f_blocks * room.f_frsize, gpus()):
        raise fault
