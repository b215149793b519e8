"""What probe.sh said, as a frozen value. Sizes in bytes, times in seconds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tunesmith.core.documents import JsonObject
from tunesmith.core.errors import TunesmithError
from tunesmith.core.printable import one_line, printable
from tunesmith.doctor.flavours import Gpu, capability_of
from tunesmith.hosts.answers import (
    DIGEST,
    HOST_PATH,
    WORD,
    AnswerSource,
    HostPath,
    MalformedError,
    Named,
    Number,
    OneOf,
    Shape,
    Text,
    Words,
    parse_json,
)

_BEGIN = "tunesmith_probe=1"
# What a key may say, where it is more than a text for people. Nothing at all is always
# allowed: the host could not tell.
_NUMBER = Number(-(1 << 63), 1 << 63)
_YES = OneOf(("yes", "no"))
_EXTRAS = Named(WORD, DIGEST)
_PATH = HostPath(rf"-?|{HOST_PATH.pattern}")
_SHAPES: Mapping[str, Shape] = {
    **dict.fromkeys(("epoch", "uid", "cpu.count", "cpu.thousandths"), _NUMBER),
    **dict.fromkeys(("memory.total", "memory.available", "memory.limit", "memory.used"), _NUMBER),
    **dict.fromkeys(("home", "data_disk", "base", "state", "nvidia_smi"), _PATH),
    **dict.fromkeys(("systemd", "writable", "network_turbo"), _YES),
    **dict.fromkeys(("bashrc_seconds", "end"), Text(r"\d{1,9}(\.\d{1,6})?", 16, "seconds")),
    "environment": HostPath(
        rf"(whole|half) {HOST_PATH.pattern}", 1040, "whole or half, and a path"
    ),
    "kernel_module": Text(r"\d{1,4}(\.\d{1,4}){0,4}", 25, "a version"),
    "sudo": OneOf(("root", "absent", "yes", "no")),
    "marker": Text(r"[\s\S]*", 1 << 16, "JSON"),
}
_LONGEST, _LONGEST_MARKER = 2000, 1 << 16
# A text of any other key, and how often a key may come.
_WORDS = Words(_LONGEST)
_OFTEN = 1000
_ESCAPE = re.compile(r"%(25|0A|0D)")
_ESCAPES = {"25": "%", "0A": "\n", "0D": "\r"}
_DRIVER = re.compile(r"^[0-9]{1,5}(\.[0-9]{1,5}){0,4}$")
_KIB, _MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Disk:
    """The file system that holds `path`. Inodes are None where it does not count them."""

    path: str
    mount: str
    total: int
    free: int
    inodes: int | None
    inodes_free: int | None


@dataclass(frozen=True)
class Program:
    """A program and its version, None where it did not say."""

    path: str
    version: str | None


@dataclass(frozen=True)
class GpuProcess:
    """A process that computes on a GPU; `memory` is None where the container hides it."""

    pid: int
    name: str
    memory: int | None


@dataclass(frozen=True)
class Tried:
    """A mirror's address as seen from the host.

    `outcome` is ok, http (with `status`), dns, refused, timeout, tls, proxy, failed, or
    no_tool where the host has nothing to ask with.
    """

    kind: str
    url: str
    outcome: str
    status: int | None
    seconds: float


@dataclass(frozen=True)
class Source:
    """What a settings file or variable names: an index, or channels."""

    where: str
    urls: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """A host as one probe saw it. None or empty where it could not tell.

    `container` lists what gives a container away. `cpu_limit` (cores) and `memory_limit` are
    the control groups', None without a limit. `environment_whole` is None without an
    environment, False for a half-made one; `environment_refused` says that a self-test failed
    here and the fallback was taken.
    """

    epoch: int
    os_id: str
    os_name: str
    kernel: str
    arch: str
    libc: str
    user: str
    uid: int | None
    home: str
    sudo: str
    pid1: str
    systemd: bool
    container: tuple[str, ...]
    machine: str
    cgroup: str
    cpu_count: int | None
    cpu_limit: float | None
    memory_total: int | None
    memory_available: int | None
    memory_limit: int | None
    memory_used: int | None
    disks: tuple[Disk, ...]
    data_disk: str
    base: str
    writable: bool
    state: str | None
    environment: str | None
    environment_whole: bool | None
    environment_flavour: str | None
    environment_refused: bool
    environment_extras: tuple[str, ...]
    nvidia_smi: str | None
    nvidia_smi_text: str
    kernel_module: str | None
    other_accelerators: tuple[str, ...]
    gpus: tuple[Gpu, ...]
    gpu_processes: tuple[GpuProcess, ...]
    cuda: Program | None
    nvcc: Program | None
    proxies: tuple[tuple[str, str], ...]
    no_proxy: str
    network_turbo: bool
    pip_indexes: tuple[Source, ...]
    condarcs: tuple[Source, ...]
    tools: tuple[str, ...]
    pythons: tuple[Program, ...]
    condas: tuple[Program, ...]
    bashrc_seconds: float | None
    mirrors: tuple[Tried, ...]
    seconds: float

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

    def disk(self, path: str) -> Disk | None:
        """Return the disk of a path that was asked for."""
        return next((disk for disk in self.disks if disk.path == path), None)


def parse(text: str, host: str = "the host") -> Facts:
    """Read the output of probe.sh on `host`; what stands before its first line is none of ours.

    Raises TunesmithError when the output is not whole, or says what no host has.
    """
    lines = [line.rstrip("\r") for line in text.rstrip("\r\n").split("\n")]
    if _BEGIN not in lines or not lines[-1].startswith("end="):
        shown = [_clean(line[:_LONGEST]) for line in lines[-3:]]
        raise TunesmithError(
            f"{host}: its answer to the probe is truncated", shown, hint="try again"
        )
    said = _Said(host, lines[lines.index(_BEGIN) :])
    gpus, strange = _gpus(said.all("gpu"))
    environment = said.one("environment").partition(" ")
    marker = _marker(host, said.one("marker"))
    memory_total = _scaled(said.one("memory.total"), _KIB)
    memory_limit = _number(said.one("memory.limit"))
    if memory_limit is not None and memory_total is not None and memory_limit >= memory_total:
        memory_limit = None  # control groups write "no limit" as a huge number
    thousandths = _number(said.one("cpu.thousandths"))
    return Facts(
        epoch=_number(said.one("epoch")) or 0,
        os_id=said.one("os.id"),
        os_name=said.one("os.name") or f"{said.one('os.id')} {said.one('os.version')}".strip(),
        kernel=said.one("kernel"),
        arch=said.one("arch"),
        libc=said.one("libc"),
        user=said.one("user"),
        uid=_number(said.one("uid")),
        home=said.one("home"),
        sudo=said.one("sudo"),
        pid1=said.one("pid1"),
        systemd=said.one("systemd") == "yes",
        container=tuple(said.one("container").split()),
        machine=said.one("machine"),
        cgroup=said.one("cgroup"),
        cpu_count=_number(said.one("cpu.count")),
        cpu_limit=None if thousandths is None else thousandths / 1000,
        memory_total=memory_total,
        memory_available=_scaled(said.one("memory.available"), _KIB),
        memory_limit=memory_limit,
        memory_used=_number(said.one("memory.used")),
        disks=tuple(filter(None, map(_disk, dict.fromkeys(said.all("disk"))))),
        data_disk=said.one("data_disk"),
        base=said.one("base"),
        writable=said.one("writable") == "yes",
        state=said.one("state") or None,
        environment=environment[2] or None,
        environment_whole=environment[0] == "whole" if environment[2] else None,
        environment_flavour=str(marker.get("flavour") or "") or None,
        environment_refused=bool(marker.get("refused")),
        environment_extras=tuple(
            _EXTRAS.read(AnswerSource(host, "its marker"), marker.get("extras", {}))
        ),
        nvidia_smi=said.one("nvidia_smi") or None,
        nvidia_smi_text=" ".join(filter(None, [said.one("nvidia_smi.text"), *strange])),
        kernel_module=said.one("kernel_module") or None,
        other_accelerators=tuple(said.all("other_accelerator")),
        gpus=gpus,
        gpu_processes=tuple(filter(None, map(_process, said.all("gpu_process")))),
        cuda=_program(said.one("cuda")),
        nvcc=_program(said.one("nvcc")),
        proxies=tuple((n, v) for n, _, v in (p.partition(" ") for p in said.all("proxy"))),
        no_proxy=said.one("no_proxy"),
        network_turbo=said.one("network_turbo") == "yes",
        pip_indexes=tuple(
            Source(where, (url,))
            for url, _, where in (item.partition(" ") for item in said.all("pip_index"))
        ),
        condarcs=tuple(
            Source(where, tuple(urls.split()))
            for where, _, urls in (item.partition(" ") for item in said.all("condarc"))
        ),
        tools=tuple(said.one("tools").split()),
        pythons=tuple(filter(None, map(_program, said.all("python")))),
        condas=tuple(filter(None, map(_program, said.all("conda")))),
        bashrc_seconds=_decimal(said.one("bashrc_seconds")),
        mirrors=_tried(said.all("mirror")),
        seconds=_decimal(said.one("end")) or 0.0,
    )


class _Said:
    """The values by key, unescaped, each one line that cannot move a cursor.

    Raises TunesmithError for a value that is not what its key says.
    """

    def __init__(self, host: str, lines: Sequence[str]) -> None:
        self._values: dict[str, list[str]] = {}
        for line in lines:
            key, equals, value = line.partition("=")
            if equals:
                plain = _ESCAPE.sub(lambda found: _ESCAPES[found[1]], value).strip()
                self._take(
                    AnswerSource(host, f"its answer to the probe: {one_line(key, 40)}"), key, plain
                )

    def _take(self, asked: AnswerSource, key: str, plain: str) -> None:
        if plain:
            _SHAPES.get(key, _WORDS).read(asked, plain)
        values = self._values.setdefault(key, [])
        if len(values) >= _OFTEN:
            raise asked.refused(f"at most {_OFTEN} of them", f"{_OFTEN + 1}")
        longest = _LONGEST_MARKER if key == "marker" else _LONGEST
        values.append(_clean(plain[:longest]))

    def one(self, key: str) -> str:
        return self._values.get(key, [""])[0]

    def all(self, key: str) -> list[str]:
        return self._values.get(key, [])


def _clean(text: str) -> str:
    line = printable(text).replace("\n", " ")
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def _marker(host: str, text: str) -> JsonObject:
    """Return an environment's finish marker; one that is not JSON says nothing."""
    try:
        marker = parse_json(AnswerSource(host, "its answer to the probe: marker"), text or "{}")
    except MalformedError:
        return {}
    return marker if isinstance(marker, dict) else {}


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"-?[0-9]{1,19}", text) else None


