"""Why work on a run began: each starter says it, and each place that tells of a run shows it."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from docker.errors import APIError
from rich.console import Console

from tunesmith.cli import container as cli_container
from tunesmith.cli import listing, training
from tunesmith.cli.container_runs import cause_of
from tunesmith.cli.follow import event_text
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import write_json
from tunesmith.hosts import autostart, replies
from tunesmith.hosts.answers import AnswerSource
from tunesmith.job.run import foreign
from tunesmith.job.run.codec import Fault, decode
from tunesmith.job.run.events import Event, RunStarted, status_from
from tunesmith.job.run.folder import RunFolder, acquire
from tunesmith.job.run.process import identify
from tunesmith.job.run.replies import RunSnapshot
from tunesmith.job.run.schema import CAUSES, RunRequest, RunStatus
from tunesmith.plan import start
from tunesmith.plan.plan import Plan
from tunesmith.project import Project
from tunesmith.report import timing
from tunesmith.report.i18n import translator
from tunesmith.report.page import write_report
from tunesmith.targets import factory
from tunesmith.targets.container import ContainerTarget
from tunesmith.targets.host import HostTarget
from tunesmith.targets.local import LocalTarget
from unit.run_folder import build_run

pytestmark = pytest.mark.unit

# Of a process whose first one was another than that of now.
AGAIN = {"init_started": identify().init_started + 1}


@pytest.fixture
def project(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A home with the run `r`."""
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "home"))
    made = Project.at(root)
    folder = made.runs / "r"
    folder.mkdir(parents=True)
    write_json(folder / "run.json", {"run_id": "r", "created": "1", "phases": ["train"]})
    return made


def local(project: Project, said: Path) -> LocalTarget:
    """This machine, with an interpreter that writes its words down."""
    python = said.with_name("python")
    python.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >>"{said}"\n')
    python.chmod(0o755)
    target = LocalTarget(project)
    flavour = SimpleNamespace(name="cpu", lock_sha256="0")
    target.__dict__["_environment"] = SimpleNamespace(
        python=python, current=lambda: True, flavour=flavour
    )
    return target


def host(answer: dict[str, Any], code: int = 0) -> tuple[HostTarget, list[tuple[str, ...]]]:
    """A host that gives one answer, and the words it is asked."""
    asked: list[tuple[str, ...]] = []

    def run(_script: str, *, arguments: tuple[str, ...], **_: Any) -> Any:
        asked.append(tuple(arguments))
        return subprocess.CompletedProcess([], code, json.dumps(answer) + "\n", "")

    target = object.__new__(HostTarget)
    target.name = "gpu1"
    target._remote = SimpleNamespace(name="gpu1", run=run)  # type: ignore[assignment]
    return target, asked


def test_a_start_here_says_it(project: Project, tmp_path: Path) -> None:
    target = local(project, tmp_path / "said")
    target.start("r", ["train"], "resume")
    words = (tmp_path / "said").read_text().splitlines()
    assert words[-5:] == ["start", str(project.runs / "r"), "train", "--cause", "resume"]


