"""The scripts of the roles that can be asked by themselves, run by a real shell."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.unit.test_playbook_filters import plugin

pytestmark = pytest.mark.unit


def sh(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Feed a script to sh as Ansible does."""
    argv = ["/bin/sh", "-s", "--", *arguments]
    return subprocess.run(argv, input=script, capture_output=True, text=True, timeout=300)


def start(root: Path, folder: Path, job: str, *arguments: str) -> str:
    text = (root / "ansible/roles/job/files/start.sh").read_text(encoding="utf-8")
    done = sh(f"{text}\nstart \"$@\" <<'END'\n{job}\nEND\n", str(folder), *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def wait(root: Path, folder: Path, name: str, seconds: int) -> subprocess.CompletedProcess[str]:
    text = (root / "ansible/roles/job/files/wait.sh").read_text(encoding="utf-8")
    return sh(text, str(folder), name, str(seconds))


def test_a_job_gives_what_it_printed_and_its_code(root: Path, tmp_path: Path) -> None:
    name = start(root, tmp_path / "jobs", 'echo "$1, $2"; echo why >&2; exit 3', "a b", "c'd")
    done = wait(root, tmp_path / "jobs", name, 60)
    assert (done.returncode, done.stdout, done.stderr) == (3, "a b, c'd\n", "why\n")
    # One whose connection broke may have asked first.
    again = wait(root, tmp_path / "jobs", name, 60)
    assert (again.returncode, again.stdout) == (3, "a b, c'd\n")
    unknown = wait(root, tmp_path / "jobs", "1.2", 60)
    assert (unknown.returncode, "no such job" in unknown.stderr) == (76, True)


def test_a_job_that_goes_on_is_told_from_one_that_is_gone(root: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    name = start(root, tmp_path, "sleep 600")
    assert time.monotonic() - began < 300, "it runs by itself"
    assert wait(root, tmp_path, name, 1).returncode == 75
    pid = int((tmp_path / f"{name}.pid").read_text())
    os.killpg(pid, signal.SIGKILL)
    done = wait(root, tmp_path, name, 60)
    assert done.returncode == 76
    assert "cut off" in done.stderr


def receive(root: Path, tmp_path: Path, sent: dict[str, str]) -> str:
    text = (root / "ansible/roles/llamafactory/files/receive.sh").read_text(encoding="utf-8")
    packed = plugin(root, "host").as_archive(sent)
    base = tmp_path / "base"
    done = sh(f"{text}\nreceive \"$@\" <<'END'\n{packed}\nEND\n", str(base), str(base / "app/1"))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_data_goes_only_where_no_registry_is(root: Path, tmp_path: Path) -> None:
    data, there = tmp_path / "data", tmp_path / "base/data"
    data.mkdir()
    (data / "dataset_info.json").write_text("{}")
    (data / "demo.json").write_text("[]")
    there.mkdir(parents=True)
    (there / "demo.json").write_text("[1]")
    assert receive(root, tmp_path, {"data": str(data)}) == "data\n"
    assert (there / "dataset_info.json").read_text() == "{}"
    assert (there / "demo.json").read_text() == "[1]", "what is there stays"
    (there / "demo.json").unlink()
    assert receive(root, tmp_path, {"data": str(data)}) == "", "the folder is the user's now"
    assert not (there / "demo.json").exists()
    assert list((tmp_path / "base/cache").iterdir()) == []
