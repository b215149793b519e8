"""What probe.sh printed, as values that tasks can ask, and the digest of a file."""

from __future__ import annotations

import base64
import hashlib
import io
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleFilterError

from tunesmith.core.errors import TunesmithError
from tunesmith.core.printable import one_line
from tunesmith.hosts.answers import (
    DIGEST,
    HOST_PATH,
    WORD,
    AnswerSource,
    HostPath,
    MalformedError,
    Named,
    Number,
    Shape,
    Text,
    Words,
    parse_json,
)

_LONGEST = 4 << 20

# Paths of the host's, which its tasks work on, and what else is more than a text for people.
_OWN_PATH = HostPath(rf"|{HOST_PATH.pattern}")
_NAME = Text(r"[\w.+~-]*", 64, "a word")
_SHAPES: dict[str, Shape] = {
    **dict.fromkeys(("absent", "base", "conda", "data_disk", "home", "locked", "login"), _OWN_PATH),
    **dict.fromkeys(("architecture", "glibc", "missing"), _NAME),
    "busy": Text(r"[0-9 ]*", 100_000, "process ids"),
    "digest": Text(rf"[0-9a-f]{{64}} {HOST_PATH.pattern}", 2000, "a sha256 and a path"),
    "installed": Text(r"|[0-9a-f]{64}", 64, "a sha256"),
    "toolkit": Text(rf"{HOST_PATH.pattern} [0-9.]*", 1100, "a path and a version"),
}
_WORDS = Words(4000)
_EXTRAS = Named(WORD, DIGEST)
_LISTS = ("absent", "digest", "gpu", "locked", "missing", "toolkit")
_NUMBERS = ("epoch", "free_inodes", "free_kib", "inodes", "uid", "used_kib")
_FLAGS = ("apt", "fresh", "miniforge", "registered", "sudo", "writable")
_TEXTS = (
    *("app", "architecture", "base", "busy", "conda", "data_disk", "glibc", "home"),
    *("installed", "login", "marker"),
)


def host_facts(printed: str) -> dict[str, Any]:
    """Return the probe's lines as a mapping in which every key is present.

    A marker that is not JSON counts as none: the environment is then not finished. Raises
    AnsibleFilterError for a value that is not what its key says.
    """
    try:
        return _facts(printed)
    except TunesmithError as error:
        raise AnsibleFilterError(error.message) from None


def _facts(printed: str) -> dict[str, Any]:
    if len(printed) > _LONGEST:
        raise TunesmithError(f"the host: its probe says {len(printed)} characters")
    lines = [line.partition("=") for line in printed.splitlines()]
    for key, _, value in lines:
        asked = AnswerSource("the host", f"its probe: {one_line(key, 40)}")
        shape = Number() if key in _NUMBERS and value.strip() else _SHAPES.get(key, _WORDS)
        shape.read(asked, value.strip())
    one = {key: value.strip() for key, _, value in lines}
    facts: dict[str, Any] = {key: one.get(key, "") for key in _TEXTS}
    facts |= {key: key in one for key in _FLAGS}
    facts |= {key: _number(one.get(key)) for key in _NUMBERS}
    facts |= {key: [value.strip() for name, _, value in lines if name == key] for key in _LISTS}
    facts["toolkit"] = {version: path for path, _, version in _split(facts["toolkit"])}
    facts["digest"] = {path: digest for digest, _, path in _split(facts["digest"])}
    facts["environment"] = _marker(facts.pop("marker"))
    return facts


def _split(lines: list[str]) -> list[tuple[str, str, str]]:
    return [line.partition(" ") for line in lines]


def _number(text: str | None) -> int | None:
    return int(text) if text else None


def _marker(text: str) -> dict[str, Any]:
    texts = dict.fromkeys(("flavour", "lock_sha256", "refused", "self_test"), "")
    empty = texts | {"extras": {}}
    try:
        marker = parse_json(AnswerSource("the host", "its probe: marker"), text)
    except MalformedError:
        return empty
    if not isinstance(marker, dict):
        return empty
    said = {
        key: _WORDS.read(AnswerSource("the host", f"its marker: {key}"), str(marker[key]))
        for key in texts
        if key in marker
    }
    extras = _EXTRAS.read(AnswerSource("the host", "its marker: extras"), marker.get("extras", {}))
    return empty | said | {"extras": extras}


def file_sha256(path: str) -> str:
    """Return the digest of a file on the machine Ansible runs on."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def extra_locks(names: Sequence[str], folder: str) -> dict[str, str]:
    """Return the digest of each extra's lock in a folder of this machine, by its name."""
    return {name: file_sha256(f"{folder}/{name}.txt") for name in names}


def lacking(locks: Mapping[str, str], there: Mapping[str, str]) -> dict[str, str]:
    """Return those of `locks` that an environment has not, or not from the same lock."""
    return {name: digest for name, digest in locks.items() if there.get(name) != digest}


def as_archive(sources: Mapping[str, str]) -> str:
    """Return base64 of a tar.gz: by its name there, a file or a folder of this machine.

    It depends on names and contents alone.
    """
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz", compresslevel=6) as archive:
        for name, source in sorted(sources.items()):
            top = Path(source)
            for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
                if path.is_file():
                    inside = f"{name}/{path.relative_to(top).as_posix()}" if path != top else name
                    entry = tarfile.TarInfo(inside)
                    content = path.read_bytes()
                    entry.size, entry.mode = len(content), 0o600
                    archive.addfile(entry, io.BytesIO(content))
    return base64.encodebytes(stream.getvalue()).decode()


class FilterModule:
    """Ansible's way to find the filters of a file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        return {
            "as_archive": as_archive,
            "extra_locks": extra_locks,
            "file_sha256": file_sha256,
            "host_facts": host_facts,
            "lacking": lacking,
        }
