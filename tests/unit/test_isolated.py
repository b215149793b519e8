"""No process of ours takes code from a folder that somebody else can write to."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import traps
from tunesmith.basemodel.endpoint import DownloadSpec, Patience, SourceError, Worker
from tunesmith.core import isolated
from tunesmith.core.files import write_json
from tunesmith.core.mirrors import load_mirror
from tunesmith.job.run.folder import RunFolder
from tunesmith.job.run.schema import RunRequest
from tunesmith.job.supervisor import attempt, launch, preparation, ranks
from tunesmith.job.training import phase as training_phase

pytestmark = pytest.mark.unit


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "mark"


@pytest.fixture
def trap(tmp_path: Path, mark: Path) -> Path:
    """The current folder of the tests that take it, and one of PYTHONPATH."""
    folder = tmp_path / "run-of-somebody"
    traps.lay(folder, mark)
    return folder


def hostile(trap: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f":{trap}", "PATH": f":.:{os.environ['PATH']}"}


def test_the_traps_work(trap: Path, mark: Path) -> None:
    """What the others promise would be nothing if these did not spring."""
    argv = [sys.executable, "-m", "tunesmith.job.supervisor.agent", "--help"]
    subprocess.run(argv, cwd=trap, capture_output=True, check=False)
    assert "tunesmith" in traps.sprung(mark)
    mark.unlink()
    argv = isolated.argv(sys.executable, "tunesmith.job.supervisor.agent", "--help")
    subprocess.run([argv[0], *argv[2:]], env=hostile(trap), capture_output=True, check=False)
    assert "sitecustomize" in traps.sprung(mark)


@pytest.mark.parametrize(
    "words", [("tunesmith.job.merge.offline", "RUN"), ("tunesmith.job.supervisor.agent", "-h")]
)
def test_a_module_is_run_from_our_environment_alone(
    trap: Path, mark: Path, words: tuple[str, str]
) -> None:
    module, word = words
    argv = isolated.argv(sys.executable, module, word.replace("RUN", str(trap)))
    done = subprocess.run(argv, cwd=trap, env=hostile(trap), capture_output=True, text=True)
    assert traps.sprung(mark) == ""
    # It is ours that ran: the one refuses what is no run, the other helps.
    assert done.returncode == (2 if word == "RUN" else 0), done.stderr
    assert "run.json is missing" in done.stderr or "usage:" in done.stdout


def test_a_text_is_run_from_our_environment_alone(trap: Path, mark: Path) -> None:
    argv = isolated.code(sys.executable, "import json, sys, yaml; print(sys.argv[1:])", "a b")
    done = subprocess.run(argv, cwd=trap, env=hostile(trap), capture_output=True, text=True)
    assert (traps.sprung(mark), done.stdout) == ("", "['a b']\n")


def test_the_environment_names_no_code_and_no_programs_of_the_current_folder() -> None:
    found = isolated.variables(
        {
            "PATH": ":/usr/bin:.:bin:/bin:",
            "PYTHONPATH": "src",
            "PYTHONHOME": "/x",
            "PYTHONSTARTUP": "x.py",
            "PYTHONUSERBASE": "x",
            "HOME": "/root",
        }
    )
    assert found == {"PATH": "/usr/bin:/bin", "HOME": "/root", "PYTHONNOUSERSITE": "1"}


def test_what_a_process_starts_without_us_is_clean_too(trap: Path, mark: Path) -> None:
    """LLaMA Board starts llamafactory-cli, torch its compiler's workers: by plain Python."""
    program = trap.parent / "program.py"
    program.write_text("import subprocess, yaml; subprocess.run(['git', '--version'], check=True)")
    bare = isolated.variables(hostile(trap))
    subprocess.run([sys.executable, program], cwd=trap, env=bare, check=True)
    assert traps.sprung(mark) == ""
    subprocess.run([sys.executable, program], cwd=trap, env=hostile(trap), check=False)
    assert {"sitecustomize", "yaml", "git"} <= set(traps.sprung(mark).split())


def test_a_worker_stands_outside_of_the_run(trap: Path, mark: Path, tmp_path: Path) -> None:
    run = RunFolder(trap)
    place = tmp_path / "place"
    place.mkdir()
    made = attempt.Attempt(run, "fetch", hostile(trap), [], place)
    standing = Path(f"/proc/{made._process.pid}/cwd").readlink()
    while made.poll() is None:
        time.sleep(0.05)
    assert standing == place
    assert traps.sprung(mark) == ""
    assert "run.json is missing" in run.log_file.read_text(), "it was our worker"


def test_a_supervisor_stands_outside_of_the_run(
    trap: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    class Seen(subprocess.Popen[bytes]):
        def __init__(self, argv: Any, **named: Any) -> None:
            asked.append(named)
            super().__init__(argv, **named)

    monkeypatch.setattr(subprocess, "Popen", Seen)
    monkeypatch.chdir(trap)
    for name, value in hostile(trap).items():
        monkeypatch.setenv(name, value)
    write_json(trap / "run.json", {"run_id": trap.name, "phases": []})
    launch.start(trap, [])
    assert RunFolder(trap).status().state == "succeeded"
    (named,) = asked
    assert named["cwd"] == isolated.NOWHERE
    assert "PYTHONPATH" not in named["env"]
    assert traps.sprung(mark) == ""


def test_a_run_of_several_processes_keeps_to_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """torchrun would start the ranks by `python -m`; it is given the whole command instead."""
    became: list[str] = []
    monkeypatch.setattr(os, "execv", lambda _, argv: became.extend(argv))
    training_phase._exec_ranks(tmp_path, 2)
    assert became == isolated.argv(
        sys.executable,
        "tunesmith.job.supervisor.ranks",
        *(str(tmp_path), "2"),
        options=isolated.UNBUFFERED,
    )
    argv = ranks.arguments(RunFolder(tmp_path), 2)
    words = (str(tmp_path), "train")
    assert argv[argv.index("--no-python") + 1 :] == isolated.argv(
        sys.executable, "tunesmith.job.supervisor.worker", *words, options=isolated.UNBUFFERED
    )


def test_a_workers_environment_names_no_foreign_code(
    trap: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in hostile(trap).items():
        monkeypatch.setenv(name, value)
    found = preparation.worker_environment(RunRequest())
    assert "PYTHONPATH" not in found
    assert found["PATH"].split(":")[0] == str(Path(sys.executable).parent)
    assert all(Path(one).is_absolute() for one in found["PATH"].split(":"))


def test_a_hubs_worker_takes_nothing_from_where_the_user_stands(
    trap: Path, mark: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trap)
    for name, value in hostile(trap).items():
        monkeypatch.setenv(name, value)
    mirror = load_mirror("default", root / "configs" / "mirrors")
    order = DownloadSpec("a/b", "main", {}, mirror, Path("hf"), None, False, Patience())
    with Worker(order, "http://127.0.0.1:9") as worker:
        assert Path(f"/proc/{worker.pid}/cwd").readlink() == Path(isolated.NOWHERE)
        with pytest.raises(SourceError, match="connection was cut"):
            worker.await_listing(60)
    assert traps.sprung(mark) == ""
