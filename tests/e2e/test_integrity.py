"""Rows, base model and results that change between two commands, as typed."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from tests.e2e.test_inv import Shell
from tests.unit.finished_run import flip
from tunesmith.core.files import read_json, sha256_of
from tunesmith.job.run.folder import RunFolder
from tunesmith.project import Project

pytestmark = pytest.mark.e2e


@pytest.fixture
def shell(project: Project, tmp_path: Path) -> Shell:
    home = tmp_path / "home with a space"
    home.mkdir()
    (home / "envs").symlink_to(project.home / "envs")
    return Shell(project.root, home)


def test_what_changed_between_stop_and_resume_and_before_a_merge_is_refused(
    shell: Shell, tmp_path: Path, tiny_model: Path, data: Path
) -> None:
    base, rows = tmp_path / "base", tmp_path / "rows"
    shutil.copytree(tiny_model, base)
    shutil.copytree(data, rows)
    words = [f"model_name_or_path={base}", "dataset=rows", f"dataset_dir={rows}", "val_size=0"]
    words += ["max_steps=100", "save_steps=10", "eval_strategy=no", "--no-evaluate"]
    started = shell.inv("train", "--no-attach", "--run", "r", *words)
    assert started.returncode == 0, started.stdout + started.stderr
    run = RunFolder(shell.home / "runs" / "r")
    while not list(run.output.glob("checkpoint-*/tunesmith-manifest.json")):
        assert run.status().state in ("queued", "running"), run.log_file.read_text()[-3000:]
        time.sleep(0.2)
    assert shell.inv("stop", "--run", "r").returncode == 0
    assert run.status().state == "stopped"

    for file in (rows / "rows.json", base / "model.safetensors"):
        whole, events = file.read_bytes(), len(run.events_file.read_bytes())
        expected = sha256_of(file)
        flip(file, quietly=True)
        refused = shell.inv("resume", "--run", "r")
        told = refused.stderr
        assert refused.returncode == 1, refused.stdout + told
        assert f"{file}: changed since run r was made: expected sha256 {expected}, found" in told
        assert "`inv train --config configs/train/smollm2_135m_lora_sft.yaml`" in told
        new = run.events_file.read_bytes()[events:].decode()
        assert "phase_started" not in new, "no worker was started"
        status = run.status()
        assert (status.state, status.failure) == ("failed", "changed")
        file.write_bytes(whole)

    # As it was, it goes on.
    request = read_json(run.request_file)
    assert request["inputs"]["train"]["files"].keys() == {str(rows / "rows.json")}
    done = shell.inv("resume", "--run", "r")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    weights = run.output / "adapter_model.safetensors"
    whole, expected = weights.read_bytes(), sha256_of(weights)
    flip(weights, quietly=True)
    told = f"{weights}: changed since it was made: expected sha256 {expected}, found"
    merged = shell.inv("merge", "--run", "r")
    assert merged.returncode == 1 and told in merged.stderr, merged.stdout + merged.stderr
    assert not (run.path / "merged").exists() and not (run.path / "proof.json").exists()
    asked = shell.inv("chat", "--run", "r", "--prompt", "x")
    assert (asked.returncode, asked.stdout) == (2, "") and told in asked.stderr
    weights.write_bytes(whole)
