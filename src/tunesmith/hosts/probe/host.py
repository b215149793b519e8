"""The kind of machine: user, system, resources, tunesmith's folder there, disks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from tunesmith.hosts.answers import Number, OneOf, Shape, Text
from tunesmith.hosts.probe.answer import NUMBER, PATH, WORDS, YES_NO, Answer

_KIB = 1 << 10
_ID = Number(0, (1 << 32) - 1)
_NAME = Text(r"[\w.+~-]*", 64, "a word")
# KiB and inodes, total and free ("-": not counted), the path, and where it is mounted.
_DISK = re.compile(r"([0-9]{1,15}) ([0-9]{1,15}) (\S{1,19}) (\S{1,19}) (/[^|]*)\|(/.*)")


@dataclass(frozen=True)
class User:
    """Who logs in: name, ids, home folder, and the start file of login shells."""

    name: str
    uid: int | None
    gid: int | None
    home: str
    login_file: str

    SECTION: ClassVar[str] = "user"
    SHAPES: ClassVar[Mapping[str, Shape]] = {
        "user": WORDS,
        "uid": _ID,
        "gid": _ID,
        "home": PATH,
        "login_file": PATH,
    }

    @classmethod
    def read(cls, answer: Answer) -> User:
        """Return the section."""
        return cls(
            name=answer.one("user"),
            uid=answer.number("uid"),
            gid=answer.number("gid"),
            home=answer.one("home"),
            login_file=answer.one("login_file"),
        )


@dataclass(frozen=True)
class System:
    """Operating system and rights. `epoch` is the host's time, in seconds since 1970.

    `sudo` is root, absent, yes (without a password) or no. `container` lists what gives a
    container away.
    """

    epoch: int
    os_id: str
    os_name: str
    kernel: str
    arch: str
    libc: str
    sudo: str
    systemd: bool
    pid1: str
    container: tuple[str, ...]
    machine: str

    SECTION: ClassVar[str] = "system"
    SHAPES: ClassVar[Mapping[str, Shape]] = {
        "epoch": NUMBER,
        **dict.fromkeys(("os.id", "os.version", "os.name", "kernel", "pid1", "machine"), WORDS),
        "arch": _NAME,
        "libc": Text(r"[\w .+~-]*", 64, "the name and version of a C library"),
        "sudo": OneOf(("root", "absent", "yes", "no")),
        "systemd": YES_NO,
        "container": WORDS,
    }

    @property
    def glibc(self) -> str:
        """The version of the GNU C library, empty where there is another one."""
        name, _, version = self.libc.partition(" ")
        return version if name == "glibc" else ""

    @classmethod
    def read(cls, answer: Answer) -> System:
        """Return the section."""
        one = answer.one
        return cls(
            epoch=answer.number("epoch") or 0,
            os_id=one("os.id"),
            os_name=one("os.name") or f"{one('os.id')} {one('os.version')}".strip(),
            kernel=one("kernel"),
            arch=one("arch"),
            libc=one("libc"),
            sudo=one("sudo"),
            systemd=one("systemd") == "yes",
            pid1=one("pid1"),
            container=tuple(one("container").split()),
            machine=one("machine"),
        )


@dataclass(frozen=True)
class Resources:
    """Cores and memory (bytes). `cpu_limit` (cores) and `memory_limit` are the control groups',
    None without a limit."""

    cgroup: str
    cpu_count: int | None
    cpu_limit: float | None
    memory_total: int | None
    memory_available: int | None
    memory_limit: int | None
    memory_used: int | None

    SECTION: ClassVar[str] = "resources"
    SHAPES: ClassVar[Mapping[str, Shape]] = {
        "cgroup": WORDS,
        **dict.fromkeys(("cpu.count", "cpu.thousandths", "memory.total"), NUMBER),
        **dict.fromkeys(("memory.available", "memory.limit", "memory.used"), NUMBER),
    }

    @property
    def cpus(self) -> float | None:
        """Cores this host may use: the smaller of what it shows and what is granted."""
        known = [float(n) for n in (self.cpu_count, self.cpu_limit) if n is not None]
        return min(known, default=None)

    @property
    def memory(self) -> int | None:
        """Memory this host may use."""
        known = [n for n in (self.memory_total, self.memory_limit) if n is not None]
        return min(known, default=None)

    @classmethod
    def read(cls, answer: Answer) -> Resources:
        """Return the section."""
        total, limit = answer.number("memory.total", _KIB), answer.number("memory.limit")
        if limit is not None and total is not None and limit >= total:
            limit = None  # control groups write "no limit" as a huge number
        thousandths = answer.number("cpu.thousandths")
        return cls(
            cgroup=answer.one("cgroup"),
            cpu_count=answer.number("cpu.count"),
            cpu_limit=None if thousandths is None else thousandths / 1000,
            memory_total=total,
            memory_available=answer.number("memory.available", _KIB),
            memory_limit=limit,
            memory_used=answer.number("memory.used"),
        )


@dataclass(frozen=True)
class Disk:
    """The file system that holds `path`, in bytes. Inodes are None where it counts none."""

    path: str
    mount: str
    total: int
    free: int
    inodes: int | None
    inodes_free: int | None


def _disk(line: str) -> Disk | None:
    """Return a file system; None for a line that is none, as of one that has no size."""
    found = _DISK.fullmatch(line)
    if not found:
        return None
    total, free, inodes, inodes_free, path, mount = found.groups()
    # btrfs and others have no fixed number of inodes and say 0.
    count = int(inodes) if inodes.isdecimal() else 0
    left = int(inodes_free) if count and inodes_free.isdecimal() else None
    return Disk(path, mount, int(total) * _KIB, int(free) * _KIB, count or None, left)


@dataclass(frozen=True)
class Places:
    """Tunesmith's folder. `provisioned` is it on a host that was provisioned to its end, else
    empty; `base` is that, or what was given, or what provisioning would make on `data_disk`.
    `hf_cache` is where the Hugging Face cache belongs, beside it. `room` is the file system that
    holds it, or would; None where df does not say."""

    provisioned: str
    data_disk: str
    base: str
    hf_cache: str
    writable: bool
    room: Disk | None

    SECTION: ClassVar[str] = "places"
    SHAPES: ClassVar[Mapping[str, Shape]] = {
        **dict.fromkeys(("provisioned", "data_disk", "base", "hf_cache"), PATH),
        "writable": YES_NO,
        "room": WORDS,
    }

    @classmethod
    def read(cls, answer: Answer) -> Places:
        """Return the section."""
        return cls(
            provisioned=answer.one("provisioned"),
            data_disk=answer.one("data_disk"),
            base=answer.one("base"),
            hf_cache=answer.one("hf_cache"),
            writable=answer.one("writable") == "yes",
            room=_disk(answer.one("room")),
        )


@dataclass(frozen=True)
class Disks:
    """The file systems of /, the home folder, the data disks that are there, and /dev/shm."""

    disks: tuple[Disk, ...]

    SECTION: ClassVar[str] = "disks"
    SHAPES: ClassVar[Mapping[str, Shape]] = {"disk": WORDS}

    def disk(self, path: str) -> Disk | None:
        """Return the disk of a path that was asked for."""
        return next((disk for disk in self.disks if disk.path == path), None)

    @classmethod
    def read(cls, answer: Answer) -> Disks:
        """Return the section."""
        return cls(tuple(filter(None, map(_disk, dict.fromkeys(answer.all("disk"))))))
