"""configs/stack.yml as frozen values, and its rules."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from packaging.specifiers import SpecifierSet

from tunesmith.core.documents import JsonObject
from tunesmith.core.errors import UsageError
from tunesmith.core.files import parse_yaml, sha256_of

# The first line of a lock contains the digest of its inputs, so that drift is detected.
DIGEST_PREFIX = "# tunesmith-inputs-sha256: "
_DIGEST = re.compile(r"^sha256:[0-9a-f]{64}$")

# A line of a lock: the package's name and its version.
_PINNED = re.compile(r"^([a-z0-9][a-z0-9_.-]*)==", re.MULTILINE)


@dataclass(frozen=True)
class Flavour:
    """One build of the training environment.

    `minimum_driver` is the minimum major version of the NVIDIA driver, higher for the compute
    capabilities in `minimum_driver_of_capability`; from `native_driver` on no self-test is needed.
    `compute_capabilities` are those supported by its binaries, `size_bytes` is its size on disk.
    """

    name: str
    requirements: tuple[str, ...]
    cuda: str
    minimum_driver: int
    minimum_driver_of_capability: Mapping[str, int]
    native_driver: int
    compute_capabilities: tuple[str, ...]
    size_bytes: int
    lock: Path

    @property
    def lock_sha256(self) -> str:
        """Digest of the lock file, which identifies the installed packages."""
        return sha256_of(self.lock)

    @property
    def packages(self) -> frozenset[str]:
        """Names of the packages in the lock, normalised as on PyPI."""
        return frozenset(_PINNED.findall(self.lock.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class CondaInstaller:
    """The Miniforge installer for hosts without conda (Linux x86-64)."""

    version: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Stack:
    """The only definition of the training environment.

    `uncompiled` are patterns of modules that are not compiled at installation (stack/bytecode.py).
    """

    path: Path
    control_python: str
    python: str
    llamafactory: str
    llamafactory_python: Mapping[str, str]
    requirements: tuple[str, ...]
    environment_name: str
    conda: CondaInstaller
    host_spare_bytes: int
    host_inodes: int
    default_flavour: str
    flavours: Mapping[str, Flavour]
    platform: str
    source_packages: tuple[str, ...]
    uncompiled: tuple[str, ...]
    image_base: str
    variables: Mapping[str, str]

    @property
    def build_constraints(self) -> Path:
        """Hashed versions of the build tools for packages without a wheel."""
        return self.path.parent / "locks" / "build-constraints.txt"

    @property
    def schema(self) -> Path:
        """JSON Schema of LLaMA-Factory's config keys, rendered from its dataclasses."""
        return self.path.parent / "schema" / f"llamafactory-{self.llamafactory}.schema.json"

    def flavour(self, name: str | None = None) -> Flavour:
        """Return a flavour, by default the default one. Raises UsageError if unknown."""
        name = name or self.default_flavour
        if name not in self.flavours:
            names = ", ".join(self.flavours)
            raise UsageError(f"flavour {name!r} is not in {self.path}; known are {names}")
        return self.flavours[name]

    @property
    def host_free_bytes(self) -> int:
        """Bytes that must be free on a host's data disk, for any flavour."""
        return max(f.size_bytes for f in self.flavours.values()) + self.host_spare_bytes

    def inputs(self, flavour: Flavour) -> tuple[str, ...]:
        """Return the requirement lines that a lock is resolved from."""
        return (*self.requirements, *flavour.requirements)

    def inputs_digest(self, flavour: Flavour) -> str:
        """Return the sha256 of all inputs of a lock."""
        material = [self.python, self.platform, sorted(self.inputs(flavour))]
        return hashlib.sha256(json.dumps(material).encode()).hexdigest()


