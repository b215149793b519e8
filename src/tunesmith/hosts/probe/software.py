"""What is installed and set there: programs, Pythons, condas, network settings, mirrors, Docker."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from tunesmith.hosts.answers import OneOf, Shape, Text
from tunesmith.hosts.probe.answer import SECONDS, WORDS, YES_NO, Answer
from tunesmith.hosts.probe.program import Program, programs

_DIGEST = r"sha256:[0-9a-f]{64}"


@dataclass(frozen=True)
class Programs:
    """Which of `ProbeSettings.programs` are there, and whether a C program can be compiled."""

    programs: tuple[str, ...]
    c_headers: bool

    SECTION: ClassVar[str] = "programs"
    SHAPES: ClassVar[Mapping[str, Shape]] = {"programs": WORDS, "c_headers": YES_NO}

    @classmethod
    def read(cls, answer: Answer) -> Programs:
        """Return the section."""
        return cls(tuple(answer.one("programs").split()), answer.one("c_headers") == "yes")


@dataclass(frozen=True)
class Pythons:
    """The interpreters that start, a conda's first."""

    pythons: tuple[Program, ...]

    SECTION: ClassVar[str] = "pythons"
    SHAPES: ClassVar[Mapping[str, Shape]] = {"python": WORDS}

    @classmethod
    def read(cls, answer: Answer) -> Pythons:
        """Return the section."""
        return cls(programs(answer, "python"))


@dataclass(frozen=True)
class Condas:
    """The condas, that of the login first, the one of provisioning last."""

    condas: tuple[Program, ...]

    SECTION: ClassVar[str] = "condas"
    SHAPES: ClassVar[Mapping[str, Shape]] = {"conda": WORDS}

    @classmethod
    def read(cls, answer: Answer) -> Condas:
        """Return the section."""
        return cls(programs(answer, "conda"))


@dataclass(frozen=True)
class Source:
    """What a settings file or variable names: an index, or channels."""

    where: str
    urls: tuple[str, ...]


@dataclass(frozen=True)
class Network:
    """Proxies (variable, address), and the package sources that are set there."""

    proxies: tuple[tuple[str, str], ...]
    no_proxy: str
    network_turbo: bool
    pip_indexes: tuple[Source, ...]
    condarcs: tuple[Source, ...]

    SECTION: ClassVar[str] = "network"
    SHAPES: ClassVar[Mapping[str, Shape]] = {
        **dict.fromkeys(("proxy", "no_proxy", "pip_index", "condarc"), WORDS),
        "network_turbo": YES_NO,
    }

    @classmethod
    def read(cls, answer: Answer) -> Network:
        """Return the section."""
        indexes = (item.partition(" ") for item in answer.all("pip_index"))
        files = (item.partition(" ") for item in answer.all("condarc"))
        return cls(
            proxies=tuple((n, v) for n, _, v in (p.partition(" ") for p in answer.all("proxy"))),
            no_proxy=answer.one("no_proxy"),
            network_turbo=answer.one("network_turbo") == "yes",
            pip_indexes=tuple(Source(where, (url,)) for url, _, where in indexes),
            condarcs=tuple(Source(where, tuple(urls.split())) for where, _, urls in files),
        )


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
class Mirrors:
    """The addresses of `ProbeSettings.urls` in the order in which they were asked for."""

    tried: tuple[Tried, ...]

    SECTION: ClassVar[str] = "mirrors"
    SHAPES: ClassVar[Mapping[str, Shape]] = {"mirror": WORDS}

    @classmethod
    def read(cls, answer: Answer) -> Mirrors:
        """Return the section; a line that is no answer is left out."""
        found = []
        for line in answer.all("mirror"):
            words = re.fullmatch(
                r"([0-9]{1,9}) (\S+) (\S+) (\S+) ([0-9]{1,9}(?:\.[0-9]{1,9})?) (.+)", line
            )
            if words:
                number, kind, outcome, status, seconds, url = words.groups()
                code = int(status) if re.fullmatch(r"[0-9]{1,3}", status) else None
                found.append((int(number), Tried(kind, url, outcome, code, float(seconds))))
        return cls(tuple(tried for _, tried in sorted(found, key=lambda item: item[0])))


@dataclass(frozen=True)
class Bashrc:
    """How long ~/.bashrc takes, in seconds (4 or more: it was cut off); None without one."""

    seconds: float | None

    SECTION: ClassVar[str] = "bashrc"
    SHAPES: ClassVar[Mapping[str, Shape]] = {"bashrc_seconds": SECONDS}

    @classmethod
    def read(cls, answer: Answer) -> Bashrc:
        """Return the section."""
        seconds = answer.one("bashrc_seconds")
        return cls(float(seconds) if seconds else None)


@dataclass(frozen=True)
class Engine:
    """The Docker engine: absent, silent (with what `docker` said), or it answers.

    `images` has the id and the layers' digests of each image there.
    """

    state: str
    fault: str
    images: tuple[tuple[str, tuple[str, ...]], ...]

    SECTION: ClassVar[str] = "engine"
    SHAPES: ClassVar[Mapping[str, Shape]] = {
        "engine": OneOf(("absent", "silent", "answers")),
        "engine.fault": WORDS,
        # Docker itself has no image of more than 127 layers.
        "image": Text(rf"{_DIGEST}( {_DIGEST}){{0,200}} *", 15_000, "digests of image and layers"),
    }

    @classmethod
    def read(cls, answer: Answer) -> Engine:
        """Return the section."""
        words = [line.split() for line in answer.all("image")]
        return cls(
            state=answer.one("engine"),
            fault=answer.one("engine.fault"),
            images=tuple((image, tuple(layers)) for image, *layers in words),
        )