def _decimal(text: str) -> float | None:
    return float(text) if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) else None


def _scaled(text: str, unit: int) -> int | None:
    number = _number(text)
    return None if number is None else number * unit


def _disk(text: str) -> Disk | None:
    found = re.fullmatch(r"([0-9]{1,19}) ([0-9]{1,19}) (\S+) (\S+) (.+)\|(.+)", text)
    if not found:
        return None
    total, free, inodes, inodes_free, path, mount = found.groups()
    # btrfs and others have no fixed number of inodes and say 0.
    count = _number(inodes) or None
    left = _number(inodes_free) if count else None
    return Disk(path, mount, int(total) * _KIB, int(free) * _KIB, count, left)


def _gpus(lines: Sequence[str]) -> tuple[tuple[Gpu, ...], list[str]]:
    """Return the GPUs, and the lines that are none."""
    gpus, strange = [], []
    for line in lines:
        words = [word.strip() for word in line.split(",", 4)]
        if len(words) == 5 and _DRIVER.match(words[0]):
            driver, capability, total, used, name = words
            gpus.append(Gpu(name, driver, capability_of(capability), _memory(total), _memory(used)))
        else:
            strange.append(line)
    return tuple(gpus), strange


def _memory(text: str) -> int | None:
    return _scaled(text.removesuffix("MiB").strip(), _MIB)


def _process(text: str) -> GpuProcess | None:
    words = [word.strip() for word in text.split(",", 2)]
    pid = _number(words[0])
    return GpuProcess(pid, words[2], _memory(words[1])) if pid and len(words) == 3 else None


def _program(text: str) -> Program | None:
    version, _, path = text.partition(" ")
    return Program(path, None if version == "-" else version) if path else None


def _tried(lines: Sequence[str]) -> tuple[Tried, ...]:
    """Return what was tried in the order it was asked for; answers come as they come."""
    found = []
    for line in lines:
        words = re.fullmatch(r"([0-9]{1,9}) (\S+) (\S+) (\S+) ([0-9.]{1,19}) (.+)", line)
        if words:
            number, kind, outcome, status, seconds, url = words.groups()
            tried = Tried(kind, url, outcome, _number(status), _decimal(seconds) or 0.0)
            found.append((int(number), tried))
    return tuple(tried for _, tried in sorted(found, key=lambda item: item[0]))
