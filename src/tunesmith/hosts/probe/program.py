"""A program of a host, with its version: what several sections tell."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tunesmith.hosts.answers import HOST_PATH
from tunesmith.hosts.probe.answer import Answer

_VERSION = re.compile(r"[0-9][\w.+-]{0,40}")


@dataclass(frozen=True)
class Program:
    """A program and its version, None where it did not say."""

    path: str
    version: str | None


def programs(answer: Answer, key: str) -> tuple[Program, ...]:
    """Return the programs of a key, `VERSION PATH` each.

    What a program calls its version may be anything. Raises TunesmithError for a path that is
    none.
    """
    found = []
    for line in answer.all(key):
        version, slash, rest = line.partition(" /")
        path = HOST_PATH.read(answer.source(key), f"/{rest}" if slash else line)
        found.append(Program(path, version if _VERSION.fullmatch(version) else None))
    return tuple(found)
