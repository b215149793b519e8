"""Judge what a probe saw: one verdict a point, with the fix. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from tunesmith.core import formats
from tunesmith.core.mirrors import Mirror
from tunesmith.doctor.facts import Facts
from tunesmith.doctor.flavours import Decision, broken, choose, means_no_gpu
from tunesmith.doctor.network_rules import mirrors, network
from tunesmith.doctor.verdicts import Level, Verdict
from tunesmith.hosts.probe.host import Disk
from tunesmith.stack.definition import Flavour, Stack

GB = 1_000_000_000
# Environment, cache, and a small model with one run of it.
COMFORTABLE_ROOM = 20 * GB
# Below the second figure Ansible cannot even put its modules there.
SYSTEM_ROOM, SYSTEM_FULL = GB, GB // 10
# In a container /dev/shm is 64 MB by default: DataLoader workers die there of a bus error.
SHARED_MEMORY = GB
# Rental consoles' no-GPU mode has 2 GiB: installing works, tokenizing and merging are killed.
SMALL_MEMORY = 4 * GB
GPU_IN_USE = GB
CLOCK_WARNING, CLOCK_CRITICAL = 30, 300  # seconds; TLS and apt refuse what is not yet valid
SLOW_LOGIN = 2  # seconds
# Programs on the host: what provision cannot do without, and what is slower or missing then.
NEEDED, WANTED = ("flock", "tar", "gzip"), ("rsync", "gcc")
# What the probe looks for: these, and what can be told people.
PROGRAMS = (*NEEDED, *WANTED, "apt-get", "curl", "wget", "git", "tmux", "docker")
# ansible-core 2.19 runs its modules on this Python and newer.
ANSIBLE_PYTHON = (3, 8)
BF16_CAPABILITY = (8, 0)


def decide(facts: Facts, stack: Stack, requested: str | None = None) -> Decision:
    """Return the flavour for a host. Raises UsageError when `requested` is unknown."""
    if not facts.gpu.gpus and not means_no_gpu(facts.gpu.text):
        return broken(facts.gpu.text)
    decision = choose(facts.gpu.gpus, stack, requested)
    made = facts.environment.flavour if facts.environment else ""
    if requested or not facts.environment or made not in stack.flavours:
        return decision
    if not facts.gpu.gpus:
        return replace(decision, flavour=made, why=f"no GPU is seen; {made} is there and stays")
    if facts.environment.refused and made == decision.fallback:
        why = f"{decision.flavour} failed its self-test on this host"
        return replace(decision, flavour=made, why=why, fallback=None)
    return decision


def judge(
    facts: Facts, stack: Stack, mirror: Mirror, now: float, decision: Decision
) -> tuple[Verdict, ...]:
    """Return the verdicts in the order of reading; the last one is what provision would do.

    `now` is the time here when the host told its own (seconds since 1970).
    """
    rules: Sequence[Callable[[], Iterator[Verdict]]] = (
        lambda: _system(facts, stack),
        lambda: _rights(facts),
        lambda: _limits(facts),
        lambda: _disks(facts, stack),
        lambda: _gpu(facts, decision),
        lambda: _toolkit(facts, stack.flavour(decision.flavour)),
        lambda: _clock(facts, now),
        lambda: network(facts),
        lambda: mirrors(facts, mirror),
        lambda: _programs(facts, stack),
    )
    verdicts = [verdict for rule in rules for verdict in rule()]
    return (*verdicts, _decision(facts, stack, decision, verdicts))


def _system(facts: Facts, stack: Stack) -> Iterator[Verdict]:
    system = facts.system
    yield Verdict("pass", "ssh", f"answers; the probe took {formats.duration(facts.seconds)}")
    # x86_64-manylinux_2_28
    arch, _, floor = stack.platform.partition("-manylinux_")
    glibc = floor.replace("_", ".")
    shown = (
        f"{system.os_name or 'an unknown system'}, {system.libc or 'unknown libc'}, {system.arch}"
    )
    name, _, version = system.libc.partition(" ")
    other = f"choose an image with glibc {glibc} or newer: Ubuntu 20.04, Debian 11 or newer"
    if system.arch != arch:
        yield Verdict(
            "critical", "system", f"{shown}: the locks are for {arch}", f"rent a host with {arch}"
        )
    elif not system.libc:
        yield Verdict("unknown", "system", shown, other)
    elif name != "glibc" or _numbers(version) < _numbers(glibc):
        yield Verdict("critical", "system", f"{shown}: the locks need glibc {glibc}", other)
    else:
        yield Verdict("pass", "system", f"{shown}, kernel {system.kernel}")
    systemd = "with systemd" if system.systemd else f"without systemd (PID 1 is {system.pid1})"
    if system.container:
        kind = f"a container {systemd}, told by {', '.join(system.container)}"
    elif not system.systemd and system.pid1 not in ("systemd", "init"):
        kind = f"a container {systemd}"
    else:
        kind = f"a VM or machine {systemd}" + (f": {system.machine}" if system.machine else "")
    yield Verdict("info", "kind", kind)


def _rights(facts: Facts) -> Iterator[Verdict]:
    who = {
        "root": "root",
        "yes": f"{facts.user.name}, sudo without a password",
        "no": f"{facts.user.name}, sudo asks for a password",
    }.get(facts.system.sudo, f"{facts.user.name}, no sudo")
    needed = [name for name in NEEDED if name not in facts.programs]
    wanted = [name for name in WANTED if name not in facts.programs]
    lacking = ", ".join([*needed, *wanted])
    if not lacking:
        yield Verdict("pass", "rights", who)
    elif facts.system.sudo in ("root", "yes") and "apt-get" in facts.programs:
        yield Verdict("info", "rights", f"{who}; `inv provision` installs {lacking}")
    elif needed:
        fix = "have them installed by an administrator, or choose another image"
        yield Verdict("critical", "rights", f"{who}; not there: {lacking}", fix)
    else:
        text = f"{who}; not there: {lacking} (transfers are slow, no kernels built at run time)"
        yield Verdict("warning", "rights", text, "have them installed by an administrator")


def _limits(facts: Facts) -> Iterator[Verdict]:
    resources = facts.resources
    shown = resources.cpu_count
    if resources.cpus is None:
        yield Verdict("unknown", "cpu", "the number of cores cannot be read")
    else:
        text = f"{resources.cpus:g} core{'' if resources.cpus == 1 else 's'}"
        if resources.cpu_limit is not None and shown is not None and resources.cpu_limit < shown:
            text += f" by cgroup {resources.cgroup} (nproc shows {shown})"
        level: Level = "pass" if resources.cpus >= 1 else "warning"
        fix = "" if resources.cpus >= 1 else "start the host with a GPU: no-GPU mode is that small"
        yield Verdict(level, "cpu", text, fix)
    if resources.memory is None:
        yield Verdict("unknown", "memory", "the amount of memory cannot be read")
        return
    text = formats.size(resources.memory)
    if resources.memory_limit is not None:
        whole = (
            f", the machine has {formats.size(resources.memory_total)}"
            if resources.memory_total
            else ""
        )
        text += f" by cgroup {resources.cgroup}{whole}"
    if resources.memory_used is not None:
        text += f"; {formats.size(resources.memory_used)} in use"
    if resources.memory < SMALL_MEMORY:
        yield Verdict(
            "warning",
            "memory",
            f"{text}: enough to install and download, not to train or merge",
            "start the host with a GPU (no-GPU mode has 2 GiB), or rent one with more memory",
        )
    else:
        yield Verdict("pass", "memory", text)


def _disks(facts: Facts, stack: Stack) -> Iterator[Verdict]:
    disk = facts.disks.disk(facts.places.data_disk)
    if not facts.places.writable:
        yield Verdict(
            "critical",
            "data disk",
            f"{facts.places.base}: {facts.user.name} cannot write there",
            f"make it {facts.user.name}'s, or log in as its owner",
        )
    if disk is None:
        yield Verdict("unknown", "data disk", f"{facts.places.data_disk}: its size cannot be read")
    else:
        yield _room(facts, disk, stack)
        yield from _inodes(facts, disk, stack.host_inodes)
    if disk and disk.mount == "/" and facts.system.container:
        yield Verdict(
            "warning",
            "data disk",
            f"none found: everything would lie in {facts.places.base}, on the system disk",
            "add a data disk in the rental console: some platforms reset / when a host restarts",
        )
    system = facts.disks.disk("/")
    if system and system.free < SYSTEM_ROOM:
        yield Verdict(
            "warning" if system.free >= SYSTEM_FULL else "critical",
            "system disk",
            f"/: {formats.size(system.free)} free of {formats.size(system.total)}",
            "free some: `du -xh --max-depth=2 / | sort -h | tail` shows what takes it",
        )
    shared = next((disk.total for disk in facts.disks.disks if disk.path.endswith("/shm")), None)
    if shared is None:
        yield Verdict("unknown", "shared memory", "the size of /dev/shm cannot be read")
    elif shared < SHARED_MEMORY:
        yield Verdict(
            "warning",
            "shared memory",
            f"{formats.size(shared)} in /dev/shm: DataLoader workers can die of a bus error",
            "train with dataloader_num_workers=0, or start the container with --shm-size 8g",
        )
    else:
        yield Verdict("pass", "shared memory", f"{formats.size(shared)} in /dev/shm")


def _room(facts: Facts, disk: Disk, stack: Stack) -> Verdict:
    text = f"{disk.path}: {formats.size(disk.free)} free of {formats.size(disk.total)}"
    fix = "free some, or enlarge the data disk in the rental console"
    there = facts.installed
    need = stack.host_spare_bytes if there else stack.host_free_bytes
    if disk.free < need:
        what = "an installed host needs" if there else "an installation needs"
        return Verdict("critical", "data disk", f"{text}; {what} {formats.size(need)}", fix)
    if not there and disk.free < COMFORTABLE_ROOM:
        left = formats.size(disk.free - need)
        return Verdict(
            "warning",
            "data disk",
            f"{text}; after the installation {left} are left for models",
            fix,
        )
    return Verdict("pass", "data disk", text)


def _inodes(facts: Facts, disk: Disk, needed: int) -> Iterator[Verdict]:
    if disk.inodes is None or disk.inodes_free is None:
        return
    text = f"{disk.path}: {disk.inodes_free:,} of {disk.inodes:,} inodes free"
    if facts.installed or disk.inodes_free >= needed:
        yield Verdict("pass", "inodes", text)
        return
    yield Verdict(
        "critical",
        "inodes",
        f"{text}; the environment needs {needed:,} ('No space left' comes before the disk is full)",
        f"delete folders with many small files; `du --inodes -xd2 {disk.path}` shows them",
    )


def _gpu(facts: Facts, decision: Decision) -> Iterator[Verdict]:
    if not facts.gpu.gpus:
        yield _no_gpu(facts)
        return
    kinds: dict[tuple[str, str | None, int | None], int] = {}
    for gpu in facts.gpu.gpus:
        kind = (gpu.name, gpu.capability, gpu.memory_total)
        kinds[kind] = kinds.get(kind, 0) + 1
    shown = ", ".join(
        f"{count} x {name}"
        + (f", {memory / (1 << 30):.0f} GiB" if memory else "")
        + f", compute capability {capability or 'not told'}"
        for (name, capability, memory), count in kinds.items()
    )
    level: Level = "pass" if decision.flavour else "critical"
    text = f"{shown}, driver {facts.gpu.gpus[0].driver}"
    if decision.flavour is None:
        text += ": nothing that can be installed runs on it"
    yield Verdict(level, "gpu", text, decision.fix)
    old = [g for g in facts.gpu.gpus if g.capability and _numbers(g.capability) < BF16_CAPABILITY]
    if old and decision.flavour:
        yield Verdict(
            "info", "precision", f"{old[0].name} has no bf16", "train with `bf16=false fp16=true`"
        )
    used = sum(gpu.memory_used or 0 for gpu in facts.gpu.gpus)
    if facts.gpu_processes:
        told = [
            f"{process.name} (pid {process.pid}"
            + (f", {formats.size(process.memory)})" if process.memory else ")")
            for process in facts.gpu_processes
        ]
        yield Verdict(
            "warning",
            "gpu use",
            f"{formats.size(used)} taken by {', '.join(told)}",
            "wait for it or end it: a training may run out of memory",
        )
    elif used > GPU_IN_USE:
        yield Verdict(
            "warning",
            "gpu use",
            f"{formats.size(used)} taken by a process that cannot be seen from here",
            "restart the host in the rental console; if it stays, somebody else has this GPU",
        )
    elif all(gpu.memory_used is None for gpu in facts.gpu.gpus):
        yield Verdict("unknown", "gpu use", "nvidia-smi does not tell how much memory is taken")
    else:
        yield Verdict("pass", "gpu use", f"nobody; {formats.size(used)} taken")


def _no_gpu(facts: Facts) -> Verdict:
    if not means_no_gpu(facts.gpu.text):
        found = broken(facts.gpu.text)
        return Verdict("critical", "gpu", found.why, found.fix)
    if facts.gpu.other_accelerators:
        names = ", ".join(facts.gpu.other_accelerators)
        return Verdict(
            "critical",
            "gpu",
            f"no NVIDIA GPU, but one of {names}: the locks are for CUDA",
            "rent a host with an NVIDIA GPU",
        )
    said = facts.gpu.text
    if not facts.gpu.nvidia_smi:
        said = "there is no nvidia-smi"
        if facts.gpu.kernel_module:
            said += (
                f"; the machine has driver {facts.gpu.kernel_module}, but gives no GPU to this host"
            )
    return Verdict(
        "warning",
        "gpu",
        f"none ({said}): installing and downloading work, training does not",
        "start the host with a GPU when all is installed",
    )


def _toolkit(facts: Facts, flavour: Flavour) -> Iterator[Verdict]:
    if facts.cuda.nvcc is None:
        return
    version = facts.cuda.nvcc.version or "of unknown version"
    text = f"nvcc {version} in {facts.cuda.nvcc.path}"
    same = version.partition(".")[0] == flavour.cuda.partition(".")[0]
    if not same:
        text += f": not of CUDA {flavour.cuda}, unused (the lock has its own CUDA)"
    yield Verdict("info", "toolkit", text)


def _clock(facts: Facts, now: float) -> Iterator[Verdict]:
    skew = facts.system.epoch - now
    off = abs(skew)
    if off <= CLOCK_WARNING:
        yield Verdict("pass", "clock", f"within {formats.duration(max(off, 1))} of this machine's")
        return
    text = f"{formats.duration(off)} {'ahead of' if skew > 0 else 'behind'} this machine's"
    own = (
        "`timedatectl set-ntp true` there"
        if facts.system.systemd
        else "restart it, or ask the platform"
    )
    yield Verdict(
        "critical" if off > CLOCK_CRITICAL else "warning",
        "clock",
        f"{text}: certificates look expired or not yet valid",
        f"set the host's clock: {own}; if it is right, set this machine's",
    )


def _programs(facts: Facts, stack: Stack) -> Iterator[Verdict]:
    shown = ", ".join(f"{p.version or '?'} {p.path}" for p in facts.pythons) or "none"
    if any(_numbers(p.version or "0") >= ANSIBLE_PYTHON for p in facts.pythons):
        yield Verdict("pass", "python", shown)
    else:
        least = ".".join(map(str, ANSIBLE_PYTHON))
        yield Verdict(
            "critical",
            "python",
            f"{shown}: Ansible needs {least} or newer on the host",
            "apt-get install python3, or an image with conda",
        )
    if facts.condas:
        first = facts.condas[0]
        yield Verdict("pass", "conda", f"{first.version or 'unknown version'} {first.path}")
    else:
        size = formats.size(stack.conda.size_bytes)
        text = f"none: Miniforge {stack.conda.version} will be installed ({size})"
        yield Verdict("info", "conda", text)
    if facts.environment and facts.environment.whole:
        text = f"{facts.environment.path} is there, from an earlier run"
        yield Verdict("info", "environment", text)
    elif facts.environment:
        text = f"{facts.environment.path} is half-made"
        yield Verdict("info", "environment", text, "`inv provision` replaces it")
    if facts.bashrc_seconds is not None and facts.bashrc_seconds > SLOW_LOGIN:
        yield Verdict(
            "warning",
            "login",
            f"~/.bashrc takes {formats.duration(facts.bashrc_seconds)} or more, "
            "and so does each login",
            "take what waits out of ~/.bashrc",
        )


def _decision(
    facts: Facts, stack: Stack, decision: Decision, verdicts: Sequence[Verdict]
) -> Verdict:
    if decision.flavour is None:
        return Verdict("critical", "decision", f"nothing to install: {decision.why}", decision.fix)
    flavour = stack.flavour(decision.flavour)
    size, base = formats.size(flavour.size_bytes), facts.places.base
    text = f"{flavour.name} ({size}) in {base}: {decision.why}"
    against = list(dict.fromkeys(v.what for v in verdicts if v.level == "critical"))
    if against:
        return Verdict(
            "critical", "decision", f"not yet: {text}", f"fix first: {', '.join(against)}"
        )
    return Verdict("info" if decision.self_test else "pass", "decision", text)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))
