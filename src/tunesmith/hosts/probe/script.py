"""The text of the probe: settings, and the shell files that the wanted sections need."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tunesmith.core.errors import UsageError
from tunesmith.core.names import ENVIRONMENT_MARKER
from tunesmith.hosts.platforms import data_disks

_FOLDER = Path(__file__).parent
# In which file a section is a function; the files stand before it that it uses.
_FILES: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("user", "system", "resources", "places", "disks"), ("host",)),
    **dict.fromkeys(("gpu", "gpu_use", "cuda"), ("gpu",)),
    **dict.fromkeys(("programs", "pythons", "condas"), ("software",)),
    **dict.fromkeys(("network", "bashrc", "engine"), ("software",)),
    **dict.fromkeys(("environments", "provisioned", "installation"), ("installation",)),
    "mirrors": ("mirrors",),
    "findings": ("gpu", "findings"),
}
# The settings are words of the shell.
_WORD = re.compile(r"[^\s*?\[\]\\]+")


@dataclass(frozen=True)
class ProbeSettings:
    """What the sections are to look for.

    `base` is tunesmith's folder where it is not to be found but given, `environment` the name of
    the conda environment, `programs` what `Programs` looks for, `urls` the (kind, address) pairs
    that `Mirrors` tries, through `proxy` and trusting the authorities in `ca`, PEM text.
    `disks` are where a data disk may be, in the order of looking.
    """

    base: str = ""
    environment: str = ""
    programs: tuple[str, ...] = ()
    urls: tuple[tuple[str, str], ...] = ()
    proxy: str = ""
    ca: str = ""
    disks: tuple[str, ...] = field(default_factory=data_disks)


def script(sections: Iterable[str], settings: ProbeSettings) -> str:
    """Return the POSIX sh script that answers for these sections; it changes nothing.

    Raises UsageError for a disk or an address that is no word.
    """
    names = tuple(sections)
    files = dict.fromkeys(file for name in names for file in _FILES[name])
    head = _head(settings) | {"SECTIONS": " ".join(names)}
    return _joined(head, ("common", "places", *files, "main"))


def with_places(script: str) -> str:
    """Return a script that may call find_provisioned and find_environment (places.sh)."""
    head = {"DISKS": _words("disk", data_disks()), "MARKER": ENVIRONMENT_MARKER}
    return _joined(head, ("places",)) + script


def with_findings(script: str) -> str:
    """Return a script that may call `found` (findings.sh)."""
    return _joined({}, ("common", "gpu", "findings")) + script


def _head(settings: ProbeSettings) -> dict[str, str]:
    urls = [f"{kind}={url}" for kind, url in settings.urls]
    return {
        "DISKS": _words("disk", settings.disks),
        "BASE": settings.base,
        "MARKER": ENVIRONMENT_MARKER,
        "ENVIRONMENT": settings.environment,
        "PROGRAMS": _words("program", settings.programs),
        # Not split by the shell's patterns: mirrors.sh switches these off.
        "URLS": " ".join("".join(url.split()) for url in urls),
        "PROXY": settings.proxy,
        "CA": settings.ca,
    }


def _words(what: str, words: Iterable[str]) -> str:
    listed = tuple(words)
    for word in listed:
        if not _WORD.fullmatch(word):
            raise UsageError(f"{what} {word!r}: expected no blanks and no *?[]\\ in its name")
    return " ".join(listed)


def _joined(head: Mapping[str, str], files: Iterable[str]) -> str:
    # Not exported: a bundle of authorities is longer than an environment variable may be.
    lines = [f"TUNESMITH_PROBE_{key}={shlex.quote(value)}" for key, value in head.items() if value]
    return "\n".join([*lines, *(_text(file) for file in files)])


@functools.cache
def _text(file: str) -> str:
    """Return a shell file without the comments that stand on lines of their own."""
    text = (_FOLDER / f"{file}.sh").read_text(encoding="utf-8")
    return re.sub(r"^ *#.*\n", "", text, flags=re.MULTILINE)
