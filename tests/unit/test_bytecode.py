"""What is compiled at an installation, what is left to the first import, and what goes wrong."""

from __future__ import annotations

import csv
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from tunesmith.core.errors import TunesmithError
from tunesmith.project import Project
from tunesmith.stack import bytecode
from tunesmith.stack.environment import Environment, make_bytecode

pytestmark = pytest.mark.unit


@pytest.fixture
def site(tmp_path: Path) -> Path:
    names = ("one.py", "a/__init__.py", "a/tests/test_x.py", "a/models/b/big_b.py", "a/data.txt")
    for name in (*names, "a/models/b/__init__.py", "a/models/c/big_c.py", "tests/x.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"x = {name!r}\n", encoding="utf-8")
    (tmp_path / "a" / "template.py").write_text("x = 1 is 1\ndef {{ name }}\n", encoding="utf-8")
    return tmp_path


def compiled(site: Path) -> set[str]:
    """Return the modules that have bytecode for this Python."""
    modules = (path.relative_to(site) for path in site.rglob("*.py"))
    return {str(m) for m in modules if bytecode_of(site / m).exists()}


def bytecode_of(module: Path) -> Path:
    return Path(importlib.util.cache_from_source(module))


def run(site: Path, *patterns: str) -> subprocess.CompletedProcess[str]:
    """Run it as an installation does."""
    argv = [sys.executable, "-I", "-S", bytecode.__file__, str(site), "2", *patterns]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def test_patterns_leave_out_and_take_back(site: Path) -> None:
    done = run(site, "tests/*", "a/models/*/big_*", "!a/models/c/*")
    assert (done.returncode, done.stderr) == (0, "")
    kept = {"one.py", "a/__init__.py", "a/models/b/__init__.py", "a/models/c/big_c.py"}
    assert compiled(site) == kept, "and the template, which is no Python, ended nothing"


def test_the_second_time_makes_what_is_new_or_another(site: Path) -> None:
    assert run(site).returncode == 0
    made = bytecode_of(site / "one.py").stat().st_mtime_ns
    there = bytecode_of(site / "a/__init__.py").read_bytes()
    (site / "a/__init__.py").write_text("x = 'another'\n", encoding="utf-8")
    (site / "new.py").write_text("", encoding="utf-8")
    assert run(site).returncode == 0
    assert "new.py" in compiled(site)
    assert bytecode_of(site / "a/__init__.py").read_bytes() != there
    assert bytecode_of(site / "one.py").stat().st_mtime_ns == made


def test_bytecode_that_cannot_be_written_is_an_error(site: Path) -> None:
    (site / "a" / "__pycache__").write_text("in the way", encoding="utf-8")
    done = run(site)
    assert done.returncode == 1
    assert re.search(r"Error: .*a/__pycache__/", done.stderr.splitlines()[-1])


def files_of(packages: Path, names: set[str]) -> set[str]:
    """Return the files that the packages of these names installed."""
    infos = [info for info in packages.glob("*.dist-info") if name_of(info) in names]
    records = [(info / "RECORD").read_text(encoding="utf-8") for info in infos]
    return {row[0] for record in records for row in csv.reader(record.splitlines())}


def name_of(info: Path) -> str:
    return canonicalize_name(info.name.partition("-")[0])


def test_half_of_the_environment_is_left_out(project: Project, training_python: Path) -> None:
    """The patterns of stack.yml fit what is installed: each leaves out or takes back something."""
    packages = project.environment().packages
    found = [str(path.relative_to(packages)) for path in bytecode.wanted(packages, [])]
    beside = files_of(packages, {p for e in project.stack.extras.values() for p in e.packages})
    modules = [module for module in found if module not in beside]
    rules = [bytecode.rule(pattern) for pattern in project.stack.uncompiled]
    for number, pattern in enumerate(project.stack.uncompiled):
        earlier, here = rules[:number], rules[: number + 1]
        hit = [m for m in modules if rules[number][1].match(m)]
        changed = (bytecode.is_wanted(m, earlier) != bytecode.is_wanted(m, here) for m in hit)
        assert any(changed), pattern
    kept = sum(1 for module in modules if bytecode.is_wanted(module, rules))
    assert 0.4 < kept / len(modules) < 0.6


def test_an_environment_without_its_bytecode_is_no_environment(
    project: Project, tmp_path: Path
) -> None:
    made = Environment(tmp_path / "env", project.stack.flavour())
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", made.path], check=True)
    (made.packages / "a.py").write_text("", encoding="utf-8")
    make_bytecode(made, project.stack)
    assert compiled(made.packages) == {"a.py"}
    (made.packages / "b" / "__pycache__").parent.mkdir()
    (made.packages / "b" / "__pycache__").touch()
    (made.packages / "b" / "c.py").touch()
    with pytest.raises(TunesmithError, match="its bytecode could not be compiled"):
        make_bytecode(made, project.stack)
