"""Extras are added to the real environment by the real uv, and trainings use them.

To an environment of its own beside it, which has its packages and none of its files.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from jobs import Job
from support import THOROUGH
from tests.training_side import overlay
from tunesmith.core.names import ENVIRONMENT_MARKER
from tunesmith.project import Project
from tunesmith.stack import environment as environments
from tunesmith.stack.environment import Environment

pytestmark = pytest.mark.e2e

PROGRAM = Path(__file__).parents[1] / "training" / "programs" / "optimizers.py"
GALORE: dict[str, object] = {"use_galore": True, "galore_target": "all", "galore_rank": 8}
# By extra, what makes a config need it.
RARE: dict[str, dict[str, object]] = {
    "apollo": {"use_apollo": True, "apollo_target": "all", "apollo_rank": 8},
    "badam": {"use_badam": True, "badam_mode": "layer", "badam_switch_interval": 2},
    "adam-mini": {"use_adam_mini": True},
    "lomo": {"optim": "lomo"},
    "grokadamw": {"optim": "grokadamw"},
    "schedulefree": {"optim": "schedule_free_adamw"},
}


@pytest.fixture(scope="module")
def extended(
    project: Project, root: Path, training_python: Path, tmp_path_factory: pytest.TempPathFactory
) -> Environment:
    """An environment with extras: all of them where the machine has the time."""
    folder = tmp_path_factory.mktemp("extended") / "environment"
    overlay(training_python, root, folder)
    there = project.environment()
    # It has what is asked for and nothing else, whatever the clone's own has.
    made = json.loads((there.path / ENVIRONMENT_MARKER).read_text(encoding="utf-8")) | {
        "extras": {}
    }
    (folder / ENVIRONMENT_MARKER).write_text(json.dumps(made))
    environment = Environment(folder, there.flavour)
    names = list(project.stack.extras) if THOROUGH else ["galore", "tensorboard"]
    extras = [project.stack.find_extra(name) for name in names]
    mirror = project.mirror("default")
    assert environments.install(project.stack, environment, root, mirror, print, extras)
    assert list(environment.extras) == names
    return environment


def test_an_optimizer_and_a_tracker_work_in_a_run(
    extended: Environment, tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    trackers = ["tensorboard", *(["wandb"] if THOROUGH else [])]
    job = Job(extended.python, tmp_path / "runs" / "tracked")
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    own = {"finetuning_type": "full", "max_steps": 2, "report_to": trackers, **GALORE}
    job.make(tiny_model, data, env=offline, **own)
    job.call("start")
    job.wait_for_end("succeeded")
    assert "Using GaLore optimizer" in job.folder.log_file.read_text(encoding="utf-8")
    assert list(job.losses()) == [1, 2]
    curves = list(job.folder.output.glob("runs/*/events.out.tfevents.*"))
    assert [file.stat().st_size > 0 for file in curves] == [True]
    # W&B's records were in the worker's current folder.
    kept = job.folder.path.glob("left-*/wandb/offline-run-*/run-*.wandb")
    assert [file.stat().st_size > 0 for file in kept] == [True] * ("wandb" in trackers)


# DeepSpeed is built from its sources, which takes half a minute.
if THOROUGH:

    def test_rare_optimizers_train(
        extended: Environment, tiny_model: Path, data: Path, tmp_path: Path
    ) -> None:
        argv = [extended.python, "-I", PROGRAM, tiny_model, data, tmp_path, json.dumps(RARE)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-4000:]
        assert json.loads(done.stdout.splitlines()[-1]) == dict.fromkeys(RARE, True)

    def test_deepspeed_is_taken_by_their_parser(
        extended: Environment, tiny_model: Path, data: Path, tmp_path: Path
    ) -> None:
        zero = tmp_path / "zero.json"
        zero.write_text('{"zero_optimization": {"stage": 2}, "train_batch_size": "auto"}')
        code = (
            "import deepspeed, json, sys; from llamafactory.hparams import get_train_args; "
            "print(deepspeed.__version__, get_train_args(json.loads(sys.argv[1]))[2].deepspeed)"
        )
        config = {
            "model_name_or_path": str(tiny_model),
            "stage": "sft",
            "do_train": True,
            "dataset": "rows",
            "dataset_dir": str(data),
            "template": "smollm",
            "output_dir": str(tmp_path / "out"),
            "deepspeed": str(zero),
        }
        argv = ["torchrun", "--nproc-per-node=1"]
        program = tmp_path / "parse.py"
        program.write_text(code)
        python = [str(extended.python), "-m", "torch.distributed.run", *argv[1:], str(program)]
        done = subprocess.run(
            [*python, json.dumps(config)], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"0.16.9 {zero}" in done.stdout
