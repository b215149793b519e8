"""Each half imports what it declares: control in pyproject.toml, training in the locks."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tunesmith.project import Project

pytestmark = pytest.mark.contract


@functools.cache
def manifest(root: Path) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Return what pyproject.toml declares for people and, besides, for developers."""
    raw = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    control = raw["project"]["optional-dependencies"]["control"]
    dev = raw["dependency-groups"]["dev"]
    return tuple(map(Requirement, control)), tuple(map(Requirement, dev))


def names(requirements: tuple[Requirement, ...]) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in requirements}


def locked(lock: Path) -> dict[str, list[str]]:
    """Return the versions a lock has of each distribution; one may have several, by marker."""
    found: dict[str, list[str]] = {}
    for name, version in re.findall(r"(?m)^([A-Za-z0-9._-]+)==([^\s;]+)", lock.read_text("utf-8")):
        found.setdefault(canonicalize_name(name), []).append(version)
    return found


def imported(files: list[Path]) -> dict[str, str]:
    """Return the third-party modules that files import, and the first file that does."""
    found: dict[str, str] = {}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules = [node.module]
            else:
                continue
            for top in {module.partition(".")[0] for module in modules}:
                if top not in {*sys.stdlib_module_names, "tunesmith"}:
                    found.setdefault(top, file.name)
    return found


def test_the_control_half_imports_what_it_declares(root: Path) -> None:
    source = root / "src/tunesmith"
    files = [file for file in source.rglob("*.py") if file.relative_to(source).parts[0] != "job"]
    modules = imported([root / "tasks.py", *sorted(files)])
    assert {"yaml", "invoke", "numpy"} <= modules.keys()
    distributions = importlib.metadata.packages_distributions()
    declared = names(manifest(root)[0])
    for module, file in modules.items():
        owners = {canonicalize_name(owner) for owner in distributions.get(module, ())}
        assert owners & declared, f"{file} imports {module}: add {owners or module} to `control`"


def test_the_training_half_imports_what_is_locked(project: Project) -> None:
    modules = imported(sorted((project.root / "src/tunesmith/job").rglob("*.py")))
    assert {"torch", "llamafactory"} <= modules.keys()
    for flavour in project.stack.flavours:
        # The curves' page comes from a lock of its own, which is fetched when it is asked for.
        locks = [
            project.root / f"configs/locks/{name}.txt" for name in (flavour, "extras/tensorboard")
        ]
        versions = {name for lock in locks for name in locked(lock)}
        for module, file in modules.items():
            name = canonicalize_name({"yaml": "pyyaml"}.get(module, module))
            assert name in versions, f"{file} imports {module}, which {flavour} does not have"


def test_the_control_lock_holds_what_is_declared(root: Path) -> None:
    versions = locked(root / "configs/locks/control.txt")
    control, dev = manifest(root)
    assert not names(control) & names(dev)
    for requirement in (*control, *dev):
        found = versions.get(canonicalize_name(requirement.name), [])
        assert found, f"{requirement} is not in the lock; `inv stack.lock` resolves it"
        for version in found:
            assert requirement.specifier.contains(version), f"{requirement}: locked is {version}"
