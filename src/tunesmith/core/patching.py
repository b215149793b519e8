"""Patches of libraries: declared, bound to versions, applied in one way.

A patch replaces one attribute of a library. It declares the versions it was tested with, the code
that reads the attribute, the reason, and when it can be removed. With another version it is
refused by name, because a patch that its caller no longer reads would fail silently. Private names
that we only read are declared too, as a checklist for a new version of the library.

Used by both halves: standard library and packaging.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tunesmith.core.errors import TunesmithError


@dataclass(frozen=True)
class Patch:
    """One replaced attribute.

    `target` is "module:name" or "module:Class.name"; `caller`, in the same form, is the library
    code that reads it, or empty if that is not Python. `versions` is a requirement (name and
    specifier). `make` gets the original and the further arguments of `install`, and returns the
    replacement. `upstream` is the issue there, empty if none is known. `removal` says when the
    patch can be removed. `absent`: the library looks for the attribute but does not define it.
    """

    target: str
    caller: str
    versions: str
    why: str
    removal: str
    make: Callable[..., Any]
    upstream: str = ""
    absent: bool = False


@dataclass(frozen=True)
class PrivateName:
    """A private name that we read, or set on one object, but do not replace.

    `owner` ("module:name") has the attribute `name`, or is the code that uses it. `readers` are
    our modules.
    """

    name: str
    owner: str
    versions: str
    readers: tuple[str, ...]


class PatchError(TunesmithError):
    """A patch or a private name does not fit the installed version of its library."""


_ABSENT = object()
# The original value of each patched target in this process.
_originals: dict[str, Any] = {}


def install(patch: Patch, *arguments: Any) -> None:
    """Replace the attribute in this process; replacing it again starts from the original.

    Raises PatchError if the library has another version or the attribute does not exist.
    """
    check_version(patch.target, patch.versions)
    owner, name = resolve(patch.target)
    if patch.target not in _originals:
        original = _ABSENT if patch.absent else _read(owner, name, patch.target)
        _originals[patch.target] = original
    setattr(owner, name, patch.make(_originals[patch.target], *arguments))


def uninstall(patch: Patch) -> None:
    """Put the original back."""
    owner, name = resolve(patch.target)
    original = _originals.pop(patch.target)
    delattr(owner, name)
    # An inherited one is visible again.
    if original is not _ABSENT and getattr(owner, name, _ABSENT) is not original:
        setattr(owner, name, original)


@contextlib.contextmanager
def installed(patch: Patch, *arguments: Any) -> Iterator[None]:
    """Replace the attribute inside the context."""
    install(patch, *arguments)
    try:
        yield
    finally:
        uninstall(patch)


def is_installed(patch: Patch) -> bool:
    """Whether the patch is applied in this process."""
    return patch.target in _originals


def resolve(target: str) -> tuple[Any, str]:
    """Return the module or class of a target, and the attribute's name. Imports the module."""
    module, _, path = target.partition(":")
    *classes, name = path.split(".")
    try:
        owner: Any = functools.reduce(getattr, classes, importlib.import_module(module))
    except AttributeError as error:
        raise PatchError(f"{target}: {error}; the patch is of another version") from None
    return owner, name


def value_of(target: str) -> Any:
    """Return the current value of a target. Raises PatchError if there is no such name."""
    owner, name = resolve(target)
    return _read(owner, name, target)


def check_version(target: str, versions: str) -> None:
    """Raise PatchError unless `versions` includes the installed version."""
    from packaging.requirements import Requirement

    requirement = Requirement(versions)
    version = importlib.metadata.version(requirement.name)
    if not requirement.specifier.contains(version, prereleases=True):
        raise PatchError(
            f"{target}: this patch is for {versions}, and {requirement.name} {version} is "
            "installed; check whether it is still correct, then change its versions"
        )


def _read(owner: Any, name: str, target: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError as error:
        raise PatchError(f"{target}: {error}; the patch is of another version") from None
