"""A training is planned once: its config, the known models and its rows are read once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tunesmith.project import Project

pytestmark = pytest.mark.e2e

OPENINGS = Path(__file__).parents[1] / "openings.py"
KEYS = """\
model_name_or_path: HuggingFaceTB/SmolLM2-135M-Instruct
stage: sft
do_train: true
finetuning_type: lora
dataset: rows
dataset_dir: {data}
template: smollm
cutoff_len: 64
max_steps: 1
output_dir: saves/x
"""


@dataclass(frozen=True)
class Workplace:
    """A config, its data, and a home whose environment and models are this clone's."""

    project: Project
    config: Path
    home: Path

    def opened(self, command: str, *words: str) -> dict[str, Any]:
        """Run a command of ours; return what its own process read and started."""
        record = self.home / "opened.json"
        environment = self.project.environment()
        variables = {"TUNESMITH_HOME": str(self.home), "HF_HOME": str(self.project.hf_home)}
        python = Path(sys.executable)
        if command == "image":
            python = environment.python
            variables["TUNESMITH_ENVIRONMENT"] = str(environment.path)
            variables["PYTHONPATH"] = str(self.project.root / "src")
        done = subprocess.run(
            [python, OPENINGS, record, command, *words],
            cwd=self.project.root,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        opened: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        return opened

    def times_read(self, opened: dict[str, Any], *files: Path) -> dict[str, int]:
        """Return how often the files were read that a training is planned from."""
        known = (self.config, self.project.root / "configs/models.yml", *files)
        return {file.name: opened["read"].get(str(file), 0) for file in known}


@pytest.fixture
def workplace(project: Project, base_model: Path, data: Path, tmp_path: Path) -> Workplace:
    assert base_model.is_dir()
    home = tmp_path / "home"
    home.mkdir()
    for shared in ("envs", "models"):
        (home / shared).symlink_to(project.home / shared)
    config = tmp_path / "mine.yaml"
    config.write_text(KEYS.format(data=json.dumps(str(data))))
    return Workplace(project, config, home)


ONCE = {"mine.yaml": 1, "models.yml": 1, "rows.json": 1}


def test_a_plan_that_is_only_shown(workplace: Workplace, data: Path) -> None:
    opened = workplace.opened("inv", "--dry", "train", "--config", str(workplace.config))
    assert workplace.times_read(opened, data / "rows.json") == ONCE


def test_a_training_that_starts(workplace: Workplace, data: Path) -> None:
    words = ("train", "--config", str(workplace.config), "--no-evaluate", "--no-attach")
    opened = workplace.opened("inv", *words)
    assert workplace.times_read(opened, data / "rows.json") == ONCE
    [run] = (workplace.home / "runs").glob("[0-9]*")
    record = json.loads((run / "run.json").read_text())["inputs"]["train"]["files"]
    assert record[str(data / "rows.json")]["size"] == (data / "rows.json").stat().st_size
    status = run / "status.json"
    until = time.monotonic() + 300
    while json.loads(status.read_text())["state"] in ("queued", "running"):
        assert time.monotonic() < until
        time.sleep(0.5)
    assert json.loads(status.read_text())["state"] == "succeeded", (run / "train.log").read_text()


def test_a_training_in_the_image(workplace: Workplace, data: Path) -> None:
    opened = workplace.opened("image", "train", str(workplace.config), "--no-evaluate")
    assert workplace.times_read(opened, data / "rows.json") == ONCE


def test_rows_of_a_table_are_asked_for_once(workplace: Workplace, tmp_path: Path) -> None:
    folder = tmp_path / "tables"
    folder.mkdir()
    rows = "instruction,input,output\n" + "".join(f"say {n},,it is {n}\n" for n in range(20))
    (folder / "rows.csv").write_text(rows)
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.csv"}}))
    workplace.config.write_text(KEYS.format(data=json.dumps(str(folder))))
    opened = workplace.opened("inv", "--dry", "train", "--config", str(workplace.config))
    pythons = [words for words in opened["started"] if Path(words[0]).name == "python"]
    assert [words[words.index("-m") + 1] for words in pythons] == ["tunesmith.job.data.tables"]


def test_rows_that_change_between_plan_and_training_are_not_trained(
    workplace: Workplace, data: Path, tmp_path: Path
) -> None:
    """What was checked is what is trained: the record is of the rows that the plan read."""
    from tunesmith.core.errors import UsageError
    from tunesmith.job.run import inputs
    from tunesmith.plan import build
    from tunesmith.plan.options import TrainOptions
    from tunesmith.targets.local import LocalTarget

    own = tmp_path / "own data"
    own.mkdir()
    for name in ("rows.json", "dataset_info.json"):
        (own / name).write_bytes((data / name).read_bytes())
    workplace.config.write_text(KEYS.format(data=json.dumps(str(own))))
    project = Project(workplace.project.root, workplace.home)
    target = LocalTarget(project)
    plan = build.plan_training(project, target, TrainOptions(config=workplace.config))
    text = (own / "rows.json").read_text()
    (own / "rows.json").write_text(text.replace("river", "rivet"))
    target.create(plan)
    with pytest.raises(UsageError, match=r"rows\.json: changed since run"):
        inputs.check_data(Path(plan.location.run), target.request(plan.run_id), inputs.TRAIN)
