"""Patches of what the control environment has, and the one way patches are applied."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import patch_checks
from tunesmith.basemodel import hub_patches
from tunesmith.cli import table
from tunesmith.core.errors import TunesmithError
from tunesmith.core.patching import Patch, PatchError, install, installed, is_installed, uninstall

pytestmark = pytest.mark.contract

GIVEN = {
    hub_patches.SMALL_CHUNKS.target: (1024,),
    hub_patches.JUDGED_METADATA.target: ("a",),
    **{page.target: (table.STEPS,) for page in table.PAGES},
}
PATCHES = (*table.PATCHES, *table.PAGES, *hub_patches.PATCHES)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.target)
def test_a_patch_is_for_this_version_and_its_caller_reads_it(patch: Patch) -> None:
    mine = is_installed(patch)
    if mine:
        uninstall(patch)
    patch_checks.check(patch, *GIVEN.get(patch.target, ()))
    if mine:
        install(patch, *GIVEN.get(patch.target, ()))


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.target)
def test_another_version_is_refused_by_name(patch: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _name: "99.0")
    with pytest.raises(TunesmithError, match="this patch is for") as refused:
        install(patch, *GIVEN.get(patch.target, ()))
    assert patch.target in refused.value.message


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A module with a function, a class that inherits one, and nothing at `absent`."""
    module = types.ModuleType("patched_library")

    class Base:
        def ask(self) -> int:
            return 1

    class Child(Base):
        pass

    module.Child, module.ask = Child, Base.ask  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "patched_library", module)
    yield module


def patch_of(target: str, **more: bool) -> Patch:
    return Patch(
        f"patched_library:{target}", "", "invoke", "w", "r", lambda old, new=2: new, **more
    )


def test_what_was_there_is_there_again(library: types.ModuleType) -> None:
    own, inherited = patch_of("ask"), patch_of("Child.ask")
    before = library.ask
    with installed(own), installed(inherited, 5):
        assert (library.ask, library.Child.ask) == (2, 5)
        install(own, 7)
        assert library.ask == 7
    assert library.ask is before
    assert "ask" not in vars(library.Child)
    with installed(patch_of("absent", absent=True)):
        assert library.absent == 2
    assert not hasattr(library, "absent")


@pytest.mark.parametrize("target", ["gone", "Child.gone", "Gone.ask"])
def test_a_name_that_is_gone_is_told(library: types.ModuleType, target: str) -> None:
    with pytest.raises(PatchError, match="the patch is of another version"):
        install(patch_of(target))
    with pytest.raises(PatchError, match="patched_library"):
        install(patch_of(target))


def test_nobody_else_patches_a_library(root: Path) -> None:
    """Assignments to attributes of imported libraries stand in the registry and nowhere else."""
    import ast

    found = []
    for file in sorted((root / "src/tunesmith").rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        imported = {
            alias.asname or alias.name.partition(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            and not str(getattr(node, "module", "")).startswith("tunesmith")
            for alias in node.names
        }
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else []
            for target in targets:
                base = target
                while isinstance(base, ast.Attribute):
                    base = base.value  # type: ignore[assignment]
                named = isinstance(target, ast.Attribute) and isinstance(base, ast.Name)
                if named and base.id in imported - {"sys"}:
                    found.append(f"{file.name}:{node.lineno}")
    assert found == []
