"""Runs in containers: the same as here, stopped, killed, continued."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cli
from event_rows import event_rows
from image.conftest import UID, Built, Workspace, fill
from tunesmith.core.files import read_json, sha256_of
from tunesmith.job.run import checkpoints
from tunesmith.job.run.folder import RunFolder

pytestmark = pytest.mark.image

FEW = ("max_steps=6", "save_steps=3")


def losses(run: RunFolder) -> dict[int, float]:
    """Return the loss of each step; after a resume the last record counts."""
    logs = [event for event in event_rows(run.events_file) if event["event"] == "log"]
    return {event["step"]: event["loss"] for event in logs if event.get("loss") is not None}


def only(run: list[RunFolder]) -> RunFolder:
    assert len(run) == 1
    return run[0]


def test_a_run_in_the_image_equals_one_here(
    workspace: Callable[[], Workspace], tiny_model: Path, tmp_path: Path, built: Built
) -> None:
    """Train, merge and predict: the losses of each step, the weights and the answers."""
    inside = workspace()
    for words in (
        ("train", "tiny.yaml", *FEW),
        ("merge",),
        ("predict", "predict.yaml", "--run", "RUN"),
    ):
        named = [only(inside.runs()).run_id if word == "RUN" else word for word in words]
        done = inside.run(*named)
        assert done.returncode == 0, done.stdout + done.stderr
        if words[0] == "train":
            assert "no GPU is seen here, so the CPU does it" in done.stdout
    run = only(inside.runs())
    assert {path.stat().st_uid for path in run.path.rglob("*")} == {UID}

    here = tmp_path / "here"
    fill(here, tiny_model, owner=0)
    home = {"TUNESMITH_HOME": str(tmp_path / "home")}
    environment = built.project.environment().path
    (tmp_path / "home/envs").mkdir(parents=True)
    (tmp_path / "home/envs" / environment.name).symlink_to(environment)
    common = (f"model_name_or_path={here}/model", f"dataset_dir={here}/data")
    for words in (
        ("train", "--config", str(here / "tiny.yaml"), *FEW, *common),
        ("merge",),
        ("predict", "--config", str(here / "predict.yaml"), "--run", "RUN", *common[1:]),
    ):
        ours = sorted((tmp_path / "home/runs").glob("[!.]*"))
        done = built.inv(*(ours[0].name if word == "RUN" else word for word in words), **home)
        assert done.returncode == 0, done.stdout + done.stderr
    other = RunFolder(only(sorted((tmp_path / "home/runs").glob("[!.]*"))))

    assert losses(run) == losses(other)
    assert len(losses(run)) == 6
    merged = {p.name: sha256_of(p) for p in (run.path / "merged").glob("*.safetensors")}
    assert merged
    assert merged == {p.name: sha256_of(p) for p in (other.path / "merged").glob("*.safetensors")}
    answers = [next(r.path.rglob("generated_predictions.jsonl")).read_text() for r in (run, other)]
    assert answers[0] == answers[1]
    assert len(answers[0].splitlines()) == 4


def test_docker_stop_means_checkpoint_and_the_next_run_continues(
    workspace: Callable[[], Workspace],
) -> None:
    place = workspace()
    container = place.start("train", "tiny.yaml", "max_steps=60")
    run = place.wait_for_step(12)
    container.stop(timeout=120)  # then it is killed, which its exit code would say
    container.reload()
    assert container.attrs["State"]["ExitCode"] == 0
    status = run.status()
    assert status.state == "stopped"
    assert "docker run ... IMAGE resume --run" in container.logs().decode()
    stopped_at = checkpoints.newest_valid(run.output)[0]
    assert stopped_at is not None
    assert stopped_at.step >= 12

    done = place.run("train", "tiny.yaml", "max_steps=60")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"run {run.run_id} of this config was not finished" in done.stdout
    assert only(place.runs()).status().state == "succeeded"
    resumed = [e for e in event_rows(run.events_file) if e["event"] == "resumed"]
    assert resumed[0]["step"] == stopped_at.step
    assert sorted(losses(run)) == list(range(1, 61))


def test_a_killed_container_that_is_started_again_continues(
    workspace: Callable[[], Workspace],
) -> None:
    """What an engine does to its containers when it is restarted: SIGKILL, later `start`."""
    place = workspace()
    container = place.start("train", "tiny.yaml", "max_steps=60")
    run = place.wait_for_step(17)
    container.kill()
    container.wait()
    status = run.status()
    assert (status.state, status.failure) == ("failed", "killed")
    at_most_lost = read_json(run.heartbeat_file)["step"]

    container.start()
    assert container.wait()["StatusCode"] == 0, container.logs().decode()[-3000:]
    assert only(place.runs()).status().state == "succeeded"
    resumed = [e for e in event_rows(run.events_file) if e["event"] == "resumed"]
    # save_steps is 5.
    assert at_most_lost - resumed[0]["step"] <= 5
    assert sorted(losses(run)) == list(range(1, 61))


def test_on_container(built: Built, tiny_model: Path, tmp_path: Path) -> None:
    """`inv train --on container`: started, stopped and followed through the SDK."""
    folder, home = tmp_path / "mine", {"TUNESMITH_HOME": str(tmp_path / "home")}
    fill(folder, tiny_model, owner=0)
    words = (f"model_name_or_path={folder}/model", f"dataset_dir={folder}/data", "max_steps=60")
    config = str(folder / "tiny.yaml")
    on = ("--on", "container")
    done = built.inv("train", *on, "--config", config, "--no-attach", *words, **home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the Docker engine has no NVIDIA runtime: training on the CPU" in done.stdout
    run = RunFolder(only(sorted((tmp_path / "home/runs").glob("[!.]*"))))
    labels = {"label": f"tunesmith.run={run.run_id}"}
    container = built.client.containers.list(filters=labels)[0]
    check_hardened(container.attrs)

    deadline = time.monotonic() + 900
    while not run.heartbeat_file.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    stopped = built.inv("stop", *on, **home)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert run.status().state == "stopped"
    resumed = built.inv("resume", *on, **home)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert run.status().state == "succeeded"
    assert sorted(losses(run)) == list(range(1, 61))
    listed = json.loads(built.inv("runs", *on, "--json", **home).stdout)
    assert [entry["run_id"] for entry in listed] == [run.run_id]
    # The last container is swept by the next start; nothing else is left.
    for left in built.client.containers.list(all=True, filters=labels):
        left.remove(force=True)


def check_hardened(attrs: dict[str, Any]) -> None:
    """The rules of a container, as `docker inspect` shows them."""
    host, config = attrs["HostConfig"], attrs["Config"]
    assert host["ReadonlyRootfs"] is True
    assert host["CapDrop"] == ["ALL"]
    assert not host["CapAdd"]
    assert host["SecurityOpt"] == ["no-new-privileges"]
    assert host["Privileged"] is False
    assert host["IpcMode"] != "host"
    assert host["PidMode"] != "host"
    assert not host["PortBindings"]
    assert host["ShmSize"] >= 1 << 30
    assert config["User"].partition(":")[0].isdigit()


def test_a_wrong_word_of_on_container(built: Built, tmp_path: Path) -> None:
    """No engine, or no image: one line, nothing written."""
    home = {"TUNESMITH_HOME": str(tmp_path / "home")}
    nobody = {"DOCKER_HOST": f"unix://{tmp_path}/nobody.sock"}
    done = built.inv("train", "--on", "container", **home, **nobody)
    assert "no Docker engine answers at unix://" in cli.refusal(done)
    done = built.inv("train", "--on", "container", **home, TUNESMITH_IMAGE="tunesmith:no-such")
    said = cli.refusal(done)
    assert "there is no image tunesmith:no-such" in said
    assert "`inv image.build`" in said
    assert not (tmp_path / "home/runs").exists()


def test_an_engine_without_permission(built: Built) -> None:
    """As a user who is not in the group: the line names the command."""
    # Loaded before the rights are given up: that user may not read this Python.
    code = (
        "import os\nfrom tunesmith.image import engine\n"
        "from tunesmith.core.errors import UsageError\n"
        "engine.connect()\nos.setgroups([]); os.setgid(4321); os.setuid(4321)\n"
        "try:\n    engine.connect()\nexcept UsageError as error:\n    print(error.line)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "no access to the Docker engine" in done.stdout, done.stderr
    assert "`sudo usermod -aG docker $USER`" in done.stdout, done.stderr
