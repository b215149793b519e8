"""configs/platforms.yml: what differs between the places that rent GPUs out."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tunesmith.core.errors import UsageError

FILE = Path(__file__).resolve().parents[3] / "configs" / "platforms.yml"

_KEYS = ("disks", "poweroff", "release_days", "start_hook", "note")
_OTHER = "other"
# Disks become words of shell scripts, as they are.
_DISK = re.compile(r"(/[A-Za-z0-9._-]+)+")


@dataclass(frozen=True)
class Platform:
    """A rental platform.

    `poweroff` is the command that ends the billing from inside, None where the console
    alone can; `release_days` is how long after it the disk is kept (None: not limited, or
    not known). `start_hook` is a file of the user's that the platform runs with bash at each
    start, None where none is known.
    """

    name: str
    disks: tuple[str, ...]
    poweroff: tuple[str, ...] | None
    release_days: int | None
    start_hook: str | None
    note: str


def load_platforms(path: Path) -> tuple[Platform, ...]:
    """Return the platforms of a file. Raises UsageError naming key and value that is wrong."""
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(raw, dict) or _OTHER not in raw:
        raise UsageError(f"{path}: expected platforms by name, one of them `{_OTHER}`")
    return tuple(_platform(path, name, value) for name, value in raw.items())


@functools.cache
def data_disks() -> tuple[str, ...]:
    """Return the data disks of all platforms, in the order of looking.

    The home folder comes after them. Raises UsageError as `load_platforms` does.
    """
    return tuple(disk for platform in load_platforms(FILE) for disk in platform.disks)


def platform_of(platforms: tuple[Platform, ...], disk: str) -> Platform:
    """Return the platform whose data disk is `disk`."""
    other = next(platform for platform in platforms if platform.name == _OTHER)
    return next((platform for platform in platforms if disk in platform.disks), other)


def _platform(path: Path, name: str, raw: Any) -> Platform:
    if not isinstance(raw, dict) or set(raw) != set(_KEYS):
        raise UsageError(f"{path}: `{name}`: expected the keys {', '.join(_KEYS)}")
    for key in ("disks", "poweroff"):
        words = raw[key]
        if words is None and key == "poweroff":
            continue
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise UsageError(f"{path}: `{name}.{key}`: expected a list of words, found {words!r}")
    for disk in raw["disks"]:
        if not _DISK.fullmatch(disk):
            raise UsageError(
                f"{path}: `{name}.disks`: expected absolute paths of letters, digits and ._-, "
                f"found {disk!r}"
            )
    return Platform(
        name=name,
        disks=tuple(raw["disks"]),
        poweroff=tuple(raw["poweroff"]) if raw["poweroff"] else None,
        release_days=raw["release_days"],
        start_hook=raw["start_hook"],
        note=str(raw["note"]),
    )