def test_a_resume_says_that_it_is_one(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = local(project, tmp_path / "said")
    write_json(project.runs / "r/status.json", {"state": "stopped", "phases": {"train": "stopped"}})
    monkeypatch.setattr(factory, "target_of", lambda *_: target)
    monkeypatch.setattr(training, "finish", lambda *_: None)
    training.resume(project.root, "local", "r", dry=False)
    assert (tmp_path / "said").read_text().split()[-2:] == ["--cause", "resume"]
    training.resume(project.root, "local", "r", cause="container", dry=False)
    assert (tmp_path / "said").read_text().split()[-2:] == ["--cause", "container"]


def test_what_a_user_asks_for_says_so(project: Project, tmp_path: Path) -> None:
    target = local(project, tmp_path / "said")
    plan = Plan(target.location("r"), ("merge",), RunRequest())
    start.start_on_run(target, plan)
    assert (tmp_path / "said").read_text().split()[-3:] == ["merge", "--cause", "user"]


def test_a_start_on_a_host_says_it() -> None:
    target, asked = host({"run_id": "r"})
    target.start("r", ("train",), "user")
    assert asked == [("start", "r", "train", "--cause", "user")]
    target, asked = host({"started": ["r"], "refused": {}})
    assert target.resume_all() == (["r"], [])
    assert asked == [("resume-all", "--cause", "resume")]


def test_a_host_that_does_not_know_causes_is_to_be_provisioned() -> None:
    said = "python -m tunesmith.job.supervisor.agent: unrecognized arguments: --cause user"
    target, _ = host({"error": said, "detail": []}, code=2)
    with pytest.raises(UsageError, match="gpu1 runs an older tunesmith"):
        target.start("r", (), "user")


def test_the_start_of_a_host_says_it(tmp_path: Path) -> None:
    hook = tmp_path / "autodl.sh"
    words = (str(tmp_path), "/env/bin/python", str(hook), "install")
    subprocess.run(["sh", "-c", autostart._SCRIPT, "sh", *words], check=True)
    written = (tmp_path / "autostart.sh").read_text()
    assert f'agent --runs "{tmp_path}/runs"     resume-all --cause autostart\n' in written


def test_a_start_in_a_container_says_it(project: Project, tmp_path: Path) -> None:
    commands: list[list[str]] = []

    def create(_image: str, command: list[str], **_: Any) -> Any:
        commands.append(command)
        raise APIError("enough is known")

    containers = SimpleNamespace(create=create, list=lambda **_: [])
    target = object.__new__(ContainerTarget)
    target.__dict__ |= local(project, tmp_path / "said").__dict__
    target._tell = lambda _: None
    target._image = "image"
    target._client = SimpleNamespace(containers=containers, info=lambda: {"Runtimes": {}})  # type: ignore[assignment]
    with pytest.raises(TunesmithError):
        target.start("r", ["train"], "resume")
    run = str(project.runs / "r")
    assert commands == [["job", "run", run, "train", "--cause", "resume"]]


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (AGAIN, "container"),  # its first process is another one by now
        ({}, "resume"),
        ({"hostname": "another"} | AGAIN, "resume"),
    ],
)
def test_a_container_that_is_started_again_says_it(
    project: Project, change: dict[str, Any], cause: str
) -> None:
    run = RunFolder(project.runs / "r")
    assert cause_of(run, "resume") == "resume", "nobody has worked on it yet"
    owner = identify().to_json() | change
    write_json(run.status_file, {"state": "running", "phases": {}, "supervisor": owner})
    assert cause_of(run, "resume") == cause


def test_the_first_words_of_a_container_said_again_are_its_restart(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str] = []
    monkeypatch.setattr("tunesmith.job.__main__.supervise", lambda *words: given.append(words[2]))
    run = RunFolder(project.runs / "r")
    words = ["job", "run", str(run.path), "train", "--cause", "user"]
    cli_container.main(words)
    owner = identify().to_json() | AGAIN
    write_json(run.status_file, {"state": "running", "phases": {}, "supervisor": owner})
    cli_container.main(words)
    assert given == ["user", "container"]


def test_events_and_status_are_of_known_causes_and_older_ones_have_none() -> None:
    event: dict[str, Any] = {"event": "run_started", "phases": ["train"], "time": 1.0}
    asked = AnswerSource("gpu1", "its answer to `watch`")
    status = {"run_id": "r", "state": "running", "phases": {}}
    reply = {"status": status, "events": [event], "events_offset": 1, "log_offset": -1}

    def read(value: dict[str, Any]) -> RunSnapshot:
        return replies.read(asked, RunSnapshot, value)

    assert status_from([decode(Event, event)], "r").cause is None
    (older,) = read(reply).events
    assert isinstance(older, RunStarted)
    assert older.cause is None
    for cause in CAUSES:
        started = decode(Event, event | {"cause": cause})
        assert status_from([started], "r").cause == cause
        assert decode(RunStatus, status | {"cause": cause}).cause == cause
        assert read(reply | {"events": [event | {"cause": cause}]}).events == (started,)
        assert read(reply | {"status": status | {"cause": cause}}).status.cause == cause
    for wrong in ("whim", 7, ["user"]):
        with pytest.raises(Fault, match="cause: expected one of user, resume"):
            decode(Event, event | {"cause": wrong})
        with pytest.raises(Fault, match="cause: expected one of user, resume"):
            decode(RunStatus, status | {"cause": wrong})
        for other in (
            {"events": [event | {"cause": wrong}]},
            {"status": status | {"cause": wrong}},
        ):
            with pytest.raises(TunesmithError, match="cause"):
                read(reply | other)


