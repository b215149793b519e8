"""A damaged file of one run: it is told with its file and a way out, and the others are shown."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.run_folder import RUN_ID, build_run
from tunesmith.cli import listing, results, training
from tunesmith.core import files
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import read_json, write_json
from tunesmith.job.run import foreign, queue
from tunesmith.job.run.folder import COPY_FILE, RunFolder
from tunesmith.job.run.manifest import PARTS, manifest
from tunesmith.job.run.replies import CommandOrder, RunOrder
from tunesmith.job.run.schema import RunRequest
from tunesmith.job.run.stored import DamagedError
from tunesmith.job.run.watch import poll
from tunesmith.job.supervisor import agent, supervisor
from tunesmith.report import page
from tunesmith.report.page import write_report

pytestmark = pytest.mark.unit

GOOD = "healthy"
# Verbs that write into the run.
WRITE = ("report", "attach", "supervise", "agent manifest", "agent renew", "agent afterwards")
JSON_FILES = ("run.json", "status.json", "heartbeat.json", "adjustments.json", "pulled.json")
FILES = (*JSON_FILES, "config.yaml", "events.jsonl")
WRONG: tuple[Any, ...] = (7, "x", ["y"], {"z": 1}, None, True, 10**400, float("inf"), [None], [[1]])


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, each with every file there is."""
    runs = tmp_path_factory.mktemp("template")
    (runs / "made").mkdir()
    for name in (RUN_ID, GOOD):
        run = RunFolder(build_run(runs / "made").rename(runs / name))
        write_json(run.request_file, read_json(run.request_file) | {"run_id": name})
        write_json(
            run.heartbeat_file,
            {"step": 3, "total_steps": 9, "time": 1.0, "step_seconds": 1.0, "paused": None},
        )
        write_json(run.adjustments_file, {"per_device_train_batch_size": 2})
        record = {"size": 1, "sha256": "0" * 64}
        write_json(run.path / COPY_FILE, {"from": "gpu1", "files": {"train.log": record}})
        foreign.adopt(run.path, name, run.path)
        run.log_file.write_text("log\n")
    (runs / "made").rmdir()
    return runs


