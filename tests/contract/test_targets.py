"""A target that only runs jobs: what needs no more works, all else refuses it in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from standins.bare_target import BareTarget
from tunesmith.core.errors import UsageError
from tunesmith.hosts import inventory
from tunesmith.plan.target import (
    ModelReceiver,
    PowerControl,
    PullDestination,
    PullSource,
    Resumable,
    Target,
)
from tunesmith.project import Project
from tunesmith.services.service import Services
from tunesmith.targets import capability, factory
from tunesmith.targets.container import ContainerTarget
from tunesmith.targets.host import HostTarget
from tunesmith.targets.local import LocalTarget

pytestmark = pytest.mark.contract

INV = Path(__file__).parents[1] / "standins" / "bare_target.py"
CAPABILITIES = (
    PullSource,
    PullDestination,
    PowerControl,
    ModelReceiver,
    Resumable,
    Services,
)


def inv(root: Path, home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `inv` as it is where the bare target has been added."""
    return subprocess.run(
        [sys.executable, INV, *words],
        cwd=root,
        env={
            **os.environ,
            "TUNESMITH_HOME": str(home),
            "TUNESMITH_INVENTORY": str(home / "inventory"),
            "PYTHONPATH": str(root / "src"),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("words", "lacks"),
    [
        ("train --then poweroff --on bare", "bare has no power switch"),
        ("train --then pull --on bare", "bare keeps its runs"),
        ("train --from-laptop x --on bare", "bare takes no base model"),
        ("--dry train --then poweroff --on bare", "bare has no power switch"),
        ("pull --on bare", "bare keeps its runs"),
        ("--dry pull --on bare", "bare keeps its runs"),
        ("pull --merge-here --on bare", "bare keeps its runs"),
        ("webui --on bare", "bare runs no web services"),
        ("webui --stop --on bare", "bare runs no web services"),
        ("api --on bare", "bare runs no web services"),
        ("tensorboard --on bare", "bare runs no web services"),
        ("tunnel 6006 --on bare", "bare runs no web services"),
        ("host.autostart --on bare", "bare does not resume runs"),
        ("provision --on bare", "--on bare: "),
        ("--dry host.add bare root@127.0.0.1", "'bare' is a target"),
    ],
)
def test_what_needs_more_refuses_it_in_one_line(
    root: Path, tmp_path: Path, words: str, lacks: str
) -> None:
    done = inv(root, tmp_path, *words.split())
    lines = done.stderr.splitlines()
    assert done.returncode == UsageError.exit_code, done.stdout + done.stderr
    assert lines[0].startswith(f"error: {lacks}"), lines
    assert [line.partition(":")[0] for line in lines[1:]] == ["hint"], lines
    assert done.stdout == ""
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("runs --on bare", "r1"),
        ("logs --on bare", "the log"),
        ("stop --on bare", "run r1: succeeded at step 3"),
        ("rm --run r1 --on bare", "run r1: deleted, 1.0 kB free again"),
        ("--dry train --on bare", "run      /bare/runs/"),
        ("--dry train --on bare", "phases   check -> fetch -> before -> train -> after"),
        ("chat --on bare --what merged --prompt x", ""),
    ],
)
def test_what_needs_no_more_works(root: Path, tmp_path: Path, words: str, shown: str) -> None:
    done = inv(root, tmp_path, *words.split())
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout


@pytest.mark.parametrize("wanted", CAPABILITIES)
def test_each_capability_has_its_reason_and_what_to_do(wanted: type) -> None:
    target: Target = BareTarget()
    with pytest.raises(UsageError, match=r"^bare ") as refused:
        capability.require(target, wanted)
    assert refused.value.hint
    assert "\n" not in refused.value.message


def test_each_target_has_the_capabilities_that_it_says() -> None:
    """Of classes: what a target can do does not depend on a host that answers."""
    held = {
        LocalTarget: {PullDestination, Services},
        ContainerTarget: {PullDestination},
        HostTarget: {PullSource, PowerControl, ModelReceiver, Resumable, Services},
    }
    for kind, wanted in held.items():
        target = kind.__new__(kind)
        assert {c for c in CAPABILITIES if isinstance(target, c)} == wanted, kind.__name__


def test_no_host_has_the_name_of_a_target(root: Path, tmp_path: Path) -> None:
    for name in factory.TARGETS:
        with pytest.raises(UsageError, match="is a target of its own"):
            factory.check_host_name(name)
    with pytest.raises(UsageError, match="known are: local, container") as unknown:
        factory.target_of(Project(root, tmp_path), "nohost", print)
    assert "inv host.add" in unknown.value.hint
    assert inventory.check_name("gpu1") == "gpu1"


def test_no_kind_of_target_is_asked_for(root: Path) -> None:
    """What somebody needs of a target is a capability, not a class."""
    asked = [
        f"{file.name}:{number}: {line.strip()}"
        for file in (root / "src/tunesmith").rglob("*.py")
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if "isinstance(" in line and any(kind in line for kind in KINDS)
    ]
    assert asked == []


KINDS = ("HostTarget", "LocalTarget", "ContainerTarget", "FolderTarget")
