"""What can be said of any patch: its library has its version, its caller reads the target."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tunesmith
from tunesmith.core.patching import (
    Patch,
    PrivateName,
    check_version,
    install,
    is_installed,
    resolve,
    uninstall,
    value_of,
)


def names_in(value: Any) -> set[str]:
    """Return the names that a function's code looks up, its inner functions included."""
    code = getattr(getattr(value, "__wrapped__", value), "__code__", None)
    return set(_names(code)) if code is not None else set()


def _names(code: types.CodeType) -> Iterator[str]:
    yield from (*code.co_names, *code.co_freevars)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def check(patch: Patch, *given: Any) -> None:
    """Assert that a patch is for what is installed, and that its caller reads what it replaces."""
    check_version(patch.target, patch.versions)
    owner, name = resolve(patch.target)
    assert patch.why and patch.removal, patch.target
    if patch.caller:
        caller = value_of(patch.caller)
        caller = getattr(caller, "__wrapped__", caller)
        assert name in names_in(caller), f"{patch.caller} does not read {name}"
        if isinstance(owner, types.ModuleType) and caller.__module__ == owner.__name__:
            assert caller.__globals__ is vars(owner), f"{patch.caller} reads another {name}"
    before = vars(owner).get(name)
    install(patch, *given)
    try:
        assert is_installed(patch)
        assert vars(owner)[name] is not before or patch.absent, patch.target
    finally:
        uninstall(patch)
    assert vars(owner).get(name) is before, patch.target


def check_private(private: PrivateName) -> None:
    """Assert that a private name is there, or used where it is said to be."""
    check_version(f"{private.owner}: {private.name}", private.versions)
    place = value_of(private.owner)
    assert hasattr(place, private.name) or private.name in names_in(place), private
    for reader in private.readers:
        file = Path(tunesmith.__file__).parent / f"{reader.replace('.', '/')}.py"
        text = file.read_text(encoding="utf-8")
        # run_sft and its like are named by their stage.
        assert private.name in text or private.name.startswith("run_"), (private.name, reader)
