"""A run on a disk that takes nothing: it goes on, or ends as it was asked to.

The supervisor is the real one, as a process of its own, and so is the worker but for its phase,
which takes steps without a model. Disks are full to the last byte, read-only, or fail.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agents import Agent
from disks import Disk, Steps
from tunesmith.core.files import read_json

pytestmark = pytest.mark.contract

WAYS = ("full", "read_only", "eio")
ENDLESS = 100_000
# Longer than the supervisor takes from one status to the next.
A_WHILE = 1.5


@pytest.fixture(params=WAYS)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    with Disk(tmp_path / "runs", request.param) as made:
        yield made


def marked(tmp_path: Path, **limits: Any) -> tuple[dict[str, Any], Path]:
    """Return what a request says of limits and a command for after the success, and its mark."""
    mark = tmp_path / "switched off"
    after = {"command": ["touch", str(mark)], "when": "succeeded", "seconds": 0.1}
    return {"after": after, "limits": {"last_words_seconds": 1, **limits}}, mark


def test_a_run_goes_on_where_nothing_can_be_told(disk: Disk, tmp_path: Path) -> None:
    order, mark = marked(tmp_path)
    run = Steps(disk, "one", steps=70, **order).start()
    disk.refuse()
    time.sleep(0.5)  # what the last block of a file had room for
    told, status = run.steps(), run.folder.status_file.read_bytes()
    time.sleep(A_WHILE)
    assert run.folder.status_file.read_bytes() == status, "the disk refuses"
    assert run.steps() == told
    disk.take()
    assert run.end() == 0, run.said()
    assert run.steps() == list(range(1, 71)), "each step once, in order"
    assert len(run.events("phase_started")) == 1, "the worker lived through it"
    names = [event["event"] for event in run.events("phase_ended") + run.events("run_ended")]
    assert names == ["phase_ended", "run_ended"]
    assert "took nothing for" in run.events("note")[0]["text"]
    assert run.folder.status().state == "succeeded"
    assert run.events("after_command_ended")[0]["code"] == 0
    assert mark.exists()
    assert not run.folder.reserve_file.exists()


def test_a_success_is_followed_by_its_command(disk: Disk, tmp_path: Path) -> None:
    order, mark = marked(tmp_path)
    run = Steps(disk, "one", steps=25, **order).start()
    disk.refuse()
    assert run.end() == 0, run.said()
    assert mark.exists()
    if disk.way == "full":
        # The reserve was given up for it.
        assert read_json(run.folder.status_file)["state"] == "succeeded"
        assert run.events("run_ended")[0]["state"] == "succeeded"
        assert run.steps() == list(range(1, 26))
    else:
        assert "succeeded, not recorded there" in run.said()


@pytest.mark.parametrize("disk", ["full", "eio"], indirect=True)
def test_a_limit_ends_a_run(disk: Disk, tmp_path: Path) -> None:
    order, mark = marked(tmp_path, max_seconds=2)
    run = Steps(disk, "one", steps=ENDLESS, **order).start()
    disk.refuse()
    assert run.end() == 0, run.said()
    assert not mark.exists(), "it is no success"
    if disk.way == "full":
        status = run.folder.status()
        assert status.state == "stopped"
        assert "max-hours reached" in status.message
        assert run.events("limit")


@pytest.mark.parametrize("disk", ["full", "eio"], indirect=True)
def test_a_run_is_stopped(disk: Disk, tmp_path: Path) -> None:
    order, _ = marked(tmp_path)
    run = Steps(disk, "one", steps=ENDLESS, **order).start()
    disk.refuse()
    agent = Agent(Path(sys.executable), tmp_path, tmp_path)
    agent.runs = disk.folder
    assert agent.ask("watch", "one", "--once")["status"]["state"] == "running"
    assert [run["state"] for run in agent.ask("runs")["runs"]] == ["running"]
    assert agent.ask("stop", "one") == {"run_id": "one"}
    assert run.end() == 0, run.said()


def test_a_worker_that_died_of_it_is_classed_and_started_again(disk: Disk, tmp_path: Path) -> None:
    order, mark = marked(tmp_path)
    run = Steps(disk, "one", steps=20, result=100_000, **order).start()
    disk.refuse()
    # Until the worker has died of it, and the supervisor waits.
    run.wait(lambda: not run.workers(), "the worker's end")
    time.sleep(0.5)
    disk.take()
    assert run.end() == 0, run.said()
    failure = run.events("failure")[0]
    assert failure["failure"] == ("disk_full" if disk.way == "full" else "read_only")
    assert run.events("restarting")[0]["failure"] == failure["failure"]
    assert (run.folder.path / "result").stat().st_size == 100_000
    assert mark.exists()


def test_a_disk_that_stays_so_fails_the_run(disk: Disk, tmp_path: Path) -> None:
    order, mark = marked(tmp_path, disk_wait_seconds=1, last_words_seconds=60)
    run = Steps(disk, "one", steps=15, result=100_000, **order).start()
    disk.refuse()
    if disk.way != "full":
        # What it knows it says when it can, within the time for the last words.
        run.wait(lambda: not run.workers(), "the worker's end")
        time.sleep(A_WHILE)
        assert run.process is not None
        assert run.process.poll() is None
        disk.take()
    assert run.end() == 1, run.said()
    status = run.folder.status()
    assert status.state == "failed"
    assert status.failure == ("disk_full" if disk.way == "full" else "read_only")
    assert "inv resume --run one" in status.message
    assert run.events("run_ended")[0]["failure"] == status.failure
    assert not mark.exists()


def test_a_limit_ends_the_wait_for_room(tmp_path: Path) -> None:
    with Disk(tmp_path / "runs", "full") as disk:
        order, mark = marked(tmp_path, max_seconds=5)
        run = Steps(disk, "one", steps=15, result=100_000, **order).start()
        disk.refuse()
        assert run.end() == 0, run.said()
        status = run.folder.status()
        assert status.state == "stopped"
        assert "max-hours reached" in status.message
        assert [event["failure"] for event in run.events("failure")] == ["disk_full"]
        assert "its disk is full" in run.events("paused")[0]["why"]
        assert not mark.exists()


def test_a_run_is_not_started_on_it(disk: Disk, tmp_path: Path) -> None:
    run = Steps(disk, "one", steps=1)
    before = sorted(path.name for path in run.folder.path.iterdir())
    disk.refuse()
    agent = Agent(Path(sys.executable), tmp_path, tmp_path)
    agent.runs = disk.folder
    os.environ.update(disk.variables)
    try:
        refused = agent.ask("start", "one", code=2)["error"]
        assert "run one cannot start" in refused
        assert str(run.folder.path) in refused
        assert ("its disk is full" if disk.way == "full" else "cannot be written") in refused
        created = agent.ask("create", stdin={"run_id": "two", "request": {}}, code=1)["error"]
        assert str(disk.folder) in created
        assert "\n" not in refused + created
        assert agent.ask("show", "one")["status"]["state"] == "queued"
        assert sorted(path.name for path in run.folder.path.iterdir()) == before
        if disk.way == "full":
            (run.folder.path / "big").write_bytes(b"")
            assert agent.ask("remove", "one")["freed"] > 0
            assert not run.folder.path.exists()
        else:
            assert str(disk.folder) in agent.ask("remove", "one", code=1)["error"]
            assert run.folder.path.exists()
    finally:
        for name in disk.variables:
            del os.environ[name]


@pytest.mark.parametrize("disk", ["full", "read_only"], indirect=True)
def test_a_client_switches_the_host_off(disk: Disk, tmp_path: Path) -> None:
    order, _ = marked(tmp_path)
    run = Steps(disk, "one", steps=4, limits=order["limits"]).start()
    assert run.end() == 0, run.said()
    disk.refuse()
    agent = Agent(Path(sys.executable), tmp_path, tmp_path)
    agent.runs = disk.folder
    mark = tmp_path / "switched off"
    os.environ.update(disk.variables)
    try:
        answer = agent.ask("afterwards", "one", stdin={"command": ["touch", str(mark)]})
    finally:
        for name in disk.variables:
            del os.environ[name]
    assert answer == {"code": 0, "why": None}
    assert mark.exists()


def test_a_killed_supervisor_leaves_its_reserve_to_the_next(tmp_path: Path) -> None:
    with Disk(tmp_path / "runs", "full") as disk:
        limits = {"max_seconds": 4, "last_words_seconds": 1}
        run = Steps(disk, "one", steps=ENDLESS, limits=limits).start()
        assert run.process is not None
        os.kill(run.process.pid, signal.SIGKILL)
        run.end()
        run.wait(lambda: not run.folder.busy(), "the worker's end")
        disk.refuse()
        assert run.folder.status().failure == "killed"
        code = run.start(first=False).end()
        assert code == 0, run.said()
        assert read_json(run.folder.status_file)["state"] == "stopped"
