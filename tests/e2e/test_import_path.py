"""A run in a folder full of somebody else's modules and programs: none of them is run."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import traps
from jobs import Job
from tunesmith.core import isolated
from tunesmith.core.files import read_json, sha256_of, write_json
from tunesmith.job.services import manager
from tunesmith.job.services.manager import Service

pytestmark = pytest.mark.e2e

KEYS = {"export_size": 5, "export_device": "cpu", "infer_dtype": "float32"}


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "mark"


@pytest.fixture
def trapped(
    job: Job, tiny_model: Path, data: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> Job:
    """A run folder with traps, in which the user stands, and that PYTHONPATH and PATH mean."""
    job.make(tiny_model, data, max_steps=4, plot_loss=True, env={"NPROC_PER_NODE": "2"})
    traps.lay(job.folder.path, mark)
    files = {
        file.name: {"size": file.stat().st_size, "sha256": sha256_of(file)}
        for file in tiny_model.iterdir()
    }
    request = read_json(job.folder.request_file)
    request |= {"phases": ["train", "merge"], "merge": KEYS}
    write_json(job.folder.request_file, request | {"model": {"name": "tiny", "files": files}})
    monkeypatch.chdir(job.folder.path)
    monkeypatch.setenv("PYTHONPATH", f":{job.folder.path}")
    monkeypatch.setenv("PATH", f":.:{os.environ['PATH']}")
    return job


@pytest.fixture
def base(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "base"
    yield folder
    for name in manager.MODULES:
        manager.stop(Service(folder, name), force=True)


def run(job: Job, module: str, *words: str, stdin: str = "") -> str:
    """Run a module as our verbs do where it has no folder of its own: where the user stands."""
    done = subprocess.run(
        isolated.argv(job.python, module, *words),
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_a_run_takes_no_code_from_its_folder(trapped: Job, mark: Path, base: Path) -> None:
    folder = trapped.folder.path
    trapped.call("start")
    trapped.wait_for_end("succeeded")
    assert traps.sprung(mark) == ""
    log = trapped.folder.log_file.read_text(errors="replace")
    assert "Num processes = 2" in log or "world size: 2" in log, log[-2000:]
    assert (trapped.folder.output / "training_loss.png").is_file()
    assert list((folder / "merged").glob("*.safetensors"))
    # Rank 0 joins no second process group after the training: rank 1 may have ended.
    assert [note["text"] for note in trapped.events("note") if "bundle" in note["text"]] == []
    assert not list(folder.parent.glob(".work/*")), "the workers' folder is put away"

    words = ("--run", str(folder), "--prompt", "Who are you?", "--greedy", "--max-new-tokens", "2")
    run(trapped, "tunesmith.job.evaluation.chat", *words)
    assert traps.sprung(mark) == ""

    for name in ("services", "board"):
        traps.lay(base / name, mark)
    settings = {"runs": str(folder.parent), "models": str(base), "data": str(base)}
    for service, more in (("api", {"run": None, "key": "k"}), ("webui", {"key": "k"})):
        asked = {
            "serves": {"what": "merged"} if service == "api" else {},
            "settings": settings | {"language": "en"},
            **more,
        }
        run(
            trapped,
            "tunesmith.job.services.manager",
            "--base",
            str(base),
            "start",
            service,
            stdin=json.dumps(asked),
        )
    for service in ("api", "webui"):
        said = run(
            trapped, "tunesmith.job.services.manager", "--base", str(base), "wait", service, "300"
        )
        assert json.loads(said)["state"] == "ready", said
    assert traps.sprung(mark) == ""


def test_what_the_board_starts_takes_none(trapped: Job, mark: Path) -> None:
    """LLaMA-Factory's own command, in the environment that our services give the Board."""
    program = trapped.python.with_name("llamafactory-cli")
    done = subprocess.run([program, "version"], env=manager._environment(), check=False)
    assert (done.returncode, traps.sprung(mark)) == (0, "")