def load_stack(path: Path) -> Stack:
    """Read stack.yml and check its rules.

    Raises UsageError with the key if one is missing or wrong, and if PyPI forbids the pair of
    Python and LLaMA-Factory.
    """
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    try:
        flavours = {
            name: Flavour(
                name=name,
                requirements=tuple(value["requirements"]),
                cuda=str(value["cuda"]),
                minimum_driver=int(value["minimum_driver"]),
                minimum_driver_of_capability=dict(value.get("minimum_driver_of_capability", {})),
                native_driver=int(value["native_driver"]),
                compute_capabilities=tuple(value["compute_capabilities"]),
                size_bytes=int(value["size_bytes"]),
                lock=path.parent / "locks" / f"{name}.txt",
            )
            for name, value in raw["flavours"].items()
        }
        stack = Stack(
            path=path,
            control_python=raw["control"]["python"],
            python=_text(raw["training"], "python", path),
            llamafactory=_text(raw["training"], "llamafactory", path),
            llamafactory_python=dict(raw["llamafactory_python"]),
            requirements=tuple(raw["requirements"]),
            environment_name=raw["environment_name"],
            conda=CondaInstaller(
                version=raw["conda"]["version"],
                size_bytes=int(raw["conda"]["size_bytes"]),
                sha256=raw["conda"]["sha256"],
            ),
            host_spare_bytes=int(raw["host_room"]["spare_bytes"]),
            host_inodes=int(raw["host_room"]["inodes"]),
            default_flavour=raw["default_flavour"],
            flavours=flavours,
            platform=raw["platform"],
            source_packages=tuple(raw["source_packages"]),
            uncompiled=tuple(raw["uncompiled"]),
            image_base=_by_digest(raw["image"], path),
            variables=dict(raw["variables"]),
        )
    except KeyError as error:
        raise UsageError(f"{path}: the key {error.args[0]!r} is missing") from None
    stack.flavour()
    check_pair(stack)
    return stack


def driver_requirement(flavour: Flavour) -> str:
    """Return the driver requirement that the NVIDIA container toolkit checks at start.

    Syntax of NVIDIA_REQUIRE_*: words are alternatives, a comma inside one means "and".
    """
    special = flavour.minimum_driver_of_capability
    if not special:
        return f"driver>={flavour.minimum_driver}"
    # All GPUs run on the highest; those below the first special capability also on the lowest.
    first = min(special, key=float)
    return f"driver>={max(special.values())} arch<{first},driver>={flavour.minimum_driver}"


def check_pair(stack: Stack) -> None:
    """Raise UsageError for a pair of Python and LLaMA-Factory that PyPI forbids."""
    accepts = stack.llamafactory_python.get(stack.llamafactory)
    if accepts is None:
        raise UsageError(
            f"{stack.path}: llamafactory {stack.llamafactory} has no line in llamafactory_python",
            hint="add the Requires-Python that PyPI shows for it",
        )
    if stack.python not in SpecifierSet(accepts):
        fitting = [
            v for v, s in stack.llamafactory_python.items() if stack.python in SpecifierSet(s)
        ]
        raise UsageError(
            f"{stack.path}: LLaMA-Factory {stack.llamafactory} needs Python {accepts} (PyPI), the "
            f"stack has {stack.python}",
            hint=f"the newest LLaMA-Factory for Python {stack.python} is "
            f"{max(fitting, default='none')}",
        )
    pinned = [line for line in stack.requirements if line.startswith("llamafactory")]
    if not any(line.endswith(f"=={stack.llamafactory}") for line in pinned):
        raise UsageError(
            f"{stack.path}: training.llamafactory is {stack.llamafactory}, but requirements say "
            f"{', '.join(pinned) or 'nothing'}"
        )


def drift(stack: Stack) -> tuple[str, ...]:
    """Return one line for every lock that was not resolved from the current stack."""
    lines = []
    for flavour in stack.flavours.values():
        if not flavour.lock.is_file():
            lines.append(f"{flavour.lock} is missing; `inv stack.lock` makes it")
            continue
        with flavour.lock.open(encoding="utf-8") as lock:
            first = lock.readline().strip()
        if first != DIGEST_PREFIX + stack.inputs_digest(flavour):
            lines.append(f"{flavour.lock} is not of this stack.yml; `inv stack.lock` renews it")
    return tuple(lines)


def _by_digest(image: JsonObject, path: Path) -> str:
    digest = str(image["digest"])
    if not _DIGEST.match(digest):
        # A tag may point to different bytes tomorrow.
        raise UsageError(f"{path}: image.digest must be sha256:64 hex digits (found {digest})")
    return f"{image['base']}@{digest}"


def _text(section: JsonObject, key: str, path: Path) -> str:
    value = section[key]
    if not isinstance(value, str):
        # YAML reads 3.10 as the number 3.1.
        raise UsageError(f'{path}: training.{key} must be in quotes (found {value}): "3.10"')
    return value
