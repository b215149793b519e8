"""The image plans with the laptop's modules: they must import where it plans."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.contract

# Checks a config and its data, and plans, as `docker run IMAGE train` does.
_PLAN = """
import sys
from pathlib import Path
from tunesmith.cli import container, container_training, training
from tunesmith.cli.command import ROOT
from tunesmith.plan import build
from tunesmith.plan.options import TrainOptions
from tunesmith.targets import factory
from tunesmith.project import Project
from tunesmith.report import page, terminal
project = Project.at(ROOT)
target = factory.target_of(project, "local", print)
file = Path("configs/train/smollm2_135m_lora_sft.yaml")
options = TrainOptions(config=file, overrides=("max_steps=3",))
plan = build.plan_training(project, target, options)
control = {"docker", "uv", "jsonschema", "ansible_runner", "ansible"} & set(sys.modules)
print(sys.version_info[:2] == (3, 10), plan.config["max_steps"], sorted(control))
"""


def test_planning_needs_the_lock_and_nothing_more(
    root: Path, training_python: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "TUNESMITH_HOME": str(tmp_path)}
    done = subprocess.run(
        [training_python, "-c", _PLAN], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, "True 3 []"), done.stderr


# Everything the entry point loads, with what the image has.
_ENTRY = """
import sys
from tunesmith.cli import container
code = container.main(sys.argv[1:])
control = {"docker", "uv", "jsonschema", "ansible_runner", "ansible", "docker"} & set(sys.modules)
print(code, sys.version_info[:2] == (3, 10), sorted(control))
"""


@pytest.mark.parametrize(
    ("words", "code", "shown"),
    [
        ([], 0, "  train "),
        (["--list"], 0, "  data.preview "),
        (["train", "--help"], 0, "Example:\n  docker run ... IMAGE train --config "),
        (["runs"], 0, "no runs yet"),
        (["version"], 0, "invoke "),
        (["train", "--confg", "x"], 2, ""),
    ],
    ids=str,
)
def test_the_entry_point_needs_the_lock_and_nothing_more(
    root: Path, training_python: Path, tmp_path: Path, words: list[str], code: int, shown: str
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "TUNESMITH_HOME": str(tmp_path)}
    done = subprocess.run(
        [training_python, "-c", _ENTRY, *words], env=environment, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1:] == [f"{code} True []"], done
    assert shown in done.stdout


def test_compose_is_as_careful_as_the_page_says(root: Path) -> None:
    compose = yaml.safe_load((root / "docker/compose.yaml").read_text(encoding="utf-8"))
    assert set(compose["services"]) == {"webui", "api"}
    for service in compose["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service["cap_drop"] == ["ALL"]
        assert service["read_only"] is True
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert not {"privileged", "ipc", "network_mode"} & set(service)
        assert service["restart"] == "no"
    key = compose["services"]["api"]["environment"]["API_KEY"]
    assert key.startswith("${API_KEY:?"), "an API without a key must not start"
