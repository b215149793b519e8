"""Patches of other people's code: declared, bound to versions, applied in one way.

A patch replaces one attribute of a library. It says for which versions that was tried, who reads
the attribute, why, and when it can go; with another version it is refused by its name, because a
patch that no longer meets its caller would fail in silence. Private names that are only read are
declared too, so that a new version of a library has a list to look through.

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

    `target` is "module:name" or "module:Class.name"; `caller`, of the same form, is the code of
    the library that reads it; empty where that is no Python. `versions` is a requirement (a name
    and a specifier). `make` gets the original, and what `install` was given besides, and returns
    the replacement. `upstream` is the issue there, empty where none is known. `removal` says when
    the patch can go.
    `absent`: the library looks for the attribute and has none of its own.
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
    """A private name that is read, or set on one object, and otherwise left as it is.

    `place` ("module:name") has the attribute `name`, or is the code that uses it. `readers` are
    modules of ours.
    """

    name: str
    place: str
    versions: str
    readers: tuple[str, ...]


class PatchError(TunesmithError):
    """A patch or a private name is not for the installed version of its library."""


_ABSENT = object()
# What stood at each patched target of this process.
_originals: dict[str, Any] = {}


def install(patch: Patch, *given: Any) -> None:
    """Replace the attribute in this process; replacing it again starts from the original.

    Raises PatchError when the library has another version, or the attribute is gone.
    """
    check_version(patch.target, patch.versions)
    owner, name = resolve(patch.target)
    if patch.target not in _originals:
        there = _ABSENT if patch.absent else _read(owner, name, patch.target)
        _originals[patch.target] = there
    setattr(owner, name, patch.make(_originals[patch.target], *given))


def uninstall(patch: Patch) -> None:
    """Put the original back."""
    owner, name = resolve(patch.target)
    original = _originals.pop(patch.target)
    delattr(owner, name)
    # One that was inherited is there again.
    if original is not _ABSENT and getattr(owner, name, _ABSENT) is not original:
        setattr(owner, name, original)


@contextlib.contextmanager
def installed(patch: Patch, *given: Any) -> Iterator[None]:
    """Replace the attribute within this."""
    install(patch, *given)
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
    """Return what stands at a target now. Raises PatchError when there is no such name."""
    owner, name = resolve(target)
    return _read(owner, name, target)


def check_version(target: str, versions: str) -> None:
    """Raise PatchError unless the installed version is one that `versions` names."""
    from packaging.requirements import Requirement

    requirement = Requirement(versions)
    found = importlib.metadata.version(requirement.name)
    if not requirement.specifier.contains(found, prereleases=True):
        raise PatchError(
            f"{target}: this patch is for {versions}, and {requirement.name} {found} is installed; "
            "look whether it still holds, then change its versions"
        )


def _read(owner: Any, name: str, target: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError as error:
        raise PatchError(f"{target}: {error}; the patch is of another version") from None
