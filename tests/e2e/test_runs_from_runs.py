"""A run that starts from another run's result: `run:RUN_ID` where a model or an adapter may stand.

The whole path with a tiny model: SFT, a second SFT that trains the same adapter on, a third with a
new adapter on top, DPO with the merged model as its reference.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import cli
from support import THOROUGH
from tests.unit.finished_run import flip
from tunesmith.basemodel import kinds
from tunesmith.job.run import inputs
from tunesmith.job.run.folder import RunFolder
from tunesmith.job.run.schema import Origin
from tunesmith.project import Project

pytestmark = pytest.mark.e2e

PAIRS = {
    "file_name": "pairs.json",
    "ranking": True,
    "columns": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
}


@dataclass(frozen=True)
class Shell:
    """Runs `inv train` of one config in a folder and a home of its own."""

    root: Path
    home: Path
    config: Path

    def inv(self, *words: str) -> subprocess.CompletedProcess[str]:
        return cli.run(self.root, *words, env={**os.environ, "TUNESMITH_HOME": str(self.home)})

    def train(self, run_id: str, *words: str, then: str = "") -> RunFolder:
        after = ["--then", then] if then else []
        done = self.inv(
            *("train", "--config", str(self.config), "--run", run_id, "--no-evaluate"),
            *after,
            *words,
        )
        log = self.home / "runs" / run_id / "train.log"
        text = log.read_text()[-2000:] if log.is_file() else ""
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:] + text
        return RunFolder(self.home / "runs" / run_id)


@pytest.fixture(scope="module")
def shell(
    project: Project, tiny_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Shell:
    top = tmp_path_factory.mktemp("runs from runs")
    home = top / "home"
    home.mkdir()
    (home / "envs").symlink_to(project.home / "envs")
    rows = top / "data"
    shutil.copytree(data, rows)
    pairs = [
        {"prompt": f"Say {n}", "chosen": f"quiet {n}", "rejected": f"paper {n}"} for n in range(8)
    ]
    (rows / "pairs.json").write_text(json.dumps(pairs))
    registry = json.loads((rows / "dataset_info.json").read_text())
    (rows / "dataset_info.json").write_text(json.dumps({**registry, "pairs": PAIRS}))
    config = top / "sft.yaml"
    values: dict[str, Any] = {
        "model_name_or_path": str(tiny_model),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 4,
        "lora_target": "all",
        "dataset": "rows",
        "dataset_dir": str(rows),
        "template": "smollm",
        "cutoff_len": 64,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1.0e-2,
        "output_dir": "saves/x",
    }
    config.write_text(yaml.safe_dump(values))
    return Shell(project.root, home, config)


@pytest.fixture(scope="module")
def first(shell: Shell) -> RunFolder:
    """An SFT run, merged."""
    return shell.train("sft", then="merge")


def origin(run: RunFolder) -> Origin:
    [found] = run.request().origins
    return found


def test_an_adapter_is_trained_on(shell: Shell, first: RunFolder) -> None:
    # A chain of adapters is merged and proven below: this merge is as that of any run.
    run = shell.train("on", "adapter_name_or_path=run:sft", then="merge" if THOROUGH else "")
    assert run.config()["adapter_name_or_path"] == str(first.output)
    found = origin(run)
    assert (found.run, found.result, found.written) == ("sft", "output", "run:sft")
    files = {Path(n).name: r for n, r in run.request().inputs[inputs.TRAIN].files.items()}
    chosen = set(kinds.choose("adapter", files)) - {"rows.json"}
    assert found.sha256 == kinds.digest({name: files[name] for name in chosen})
    started, ended = (r.output / "adapter_model.safetensors" for r in (first, run))
    assert started.read_bytes() != ended.read_bytes()
    if THOROUGH:
        proof = json.loads((run.path / "proof.json").read_text())
        assert proof["passed"] and proof["adapters"] == [str(run.output)]
    log = (run.path / "train.log").read_text()
    assert f"Loaded adapter(s): {first.output}" in log
    listed = shell.inv("runs").stdout
    assert "run:sft" in listed


def test_a_new_adapter_on_top_is_merged_with_the_one_below(shell: Shell, first: RunFolder) -> None:
    words = ("adapter_name_or_path=run:sft", "create_new_adapter=true")
    run = shell.train("top", *words, then="merge")
    proof = json.loads((run.path / "proof.json").read_text())
    assert proof["passed"] and proof["adapters"] == [str(first.output), str(run.output)]
    assert "Merged 1 adapter(s)" in (run.path / "train.log").read_text()
    # Two adapters count together only: as one of them it is refused, as a model it is taken.
    refused = shell.inv("train", "--config", str(shell.config), "adapter_name_or_path=run:top")
    assert refused.returncode == 2
    assert "its result is 2 adapters" in refused.stderr
    assert "`model_name_or_path: run:top`" in refused.stderr
    words = ("--dry", "train", "--config", str(shell.config), "model_name_or_path=run:top")
    taken = shell.inv(*words)
    assert taken.returncode == 0, taken.stderr
    assert f"model_name_or_path: {run.path / 'merged'}" in taken.stdout


def test_dpo_on_a_merged_run_with_it_as_the_reference(shell: Shell, first: RunFolder) -> None:
    dpo = ("stage=dpo", "dataset=pairs", "max_steps=2")
    run = shell.train("dpo", *dpo, "model_name_or_path=run:sft", "ref_model=run:sft")
    merged = str(first.path / "merged")
    assert run.config()["model_name_or_path"] == run.config()["ref_model"] == merged
    assert {(o.key, o.result) for o in run.request().origins} == {
        ("model_name_or_path", "merged"),
        ("ref_model", "merged"),
    }
    assert f"Created reference model from {merged}" in (run.path / "train.log").read_text()
    files = run.request().inputs[inputs.TRAIN].files
    assert f"{merged}/model.safetensors" in files


def test_a_result_that_changed_is_not_trained_from(shell: Shell, first: RunFolder) -> None:
    files = (first.output / "adapter_model.safetensors", first.path / "merged/model.safetensors")
    words = ("train", "--config", str(shell.config), "--no-evaluate")
    for file in files:
        flip(file)
    try:
        adapter = shell.inv(*words, "--run", "late", "adapter_name_or_path=run:sft")
        model = shell.inv(*words, "--run", "never", "model_name_or_path=run:sft")
    finally:
        for file in files:
            flip(file)
    assert adapter.returncode == 1, adapter.stdout
    assert f"{files[0]}: changed since run late was made" in adapter.stdout + adapter.stderr
    assert "step 1/" not in adapter.stdout
    assert model.returncode == 2, model.stdout
    assert f"{files[1]}: changed since it was sealed" in model.stderr
    assert not (shell.home / "runs" / "never").exists()
