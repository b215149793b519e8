"""The user's commands, as typed, in a home of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

import cli
from tests.unit.finished_run import flip
from tunesmith.project import Project

pytestmark = pytest.mark.e2e

# The keys of LLaMA-Factory's own LoRA SFT example for Llama 3 (examples/train_lora), with
# what makes it hard on another machine: half precision, sixteen workers, hub code allowed,
# an output folder to overwrite, no dataset_dir.
EXAMPLE = """\
### model
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: true

### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all

### dataset
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
dataloader_num_workers: 4

### output
output_dir: saves/llama3-8b/lora/sft
logging_steps: 1
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
"""


class Shell:
    """Runs `inv` in the repository with its own .tunesmith; environment and model shared."""

    def __init__(self, root: Path, home: Path) -> None:
        self.root = root
        self.home = home

    def inv(self, *words: str) -> subprocess.CompletedProcess[str]:
        return cli.run(self.root, *words, env={**os.environ, "TUNESMITH_HOME": str(self.home)})

    def runs(self) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = json.loads(self.inv("runs", "--json").stdout)
        return listed

    def read(self, name: str) -> dict[str, Any]:
        """Read a JSON file of the newest run."""
        file = self.home / "runs" / self.runs()[-1]["run_id"] / name
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return content


@pytest.fixture(scope="module")
def shell(project: Project, base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    assert base_model.is_dir()
    home = tmp_path_factory.mktemp("home with a space")
    for shared in ("envs", "models"):
        (home / shared).symlink_to(project.home / shared)
    return Shell(project.root, home)


def test_the_main_job(shell: Shell) -> None:
    """The demo: held-out loss -30 %, persona 8 of 10 and never before, merged and proven."""
    done = shell.inv("demo")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "verified before, unchanged" in done.stdout, "nothing is fetched twice"
    assert "data set: philosophy_conch from data/philosophy_data.json (120 rows" in done.stdout
    measured = shell.read("evaluation.json")
    before, after = measured["before"], measured["after"]
    assert after["loss"] <= 0.7 * before["loss"], (before["loss"], after["loss"])
    assert before["expected"] == {"met": 0, "of": 10}
    assert after["expected"]["of"] == 10
    assert after["expected"]["met"] >= 8
    assert shell.read("proof.json")["passed"] is True
    assert re.search(r"Held-out loss 3\.\d+ → 0\.\d+", done.stdout), "told as it was measured"
    run = shell.runs()[-1]
    folder = Path(run["path"])
    assert run["state"] == "succeeded"
    assert set(run["phases"].values()) == {"succeeded"}
    for name in ("report.html", "training_loss.png", "merged/model.safetensors", "train.log"):
        assert (folder / name).stat().st_size > 1000, name
    assert re.search(r"step \d+/\d+  loss \d", done.stdout), "progress is told in a pipe too"

    answer = shell.inv("chat", "--what", "merged", "--greedy", "--prompt", "你是谁？")
    assert answer.returncode == 0, answer.stderr
    assert "philosophy" in answer.stdout.lower()
    assert len(answer.stdout.strip().splitlines()) == 1, "stdout has the answer and nothing else"

    words = ["max_samples=2", "max_new_tokens=8", "per_device_eval_batch_size=2"]
    scored = shell.inv("predict", "--run", run["run_id"], *words)
    assert scored.returncode == 0, scored.stdout[-3000:] + scored.stderr[-3000:]
    assert "predict_rouge-1" in scored.stdout
    answers = (folder / "predict" / "philosophy_conch" / "generated_predictions.jsonl").read_text(
        encoding="utf-8"
    )
    assert len(answers.splitlines()) == 2
    assert shell.runs()[-1]["phases"]["train"] == "succeeded", "the training stays as it was"

    table = shell.inv("runs").stdout
    assert re.search(
        rf"{run['run_id']} +local +succeeded +81/81 +0\.\d+ +before, train, after, merge", table
    )
    untrained = shell.inv("chat", "--what", "neither", "--prompt", "x")
    assert (untrained.returncode, untrained.stdout) == (2, "")

    log = shell.inv("logs", "--run", run["run_id"])
    assert log.stdout == (folder / "train.log").read_text(encoding="utf-8", errors="replace")

    again = shell.inv("resume")
    assert again.returncode == 2
    assert "nothing to continue" in again.stderr

    merged = folder / "merged" / "model.safetensors"
    flip(merged, quietly=True)
    for words in (["export", "--format", "gguf"], ["chat", "--what", "merged", "--prompt", "x"]):
        refused = shell.inv(*words, "--run", run["run_id"])
        assert (refused.returncode, refused.stdout) == (2, ""), refused.stderr
        assert f"{merged}: changed since it was made: expected sha256 " in refused.stderr
        assert f"`inv merge --run {run['run_id']}` makes it anew" in refused.stderr
    assert not (folder / "export").exists()


def test_an_example_of_llamafactory_trains_with_overrides(shell: Shell, tmp_path: Path) -> None:
    file = tmp_path / "llama3 lora sft.yaml"
    file.write_text(EXAMPLE)
    done = shell.inv(
        "train",
        "--config",
        str(file),
        "model_name_or_path=HuggingFaceTB/SmolLM2-135M-Instruct",
        "dataset=philosophy_conch",
        "max_steps=2",
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "template: smollm (that of HuggingFaceTB/SmolLM2-135M-Instruct)" in done.stdout
    assert "trust_remote_code: True -> False" in done.stdout
    assert "preprocessing_num_workers: 16 -> " in done.stdout
    run = shell.runs()[-1]
    assert (run["state"], run["step"]) == ("succeeded", 2)
    assert list(run["phases"]) == ["train"], "nothing is held out, so nothing is measured"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train", "dataset=nix"], "data set nix is not registered"),
        (["train", "learning_rate=fast"], "`learning_rate` (given on the command line) is 'fast'"),
        (["train", "template=qwen25"], "`template` (given on the command line) is 'qwen25'"),
        (["train", "model_name_or_path=./nowhere"], "nowhere"),
        (["train", "--prompts", "nowhere.yaml"], "nowhere.yaml"),
        (["merge", "--run", "nowhere"], "no run"),
        (["data.register", "--file", "nowhere.json", "--key", "x"], "nowhere.json"),
    ],
)
def test_misuse_is_one_line_exit_2_and_makes_no_run(
    shell: Shell, words: list[str], told: str
) -> None:
    runs = shell.runs()
    registry = (shell.root / "data/dataset_info.json").read_bytes()
    done = shell.inv(*words)
    assert done.returncode == 2, done.stdout + done.stderr
    assert told in done.stderr.splitlines()[0]
    assert "Traceback" not in done.stderr
    assert shell.runs() == runs
    assert (shell.root / "data/dataset_info.json").read_bytes() == registry
