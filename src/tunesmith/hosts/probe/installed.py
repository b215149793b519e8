"""What of ours is on a host: environments, what jobs need, what provisioning goes by, drift."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from tunesmith.hosts.answers import (
    DIGEST,
    HOST_PATH,
    WORD,
    AnswerSource,
    MalformedError,
    Shape,
    Text,
    Words,
    parse_json,
)
from tunesmith.hosts.probe.answer import COUNT, PATH, YES_NO, Answer

_LONGEST_MARKER = 1 << 16
_TOLD = Words(4000)
# The findings are printable ASCII; findings.sh lets no other character through.
_FINDING = Text(r"[ -~]*", 8000, "a finding")


@dataclass(frozen=True)
class Environment:
    """A training environment; `whole`: it has its finish marker, whose parts the others are.

    `refused` is set where a self-test failed here and the fallback was taken, `self_test` names
    the GPUs that passed it.
    """

    path: str
    whole: bool
    flavour: str = ""
    lock_sha256: str = ""
    refused: str = ""
    self_test: str = ""


# A marker's parts; a text that is not there is empty.
_MARKER: Mapping[str, Shape] = {
    "flavour": WORD,
    "lock_sha256": DIGEST,
    "refused": _TOLD,
    "self_test": _TOLD,
}


@dataclass(frozen=True)
class Environments:
    """The training environments below tunesmith's folder."""

    environments: tuple[Environment, ...]

    SECTION: ClassVar[str] = "environments"
    SHAPES: ClassVar[Mapping[str, Shape]] = {
        "environment": Text(r"[\s\S]*", _LONGEST_MARKER, "a path and a finish marker")
    }

    @property
    def whole(self) -> tuple[Environment, ...]:
        """Those that are finished."""
        return tuple(environment for environment in self.environments if environment.whole)

    def at(self, path: str) -> Environment | None:
        """Return the environment in a folder."""
        return next((found for found in self.environments if found.path == path), None)

    @classmethod
    def read(cls, answer: Answer) -> Environments:
        """Return the section. Raises TunesmithError for a path or a marker that nobody writes."""
        source = answer.source("environment")
        lines = (line.partition("\t") for line in answer.all("environment"))
        return cls(tuple(_environment(source, path, marker) for path, _, marker in lines))


def _environment(source: AnswerSource, path: str, text: str) -> Environment:
    """Return an environment; one whose marker is not JSON is half made."""
    folder = HOST_PATH.read(source, path)
    at = source.at("marker")
    try:
        marker = parse_json(at, text)
    except MalformedError:
        return Environment(folder, False)
    if not isinstance(marker, dict):
        return Environment(folder, False)
    values = {
        key: shape.read(at.at(key), marker[key]) if marker.get(key) else ""
        for key, shape in _MARKER.items()
    }
    return Environment(folder, True, **values)


@dataclass(frozen=True)
class Provisioned:
    """What the last provisioning wrote down: the parts of its fingerprint, the mirror profile's
    file (empty: none) and the Hugging Face cache. All empty on a host without."""

    asked: Mapping[str, str]
    mirror_file: str
    hf_home: str

    SECTION: ClassVar[str] = "provisioned"
    SHAPES: ClassVar[Mapping[str, Shape]] = {
        "fingerprint": Text(r"[\w =,.:+/~-]*", 2000, "the words of a state's fingerprint"),
        "mirror_file": PATH,
        "hf_home": PATH,
    }

    @classmethod
    def read(cls, answer: Answer) -> Provisioned:
        """Return the section."""
        parts = answer.one("fingerprint").split(",")
        return cls(
            asked=dict(part.split("=", 1) for part in parts if "=" in part),
            mirror_file=answer.one("mirror_file"),
            hf_home=answer.one("hf_home"),
        )


@dataclass(frozen=True)
class Installation:
    """What provisioning goes by.

    `absent` are folders to make. `installed` is the digest of the lock that was installed to its
    end, `fresh` says that the environment was made and nothing installed, `app` where its
    tunesmith is. `used_kib` is what a half-made installation takes. `busy` are processes of the
    environment, `locked` the locks that are held. `registered`: conda knows our environments.
    `digests` has the sha256 of what is ours in files, by path.
    """

    absent: tuple[str, ...]
    installed: str
    fresh: bool
    app: str
    used_kib: int | None
    busy: str
    locked: tuple[str, ...]
    registered: bool
    digests: Mapping[str, str]

    SECTION: ClassVar[str] = "installation"
    SHAPES: ClassVar[Mapping[str, Shape]] = {
        **dict.fromkeys(("absent", "locked"), HOST_PATH),
        "installed": DIGEST,
        "app": _TOLD,
        "used_kib": COUNT,
        "busy": Text(r"[0-9 ]*", 100_000, "process ids"),
        **dict.fromkeys(("fresh", "registered"), YES_NO),
        "digest": Text(rf"[0-9a-f]{{64}} {HOST_PATH.pattern}", 2000, "a sha256 and a path"),
    }

    @classmethod
    def read(cls, answer: Answer) -> Installation:
        """Return the section."""
        digests = (line.partition(" ") for line in answer.all("digest"))
        installed = answer.all("installed")
        return cls(
            absent=tuple(answer.all("absent")),
            installed=installed[-1] if installed else "",
            fresh=answer.one("fresh") == "yes",
            app=answer.one("app"),
            used_kib=answer.number("used_kib"),
            busy=answer.one("busy"),
            locked=tuple(answer.all("locked")),
            registered=answer.one("registered") == "yes",
            digests={path: digest for digest, _, path in digests},
        )


@dataclass(frozen=True)
class Findings:
    """What provisioning left: `recorded` is the text of state.json, `found` what is there now,
    KEY=VALUE each. Both empty on a host without."""

    recorded: str
    found: tuple[str, ...]

    SECTION: ClassVar[str] = "findings"
    OFTEN: ClassVar[int] = 100_000
    SHAPES: ClassVar[Mapping[str, Shape]] = {
        "recorded": Text(r"[^\n]*", 16_000, "a line of state.json"),
        "found": _FINDING,
    }

    @classmethod
    def read(cls, answer: Answer) -> Findings:
        """Return the section."""
        return cls("\n".join(answer.all("recorded")), tuple(answer.all("found")))
