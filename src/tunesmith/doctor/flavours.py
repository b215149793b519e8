"""Which flavour a host's GPUs and driver can run. Pure; every number is stack.yml's.

Ansible's filter plugin uses it too, so it imports little.

Rules: a flavour's binaries hold code for certain compute capabilities and no PTX, so a GPU
needs code of its own major version and no newer minor one (NVIDIA, binary compatibility).
A driver older than the flavour's own toolkit mostly works from `minimum_driver` on
(NVIDIA, minor-version compatibility), so there a self-test decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.core.errors import UsageError
from tunesmith.hosts.probe.gpu import Gpu, capability_of

if TYPE_CHECKING:
    from tunesmith.stack.definition import Stack

_DRIVER = re.compile(r"^[0-9]{1,5}(\.[0-9]{1,5}){0,4}$")
_ABSENT = (
    "no devices were found",
    "couldn't communicate with the nvidia driver",
    "driver not loaded",
    "couldn't find libnvidia-ml.so",
    "nvidia-smi: command not found",
    "nvidia-smi: not found",
    "no such file",
)


@dataclass(frozen=True)
class Decision:
    """The flavour to install, or None when nothing would run.

    `self_test` says that only a kernel on the GPU can prove it, `fallback` is the flavour to
    take when that fails. `gpus` is how many GPUs it was decided for; 0 is no-GPU mode.
    """

    flavour: str | None
    why: str
    fix: str = ""
    self_test: bool = False
    fallback: str | None = None
    gpus: int = 0


@dataclass(frozen=True)
class _Build:
    name: str
    cuda: str
    minimum_driver: int
    minimum_of_capability: Mapping[str, int]
    native_driver: int
    capabilities: tuple[str, ...]


@dataclass(frozen=True)
class _Obstacle:
    """Why a build does not run on a GPU; `driver` is the major version that would do."""

    text: str
    driver: int | None = None


def choose(gpus: Sequence[Gpu], stack: Stack, requested: str | None = None) -> Decision:
    """Return the flavour for `gpus`: the default one if it runs on all of them, else another.

    `requested` is taken or refused, never replaced. Raises UsageError when it is unknown.
    """
    builds = [
        _Build(
            name=flavour.name,
            cuda=flavour.cuda,
            minimum_driver=flavour.minimum_driver,
            minimum_of_capability=flavour.minimum_driver_of_capability,
            native_driver=flavour.native_driver,
            capabilities=flavour.compute_capabilities,
        )
        for flavour in stack.flavours.values()
    ]
    return _choose(gpus, builds, stack.default_flavour, requested)


def choose_from_lines(
    lines: Sequence[str], stack: Mapping[str, Any], requested: str | None = None
) -> dict[str, Any]:
    """Return `choose` as plain values, from plain values.

    `lines` are `Gpus.lines`: driver, capability and name of each GPU, and what nvidia-smi said
    instead (none: there is no nvidia-smi); `stack` is stack.yml as read.
    """
    builds = [
        _Build(
            name=name,
            cuda=str(value["cuda"]),
            minimum_driver=int(value["minimum_driver"]),
            minimum_of_capability=value.get("minimum_driver_of_capability", {}),
            native_driver=int(value["native_driver"]),
            capabilities=tuple(value["compute_capabilities"]),
        )
        for name, value in stack["flavours"].items()
    ]
    gpus: list[Gpu] = []
    said: list[str] = []
    for line in filter(None, map(str.strip, lines)):
        driver, _, rest = line.partition(",")
        capability, _, name = rest.partition(",")
        if name and _DRIVER.match(driver.strip()):
            gpus.append(Gpu(name.strip(), driver.strip(), capability_of(capability)))
        else:
            said.append(line)
    text = " ".join(said)
    if gpus or means_no_gpu(text):
        decision = _choose(gpus, builds, str(stack["default_flavour"]), requested or None)
    else:
        decision = broken(text)
    return asdict(decision)


def broken(text: str) -> Decision:
    """Return the refusal for a GPU whose driver answers with an error."""
    return Decision(
        None,
        f"nvidia-smi fails: {' '.join(text.split()) or 'it says nothing'}",
        "restart the host in the rental console; if that does not help, it is the platform's "
        "fault: take another host",
    )


def means_no_gpu(text: str) -> bool:
    """Whether nvidia-smi's words (or none) mean that no GPU is there, not that one is broken."""
    words = text.lower()
    return not words.strip() or any(phrase in words for phrase in _ABSENT)


