"""Every guard is needed: with it switched off, the test that names it fails.

Each row of the tables is one edit in a copy of this repository, and one run of one test there, by
an environment of its own whose tunesmith is the copy's, for the processes that a test starts too.

A row in four is run as a matter of course, another one whenever the guarded file changes; with
`TUNESMITH_GUARDS=all make test MARK=guard` every row, those that train included.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from guards.table import Guard, load
from training_side import overlay

pytestmark = pytest.mark.guard

ROOT = Path(__file__).resolve().parents[2]
ALL = bool(os.environ.get("TUNESMITH_GUARDS"))
# A hang counts as a failure of the test, after so many seconds.
_TIMEOUT = 300
_LEFT_OUT = (".git", ".venv", ".tunesmith", "__pycache__", ".*_cache", "*.egg-info")


def chosen(guard: Guard) -> bool:
    """Whether a row is run: all if all were asked for, else a quarter by name and file."""
    if ALL or guard.training:
        return ALL
    text = (ROOT / guard.file).read_bytes()
    return hashlib.sha256(guard.name.encode() + text).digest()[0] % 4 == 0


GUARDS = [guard for guard in load() if chosen(guard)]


class Copy:
    """A copy of the repository in which files are edited and tests are run."""

    def __init__(self, root: Path, python: Path) -> None:
        self.root = root
        self._python = python
        self.variables: dict[str, str] = {}
        # An edit within one second must not look like the old bytecode's source.
        self._times = itertools.count(2_000_000_000)

    def write(self, file: str, text: str) -> None:
        """Give a file another text."""
        path, moment = self.root / file, next(self._times)
        path.write_text(text, encoding="utf-8")
        os.utime(path, (moment, moment))

    def pytest(self, tests: Sequence[str]) -> tuple[int, str]:
        """Run tests in the copy; return pytest's exit code and output."""
        done = subprocess.run(
            [
                *(self._python, "-m", "pytest", "-q", "--tb=short", "--no-header", "-rfEs"),
                *("-p", "no:cacheprovider", f"--timeout={_TIMEOUT}", *tests),
            ],
            cwd=self.root,
            env={
                **{k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
                # What is lacking is a skip there, and no reason to fail.
                "TUNESMITH_REQUIRE_ALL": "",
                **self.variables,
            },
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def copy(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Copy]:
    """A fresh copy, removed afterwards."""
    root = tmp_path_factory.mktemp("guards") / "copy"
    shutil.copytree(ROOT, root, symlinks=True, ignore=shutil.ignore_patterns(*_LEFT_OUT))
    own = Path(sys.executable)
    made = Copy(root, overlay(own, root, root / ".tunesmith" / "control"))
    for program in own.parent.iterdir():
        # inv, ansible-playbook and others that a test finds beside its Python.
        place = root / ".tunesmith" / "control" / "bin" / program.name
        if not place.exists():
            place.symlink_to(program)
    if any(guard.training for guard in GUARDS):
        training = request.getfixturevalue("training_python")
        python = overlay(training, root, root / ".tunesmith" / "training")
        model = request.getfixturevalue("base_model")
        made.variables = {"TUNESMITH_TEST_PYTHON": str(python), "TUNESMITH_TEST_MODEL": str(model)}
    yield made
    shutil.rmtree(root)


def test_with_all_guards_on_the_tests_pass(copy: Copy) -> None:
    code, output = copy.pytest(sorted({guard.test for guard in GUARDS}))
    assert code == 0, output
    assert " skipped" not in output, output


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: f"{guard.table}: {guard.name}")
def test_without_the_guard_its_test_fails(guard: Guard, copy: Copy) -> None:
    text = (copy.root / guard.file).read_text(encoding="utf-8")
    copy.write(guard.file, guard.off(text))
    try:
        code, output = copy.pytest([guard.test])
    finally:
        copy.write(guard.file, text)
    assert code == 1, output
    assert re.search(r"\b\d+ failed\b", output), output
    assert not re.search(r"\b\d+ errors?\b", output), output


def test_every_table_says_what_it_protects() -> None:
    guards = load()
    assert len({guard.name for guard in guards}) == len(guards)
    for guard in guards:
        assert guard.protects, guard.name
        assert (ROOT / guard.test.partition("::")[0]).is_file(), guard.test
        guard.off((ROOT / guard.file).read_text(encoding="utf-8"))
