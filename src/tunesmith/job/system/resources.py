"""What this process may really use: cgroup limits, not what the whole machine has.

On rented containers nproc and free show the host (facts of every such platform), so
the limits are read from cgroup v2 and v1, whichever is there.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
from collections.abc import Callable
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def _own_cgroups() -> dict[str, str]:
    """Return controller -> path from /proc/self/cgroup; the key "" is cgroup v2."""
    groups: dict[str, str] = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            groups[controller] = path
    return groups


def cgroup_files(controller: str, name_v1: str, name_v2: str) -> list[Path]:
    """Files that may hold a limit, from the process's own group up to the mount's root."""
    groups = _own_cgroups()
    files: list[Path] = []
    for root, path, name in (
        (_CGROUP, groups.get(""), name_v2),
        (_CGROUP / controller, groups.get(controller), name_v1),
    ):
        if path is None or not root.is_dir():
            continue
        own = root / path.lstrip("/")
        # Inside a container the path is the host's, while the mount shows our group as root.
        files += [folder / name for folder in (own, *own.parents) if folder.is_relative_to(root)]
    return [file for file in files if file.is_file()]


def cpu_count() -> int:
    """Return how many CPUs this process can keep busy, at least 1."""
    count = float(len(os.sched_getaffinity(0)))
    for file in cgroup_files("cpu", "cpu.cfs_quota_us", "cpu.max"):
        if file.name == "cpu.max":
            quota, period = file.read_text().split()
        else:
            quota = file.read_text().strip()
            period = (file.parent / "cpu.cfs_period_us").read_text().strip()
        if quota not in ("max", "-1"):
            count = min(count, int(quota) / int(period))
    return max(1, int(count))


def multiplies_bf16(info: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether the processor has tiles for bf16 products (Intel AMX): several times the
    rate of float32, where other processors convert to and fro and lose time."""
    return info.is_file() and " amx_bf16" in info.read_text()


def memory_limit() -> int:
    """Return the bytes of memory this process may use: the smallest limit above it."""
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    limit = int(meminfo["MemTotal"].split()[0]) * 1024
    for file in cgroup_files("memory", "memory.limit_in_bytes", "memory.max"):
        text = file.read_text().strip()
        if text != "max":
            limit = min(limit, int(text))
    return limit


def memory_available() -> int:
    """Return the bytes this process can still take: of the machine, and of its cgroup."""
    if not Path("/proc/meminfo").is_file():
        # macOS, where a pulled run may be merged: the machine's memory is the best that is known.
        return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    total = int(meminfo["MemTotal"].split()[0]) * 1024
    limit = memory_limit()
    if limit < total:
        used = [
            _cgroup_use(file)
            for file in cgroup_files("memory", "memory.usage_in_bytes", "memory.current")
        ]
        available = min(available, limit - min(used, default=0))
    return available


def _cgroup_use(file: Path) -> int:
    """Return a cgroup's use without the file cache the kernel gives back on demand."""
    statistics = dict(
        line.split(" ", 1) for line in (file.parent / "memory.stat").read_text().splitlines()
    )
    cache = statistics.get("total_inactive_file", statistics.get("inactive_file", "0"))
    return max(0, int(file.read_text()) - int(cache))


def growth_during(work: Callable[[], object]) -> int:
    """Do `work` and return the bytes this process held at its most, less those before.

    Looks a hundred times a second: the kernel's own peak counts from the start of the process,
    and loading a model may have held more.
    """
    before = most = _held()
    done = threading.Event()

    def look() -> None:
        nonlocal most
        while not done.wait(0.01):
            most = max(most, _held())

    looker = threading.Thread(target=look, daemon=True)
    looker.start()
    try:
        work()
    finally:
        done.set()
        looker.join()
    return max(0, most - before)


def _held() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_memory() -> dict[str, int]:
    """Return the most bytes this process has held: `ram`, and `gpu` where it used one.

    `gpu` is what PyTorch reserved on this process's device, the CUDA context not counted.
    """
    peaks = {"ram": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    torch = sys.modules.get("torch")  # a phase that never loaded it used no GPU
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        peaks["gpu"] = int(torch.cuda.max_memory_reserved())
    return peaks


def oom_kills() -> int:
    """Return how often the kernel killed for memory in our cgroup so far (0 if unknown)."""
    kills = 0
    for file in cgroup_files("memory", "memory.oom_control", "memory.events"):
        for line in file.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                kills = max(kills, int(value))
    return kills