@pytest.fixture
def runs(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of them in a home of its own."""
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path))
    # Thousands of writes, none of which has to survive a power loss.
    monkeypatch.setattr(files, "_fsync", lambda *_: None)
    # A picture takes a second; what it is drawn from is read all the same.
    monkeypatch.setattr(page, "as_svg", lambda curve, **_: "<svg/>")
    monkeypatch.setattr(page, "write_png", lambda *_, **__: None)
    shutil.copytree(template, tmp_path / "runs")
    return tmp_path / "runs"


def verbs(root: Path, runs: Path) -> dict[str, Callable[[], object]]:
    """What a user, a client of this host, and a host do with a run."""
    run = RunFolder(runs / RUN_ID)
    config = Path("configs/predict/smollm2_135m_lora_sft.yaml")
    chat = {"prompt": "", "system": "", "greedy": True, "max_new_tokens": 0, "dry": True}

    return {
        "attach": lambda: training.attach(root, "local", RUN_ID),
        "logs": lambda: listing.logs(root, "local", RUN_ID, follow=False),
        "resume": lambda: training.resume(root, "local", RUN_ID, dry=True),
        "stop": lambda: training.stop(root, "local", RUN_ID),
        "merge": lambda: results.merge(root, "local", RUN_ID, (), dry=True),
        "predict": lambda: results.predict(root, "local", config, RUN_ID, (), mirror="", dry=True),
        "chat": lambda: results.chat(root, "local", RUN_ID, what="adapter", **chat),
        "report": lambda: results.report(root, "local", RUN_ID, language="en"),
        "rm --dry": lambda: listing.remove(root, "local", RUN_ID, dry=True),
        "supervise": lambda: supervise(run),
        "agent find": lambda: agent.find(runs, RUN_ID),
        "agent newest": lambda: agent.find(runs, None),
        "agent show": lambda: agent.show(run),
        "agent watch": lambda: poll(run, 0, 0),
        "agent manifest": lambda: manifest(run, PARTS, lambda *_: None),
        "agent renew": lambda: agent.renew(run, RunOrder(RunRequest())),
        "agent afterwards": lambda: agent.afterwards(run, CommandOrder(("true",))),
        "agent resume-all": lambda: agent.resume_all(runs),
    }


def supervise(run: RunFolder) -> None:
    """What a supervisor reads before it works: here, with nothing to do."""
    other = queue.take(run.path.parent, "other")[0]
    try:
        supervisor.supervise(run.path, [])
    finally:
        if other:
            other.release()


def tried(root: Path, runs: Path, damage: str, *skip: str) -> dict[str, str]:
    """Do everything with the damaged run; return what was refused. No error may be another."""
    refused = {}
    kept = runs.with_name("kept")
    shutil.copytree(runs, kept)
    for name, verb in verbs(root, runs).items():
        if name in skip:
            continue
        try:
            verb()
        except TunesmithError as error:
            assert "\n" not in error.message, (damage, name)
            refused[name] = error.message
        except SystemExit:
            pass
        except Exception as error:
            raise AssertionError(f"{name} with {damage}") from error
        if name not in WRITE:
            continue
        # The next one finds the damage as it was.
        shutil.rmtree(runs / RUN_ID)
        shutil.copytree(kept / RUN_ID, runs / RUN_ID)
    shutil.rmtree(kept)
    return refused


def listed(root: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    capsys.readouterr()
    listing.list_runs(root, "local", as_json=True)
    return {run["run_id"]: run for run in json.loads(capsys.readouterr().out)}


def contents(file: Path) -> Iterator[tuple[str, bytes]]:
    whole = file.read_bytes()
    yield "empty", b""
    yield "cut", whole[: len(whole) // 2]
    yield "a list", b"[]\n"
    yield "null", b"null\n"
    yield "a number", b"7\n"
    yield "no UTF-8", b"\xff\xfe" + whole
    yield "zeros", b"\0" * 4096
    yield "deep", b"[" * 1_500
    yield "deep objects", b'{"a":' * 1_500
    yield "tabs", b"\t- : [\n"


@pytest.mark.parametrize("name", FILES)
def test_whatever_a_file_holds_the_rest_works(
    root: Path, runs: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = runs / RUN_ID / name
    few = 6 if name in ("heartbeat.json", "adjustments.json", "pulled.json") else None
    for kind, content in itertools.islice(contents(file), few):
        whole = file.read_bytes()
        file.write_bytes(content)
        if name == "events.jsonl":
            file.write_bytes(content + b"\n" + whole)
        found = listed(root, capsys)
        assert found[GOOD]["state"] == "succeeded", kind
        if name in ("run.json", "status.json"):
            assert found[RUN_ID]["failure"] == "damaged", kind
            assert str(file) in found[RUN_ID]["message"], kind
        # The report that follows an attach is tried by itself.
        refused = tried(root, runs, f"{name}: {kind}", "attach" if name == "config.yaml" else "")
        if name == "run.json":
            for verb in ("merge", "report", "agent show"):
                assert f"{file}: damaged: " in refused[verb], kind
                assert f"`inv rm --run {RUN_ID}` deletes the run" in refused[verb], kind
        if name == "config.yaml" and kind != "cut":
            assert f"{file}: damaged: " in refused["merge"], kind
        if name == "status.json":
            # What the events tell stands for it.
            assert not {"merge", "report", "logs", "agent show", "attach"} & refused.keys(), kind
        file.write_bytes(whole)


def test_a_damaged_run_is_deleted_by_the_command_that_is_told(root: Path, runs: Path) -> None:
    for name in ("run.json", "config.yaml", "pulled.json", "status.json"):
        (runs / RUN_ID / name).write_bytes(b"{")
    listing.remove(root, "local", RUN_ID, dry=False)
    assert not (runs / RUN_ID).exists()
    (runs / GOOD / "run.json").write_bytes(b"{")
    assert agent.remove(runs, RunFolder(runs / GOOD)).freed > 0
    assert not (runs / GOOD).exists()


@pytest.mark.parametrize("name", ["run.json", "status.json", "pulled.json", "heartbeat.json"])
def test_a_key_that_is_missing_or_of_another_type(
    root: Path, runs: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = runs / RUN_ID / name
    whole = read_json(file)
    for number, key in enumerate(whole):
        changes: list[tuple[str, Any]] = [(f"no {key}", {k: whole[k] for k in whole if k != key})]
        # One of the wrong ones a key, all of them over the keys.
        wrong = WRONG[number % len(WRONG)]
        changes.append((f"{key} {wrong!r:.20}", whole | {key: wrong}))
        for damage, value in changes:
            file.write_text(json.dumps(value))
            assert listed(root, capsys)[GOOD]["state"] == "succeeded", damage
            tried(root, runs, f"{name}: {damage}", "report", "supervise")
    file.write_text(json.dumps(whole))


@pytest.mark.parametrize(
    "name",
    [
        *("run.json", "status.json", "config.yaml", "evaluation.json", "proof.json"),
        *("parity.json", "versions.json", "before.jsonl", "after.jsonl", "events.jsonl"),
    ],
)
def test_a_report_of_values_of_other_types(runs: Path, name: str) -> None:
    """One line and no page, or a page; never a traceback."""
    file = runs / RUN_ID / name
    text = file.read_text()
    lines = [json.loads(line) for line in text.splitlines()] if name.endswith(".jsonl") else []
    value = lines[-1] if lines else yaml.safe_load(text)
    if name == "events.jsonl":
        value = next(event for event in lines if event["event"] == "log")
    for number, key in enumerate(value):
        for wrong in (WRONG[number % len(WRONG)], WRONG[(number + 3) % len(WRONG)]):
            damaged = value | {key: wrong}
            if name.endswith(".jsonl"):
                file.write_text(text + json.dumps(damaged) + "\n")
            else:
                file.write_text(json.dumps(damaged))
            try:
                write_report(runs / RUN_ID)
            except TunesmithError as error:
                assert "damaged" in error.message
            except Exception as error:
                raise AssertionError(f"{name}: {key} {wrong!r:.20}") from error


def test_a_run_without_run_json_is_told_and_can_be_deleted(
    root: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (runs / RUN_ID / "run.json").unlink()
    assert "run.json is missing" in listed(root, capsys)[RUN_ID]["message"]
    listing.list_runs(root, "local", as_json=False)
    assert f"run {RUN_ID}: " in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"run\.json is missing"):
        results.merge(root, "local", RUN_ID, (), dry=True)
    listing.remove(root, "local", RUN_ID, dry=False)


def test_a_run_that_cannot_be_looked_into_does_not_hide_the_others(
    root: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(runs / RUN_ID)
    (run.path / COPY_FILE).unlink()
    write_json(run.status_file, {"run_id": RUN_ID, "state": "running"})
    run.lock_file.unlink(missing_ok=True)
    run.lock_file.symlink_to(run.lock_file)  # opening it fails
    listing.list_runs(root, "local", as_json=False)
    said = capsys.readouterr().out
    assert f"{run.lock_file}: cannot be read" in said.replace("\n", "")
    assert GOOD in said


def aliases(levels: int) -> str:
    """YAML of a few lines that stands for 9 ** levels values."""
    lines = ["a0: &a0 [x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels + 1)]
    return "\n".join([*lines, f"adapter_name_or_path: *a{levels}", ""])


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("config.yaml", aliases(9), "more than 1000000 values"),
        ("config.yaml", "a: &a [*a]\n", "nested too deeply"),
        ("config.yaml", "a: 1\n" + "#" * (2 << 20), "bytes long"),
        ("config.yaml", 'default_system: "\\ud800"\n', "half a character"),
        ("run.json", '{"title": "\\ud800"}', "half a character"),
        ("run.json", '{"title": "\\ud83d\\ude00"}', ""),
        ("run.json", json.dumps({"overrides": {"x": "[" * 200 + "]" * 200}}), ""),
        ("run.json", '{"overrides": {"x": ' + "[" * 200 + "]" * 200 + "}}", "nested too deeply"),
    ],
)
def test_a_value_that_cannot_be_written_out_is_refused(
    tmp_path: Path, name: str, content: str, why: str
) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    (run.path / name).write_text(content)
    read = run.config if name == "config.yaml" else run.request
    if not why:
        read()
        return
    with pytest.raises(DamagedError, match=why):
        read()


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(runs: Path) -> None:
    import os

    for name in ("run.json", "config.yaml"):
        (runs / RUN_ID / name).unlink()
        os.mkfifo(runs / RUN_ID / name)
    run = RunFolder(runs / RUN_ID)
    with pytest.raises(UsageError, match="not a plain file"):
        run.request()
    with pytest.raises(UsageError, match="not a plain file"):
        run.config()