def test_who_follows_reads_it_first() -> None:
    event = RunStarted(phases=("train", "after"), cause="autostart")
    assert event_text(event) == "started (autostart): train, after"
    assert event_text(RunStarted(phases=("train",))) is None, "an older run"


@pytest.mark.parametrize(
    ("status", "shown"),
    [
        ({"state": "running", "cause": "user"}, "running"),
        ({"state": "running"}, "running"),
        ({"state": "running", "cause": "resume"}, "running (resume)"),
        ({"state": "queued", "cause": "resume"}, "queued (resume)"),
        ({"state": "running", "cause": "retry", "retried": "stalled"}, "running (retry: stalled)"),
        ({"state": "succeeded", "cause": "resume"}, "succeeded"),
        ({"state": "failed", "cause": "resume", "failure": "killed"}, "failed (killed)"),
    ],
)
def test_the_list_of_runs_shows_it_while_they_run(status: dict[str, Any], shown: str) -> None:
    assert listing._state(decode(RunStatus, status)) == shown


def test_a_pulled_run_keeps_it(tmp_path: Path) -> None:
    run = RunFolder(build_run(tmp_path))
    told = {"state": "running", "phases": {}, "cause": "retry", "retried": "stalled"}
    write_json(run.status_file, told)
    foreign.adopt(run.path, run.run_id, run.path)
    kept = run.last_status()
    assert kept is not None
    assert (kept.cause, kept.retried) == ("retry", "stalled")


def test_the_report_says_how_work_began_each_time(tmp_path: Path) -> None:
    run = build_run(tmp_path)
    events = run / "events.jsonl"
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    first = next(line for line in lines if line["event"] == "run_started")
    again = first | {"cause": "autostart", "time": lines[-1]["time"] + 60}
    first["cause"] = "user"
    events.write_text("".join(json.dumps(line) + "\n" for line in [*lines, again]))
    page = write_report(run).read_text()
    assert "Started: by the user (0 s), by the start of the host (" in page
    assert "- Started: by the user (0 s), by the start" in (run / "report.md").read_text()
    page = write_report(run, language="zh").read_text()
    assert "启动方式: 由用户启动 (0 s), 主机开机后自动继续 (" in page
    assert set(timing.STARTS) == set(CAUSES)
    for words in timing.STARTS.values():
        assert translator("zh")(words) != words


def test_a_list_of_80_columns_has_whole_ids_and_causes(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = "smollm2_135m_lora_sft-20261125-100000"
    run = RunFolder((project.runs / "r").rename(project.runs / run_id))
    write_json(run.request_file, {"run_id": run_id, "created": "1", "phases": ["train"]})
    status = {"run_id": run_id, "state": "running", "phases": {"train": "running"}}
    lock = acquire(run)
    try:
        write_json(run.status_file, status | {"cause": "retry", "retried": "host_oom"})
        out = io.StringIO()
        monkeypatch.setattr(listing, "console", Console(file=out, width=80))
        listing.list_runs(project.root, "local", as_json=False)
    finally:
        lock.release()
    shown = out.getvalue()
    assert run_id in shown
    head, *rows = shown.splitlines()
    column = slice(head.index("state"), head.index("step"))
    assert "".join(row[column].strip() for row in rows) == "running(retry:host_oom)", shown
