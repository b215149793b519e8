"""What the roles promise on paper: options, defaults, rules without exceptions."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.contract

ROLES = ("base", "conda", "cuda", "huggingface", "job", "llamafactory", "preflight")


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.fixture
def roles(root: Path) -> Path:
    return root / "ansible" / "roles"


def test_these_are_the_roles(roles: Path) -> None:
    assert sorted(path.name for path in roles.iterdir()) == sorted(ROLES)


@pytest.mark.parametrize("role", ROLES)
def test_the_options_are_the_defaults(roles: Path, role: str) -> None:
    options = read(roles / role / "meta/argument_specs.yml")["argument_specs"]["main"]["options"]
    defaults = read(roles / role / "defaults/main.yml")
    assert {name: option["default"] for name, option in options.items()} == defaults
    for name, option in options.items():
        assert option["description"] and option["type"], name
        assert name.startswith(f"{role}_")


@pytest.mark.parametrize("role", ROLES)
def test_no_version_is_written_in_a_role(root: Path, roles: Path, role: str) -> None:
    """But the few that say what a role takes without the playbook."""
    stack = read(root / "configs/stack.yml")
    pins = [stack["training"]["llamafactory"], *stack["flavours"]]
    pins += [stack["conda"]["version"], stack["conda"]["sha256"]]
    for flavour in stack["flavours"].values():
        pins += [pin.partition("==")[2] for pin in flavour["requirements"]]
    for file in (roles / role).rglob("*"):
        if file.is_file() and file.suffix != ".pyc":
            text = file.read_text(encoding="utf-8")
            assert not [pin for pin in pins if pin in text], file


def test_lint_has_no_exceptions(root: Path) -> None:
    assert read(root / ".ansible-lint") == {
        "profile": "production",
        "offline": True,
        # No playbook, role or task: rows that quote lines of code.
        "exclude_paths": ["tests/guards/"],
    }
    assert not (root / ".ansible-lint-ignore").exists()
    for file in (root / "ansible").rglob("*.yml"):
        assert not re.search(r"#\s*noqa", file.read_text(encoding="utf-8")), file


@pytest.mark.parametrize("playbook", ["provision", "reset"])
def test_the_playbook_can_be_read_from_any_folder(
    root: Path, tmp_path: Path, playbook: str
) -> None:
    argv = [str(Path(sys.executable).with_name("ansible-playbook")), "--syntax-check"]
    argv += ["--inventory", "localhost,", str(root / "ansible/playbooks" / f"{playbook}.yml")]
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_lint_is_clean(root: Path) -> None:
    argv = [str(Path(sys.executable).with_name("ansible-lint")), "--nocolor"]
    done = subprocess.run(argv, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