def _choose(
    gpus: Sequence[Gpu], builds: Sequence[_Build], default: str, requested: str | None
) -> Decision:
    named = {build.name: build for build in builds}
    if requested and requested not in named:
        raise UsageError(f"flavour {requested!r} is unknown; known are {', '.join(named)}")
    if not gpus:
        return Decision(requested or default, "no GPU is seen; this flavour also works without one")
    ordered = sorted(builds, key=lambda build: build.name != default)
    obstacles = {build.name: _obstacles(build, gpus) for build in ordered}
    fitting = [build for build in ordered if not obstacles[build.name]]
    if requested:
        if not obstacles[requested]:
            return _take(named[requested], gpus, "asked for", None)
        found = obstacles[requested][0].text
        if fitting:
            fix = f"leave --flavour out: {fitting[0].name} runs here"
            return Decision(None, found, fix, gpus=len(gpus))
        return _refuse(gpus, ordered, obstacles)
    if not fitting:
        return _refuse(gpus, ordered, obstacles)
    best = fitting[0]
    reason = "" if best.name == default else obstacles[default][0].text
    return _take(best, gpus, reason, fitting[1].name if len(fitting) > 1 else None)


def _take(build: _Build, gpus: Sequence[Gpu], reason: str, other: str | None) -> Decision:
    driver = gpus[0].driver
    why = f"driver {driver} and {_shown(gpus)} run CUDA {build.cuda}"
    if reason:
        why += f" ({reason})"
    tried = min(_major(gpu.driver) for gpu in gpus) < build.native_driver
    silent = any(gpu.capability is None for gpu in gpus)
    if not tried and not silent:
        return Decision(build.name, why, gpus=len(gpus))
    if tried:
        why += f"; a driver below {build.native_driver} has to pass the self-test"
    else:
        why += "; nvidia-smi does not tell the compute capability, the self-test will"
    if other:
        why += f", or {other} is taken"
    return Decision(build.name, why, self_test=True, fallback=other, gpus=len(gpus))


def _refuse(
    gpus: Sequence[Gpu], builds: Sequence[_Build], obstacles: Mapping[str, Sequence[_Obstacle]]
) -> Decision:
    """Say what stands in the way: the driver, where a newer one would do, else the GPU."""
    needs: list[tuple[int, _Obstacle]] = []
    for found in obstacles.values():
        drivers = [item.driver for item in found if item.driver is not None]
        if len(drivers) == len(found):
            needs.append((max(drivers), max(found, key=lambda item: item.driver or 0)))
    if needs:
        driver, obstacle = min(needs, key=lambda need: need[0])
        return Decision(None, obstacle.text, _newer(driver), gpus=len(gpus))
    known = sorted({c for build in builds for c in build.capabilities}, key=_numbers)
    foreign = [gpu for gpu in gpus if gpu.capability and not _codes(known, gpu.capability)]
    if foreign:
        why = f"no flavour has code for {_shown(foreign)}"
        fix = f"choose a GPU of compute capability {known[0]} to {known[-1]} in the rental console"
    else:
        why = f"no flavour has code for all of {_shown(gpus)}"
        fix = "choose a host whose GPUs are of one generation in the rental console"
    return Decision(None, why, fix, gpus=len(gpus))


def _obstacles(build: _Build, gpus: Iterable[Gpu]) -> list[_Obstacle]:
    found = []
    for gpu in gpus:
        if gpu.capability and not _codes(build.capabilities, gpu.capability):
            found.append(_Obstacle(f"{build.name} has no code for {_shown([gpu])}"))
        needed = build.minimum_driver
        if gpu.capability:
            special = _codes(build.minimum_of_capability, gpu.capability)
            needed = max([needed, *(build.minimum_of_capability[key] for key in special)])
        if _major(gpu.driver) < needed:
            text = f"driver {gpu.driver} is too old: {_shown([gpu])} needs {needed} or newer"
            found.append(_Obstacle(f"{text} for {build.name}", needed))
    return found


def _codes(capabilities: Iterable[str], device: str) -> list[str]:
    """Return those capabilities whose code a device runs: same major, no newer minor."""
    major, minor = _numbers(device)
    return [c for c in capabilities if _numbers(c)[0] == major and _numbers(c)[1] <= minor]


def _numbers(capability: str) -> tuple[int, int]:
    major, _, minor = str(capability).partition(".")
    return int(major), int(minor or 0)


def _major(driver: str) -> int:
    return int(driver.partition(".")[0])


def _shown(gpus: Iterable[Gpu]) -> str:
    """Return each kind of GPU once: NVIDIA L40 (compute capability 8.9)."""
    kinds = dict.fromkeys((gpu.name, gpu.capability or "unknown") for gpu in gpus)
    return ", ".join(f"{name} (compute capability {capability})" for name, capability in kinds)


def _newer(driver: int) -> str:
    return (
        f"choose a host with driver {driver} or newer in the rental console; a container cannot "
        "change its driver, on a machine of your own update it"
    )
