"""Hosts in folders, for the tests that run the playbooks."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import lacking
from tests.playbook import rented
from tunesmith.stack.environment import find_python


@pytest.fixture(scope="session")
def index_url(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder of wheels and the index that serves it."""
    folder = tmp_path_factory.mktemp("wheels")
    lock = (root / "configs/locks/control.txt").read_text(encoding="utf-8")
    uv = next(line.split()[0] for line in lock.splitlines() if line.startswith("uv=="))
    argv = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, uv]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lacking(f"uv cannot be fetched ({done.stderr.strip()[-200:]})", "let PyPI be reached")
    with rented.index(folder) as url:
        yield folder, url


@pytest.fixture(scope="module")
def rent(
    root: Path, index_url: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], rented.Rented]]:
    """Makes a fresh host."""
    python = find_python("3.10")
    if python is None:
        lacking("no Python 3.10 with its usual modules", "name one in TUNESMITH_PYTHON")
    if shutil.which("flock") is None:
        lacking("no flock", "`apt-get install util-linux`")
    made = []

    def make(name: str) -> rented.Rented:
        folder = tmp_path_factory.mktemp(name)
        made.append(folder)
        return rented.rent(root, folder, python, *index_url)

    yield make
    for folder in made:
        shutil.rmtree(folder)
