"""One bit flipped in each input and result, before each phase and verb that reads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from event_rows import event_rows
from tests.unit import finished_run
from tests.unit.finished_run import files_of, flip, write
from tunesmith.core.errors import UsageError
from tunesmith.core.files import read_json, sha256_of, write_json
from tunesmith.core.names import ENVIRONMENT_MARKER
from tunesmith.job.evaluation import chat
from tunesmith.job.export import export
from tunesmith.job.merge import bundle, offline
from tunesmith.job.run import inputs, integrity, seals
from tunesmith.job.run.folder import COPY_FILE, PHASES, RunFolder, acquire
from tunesmith.job.run.journal import Journal
from tunesmith.job.services import api, board
from tunesmith.job.supervisor import agent, supervisor
from tunesmith.plan.plan import Plan, RunLocation
from tunesmith.report.compare import compare
from tunesmith.report.record import read_record
from tunesmith.targets.local import LocalTarget

pytestmark = pytest.mark.unit

DATA = {"data/rows.json", "data/dataset_info.json", "data/picture.png", "data/many/1.json"}
MODEL = {"model/model.safetensors", "model/tokenizer.json"}
START, OTHER = {"start/adapter_model.safetensors"}, {"deepspeed.json"}
REQUEST = {"runs/run/run.json", "runs/run/config.yaml", "runs/run/seals.json"}
PREDICTED = {"data/rows.json", "data/dataset_info.json", "data/picture.png"}


def of(*results: str) -> set[str]:
    names = {n: [f"{n}/{file}" for file in finished_run.RESULTS[n][1]] for n in seals.FOLDERS}
    return {f"runs/run/{file}" for name in results for file in names.get(name, [name])}


# phase or verb -> every file it reads, by its path below the folder that holds all of them.
READS = {
    "check": REQUEST,
    "fetch": REQUEST,
    "before": REQUEST | DATA | MODEL | START | OTHER,
    "train": REQUEST | DATA | MODEL | START | OTHER,
    "after": REQUEST | DATA | MODEL | START | OTHER | of("output", "evaluation.json"),
    "merge": REQUEST | MODEL | START | of("output", "bundle"),
    "proof": REQUEST
    | MODEL
    | START
    | of("output", "parity.json", "before.jsonl", "merged/MANIFEST.json"),
    "predict": REQUEST | PREDICTED | MODEL | of("output"),
    "base": REQUEST | MODEL | START,
    "adapter": REQUEST | MODEL | START | of("output"),
    "merged": REQUEST | of("merged"),
    "export": REQUEST | MODEL | of("merged", "proof.json", "parity.json", "export.json"),
}
SEALED = {"runs/run/seals.json"}
REPORTED = SEALED | of(*seals.ANSWERS, "parity.json", "proof.json")
PULLED = SEALED | of(*seals.FOLDERS, *seals.FILES)


@pytest.fixture(scope="module")
def pattern(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("finished")
    finished_run.make(top)
    return top


@pytest.fixture
def top(pattern: Path) -> Any:
    """The finished run; what a test changes is put back, with new time stamps."""
    kept = {path: path.read_bytes() for path in pattern.rglob("*") if path.is_file()}
    yield pattern
    for path in [path for path in pattern.rglob("*") if path.is_file() and path not in kept]:
        path.unlink()
    for path, content in kept.items():
        if not path.is_file() or path.read_bytes() != content:
            path.write_bytes(content)


def refused(do: Callable[[], object], file: Path) -> str:
    with pytest.raises(UsageError) as caught:
        do()
    told = caught.value.message
    assert file.name in told and "\n" not in told and "`" in told, told
    return told


def silent(_: str) -> None:
    raise AssertionError("nothing is to be said of a run that is whole")


@pytest.mark.parametrize("use", READS)
def test_one_bit_of_any_file_that_is_read_is_refused(top: Path, use: str) -> None:
    run = top / "runs" / "run"
    before = sorted(path for path in run.rglob("*") if path.name != ".stamps.json")
    integrity.check(run, use, silent)
    every = {path.relative_to(top).as_posix(): path for path in files_of(top)}
    assert every.keys() >= READS[use]
    count = 0
    for name, file in every.items():
        content = file.read_bytes()
        # Of a result, rot that leaves no trace but the bit; an input's change has a time of change.
        flip(file, quietly=True)
        if name in READS[use]:
            told = refused(lambda: integrity.check(run, use, silent), file)
            if name not in ("runs/run/seals.json", "data/dataset_info.json"):
                assert sha256_of(file) in told
            count += 1
        elif name != "data/dataset_info.json":
            integrity.check(run, use, silent)
        file.write_bytes(content)
        integrity.check(run, use, silent)
    assert count == len(READS[use])
    assert sorted(path for path in run.rglob("*") if path.name != ".stamps.json") == before


def test_every_phase_is_among_them() -> None:
    assert set(PHASES) <= READS.keys()


@pytest.mark.parametrize(
    ("verb", "reads"),
    [
        ("report", REPORTED),
        ("compare", REPORTED),
        ("pull", PULLED),
    ],
)
def test_one_bit_of_what_is_shown_or_sent_is_refused(top: Path, verb: str, reads: set[str]) -> None:
    run = top / "runs" / "run"
    other = RunFolder(top / "runs" / "other")
    shutil.copytree(run, other.path)
    # One of its own name, as every run is.
    with seals.rewriting(other.path, "create", other.request_file.name):
        write_json(other.request_file, read_json(other.request_file) | {"run_id": "other"})
    do: dict[str, Callable[[], object]] = {
        "report": lambda: read_record(run),
        "compare": lambda: compare([other.path, run]),
        "pull": lambda: agent._sealed_manifest(RunFolder(run), list(agent.PARTS)),
    }
    try:
        do[verb]()
        for name in sorted(reads):
            file = top / name
            content = file.read_bytes()
            flip(file, quietly=True)
            refused(do[verb], file)
            file.write_bytes(content)
            do[verb]()
    finally:
        shutil.rmtree(other.path)


@pytest.mark.parametrize(
    ("verb", "file"),
    [
        ("chat", "output/adapter_model.safetensors"),
        ("chat --what merged", "merged/model.safetensors"),
        ("api", "output/adapter_model.safetensors"),
        ("api --what merged", "merged/model.safetensors"),
        ("export", "merged/model.safetensors"),
        ("merge without an environment", "output/adapter_model.safetensors"),
        ("bundle", "output/adapter_model.safetensors"),
    ],
)
def test_verbs_refuse_before_anything_is_loaded(
    top: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    verb: str,
    file: str,
) -> None:
    """That something would have been loaded is seen by the unlike error with the file whole."""
    run = top / "runs" / "run"
    what = "merged" if "merged" in verb else "adapter"
    monkeypatch.setattr(chat.engine, "arguments", lambda config, **_: dict(config))

    class Loaded(Exception):
        pass

    def load(*_: Any, **__: Any) -> None:
        raise Loaded

    monkeypatch.setattr(chat.engine, "codec", load)
    monkeypatch.setattr(bundle.inputs, "read", load)
    monkeypatch.setattr(offline.merge_phase, "run", load)
    write(run / "proof.json", '{"passed": true}')
    seals.seal(run, "proof", ("proof.json",))
    asked = chat._parser().parse_args(["--run", str(run), "--what", what])
    monkeypatch.setattr(chat, "choose_sampling", load if verb[:3] == "api" else lambda *_: None)
    do: Callable[[], object] = {
        "chat": lambda: chat._prepare(asked),
        "api": lambda: api.arguments(run, what),
        "export": lambda: export.run(run, "gguf"),
        "merge": lambda: offline._merge(RunFolder(run)),
        "bundle": lambda: bundle.make(run),
    }[verb.split()[0]]
    with pytest.raises(Loaded):
        do()
    flip(run / file, quietly=True)
    refused(do, run / file)


def test_the_board_does_not_show_a_result_that_was_changed(
    top: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(top / "runs" / "run")
    assert board._as_sealed(run)
    flip(run.path / "output" / "adapter_config.json")
    assert not board._as_sealed(run)
    assert "run run is not shown: " in capsys.readouterr().err


def test_the_supervisor_fails_the_phase_before_a_worker_is_started(
    top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(top / "runs" / "run")

    def start(*_: Any) -> None:
        raise AssertionError("a worker was started")

    monkeypatch.setattr(supervisor, "Attempt", start)
    flip(run.path / "output" / "adapter_model.safetensors", quietly=True)
    assert supervisor.supervise(run.path, ["merge"]) == 1
    status = run.status()
    assert (status.state, status.failure) == ("failed", "changed")
    assert status.phases["merge"] == "failed"
    assert "adapter_model.safetensors: changed since it was made" in status.message
    assert "`inv train --config configs/train/x.yaml`" in status.message
    assert [e["failure"] for e in event_rows(run.events_file) if e["event"] == "failure"] == [
        "changed"
    ]


def test_a_stop_while_files_are_compared_is_a_stop(
    top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(top / "runs" / "run")

    def long(_run: Path, _use: str, _say: Any, tell: seals.Tell) -> None:
        made._stop_requests = 1
        tell(1_000_000, 5_000_000)

    monkeypatch.setattr(integrity, "check", long)
    lock = acquire(run)
    try:
        made = supervisor._Supervisor(run, run.request(), lock, Journal(run), run.path)
        outcome = made._compared("merge")
    finally:
        lock.release()
    assert outcome is not None and outcome.state == "stopped"
    told = [e for e in event_rows(run.events_file) if e["event"] == "progress"]
    assert (told[-1]["done"], told[-1]["total"], told[-1]["unit"]) == (1, 5, "MB compared")


def test_what_is_missing_or_added_is_named(top: Path) -> None:
    run = top / "runs" / "run"
    weights = run / "output" / "adapter_model.safetensors"
    weights.unlink()
    assert "missing, expected sha256" in refused(
        lambda: integrity.check(run, "merge", silent), weights
    )
    (top / "data" / "rows.json").unlink()
    refused(lambda: integrity.check(run, "train", silent), top / "data" / "rows.json")
    write(top / "data" / "many" / "2.json", "[]")
    refused(lambda: integrity.check(run, "before", silent), top / "data" / "many" / "2.json")
    added = run / "merged" / "adapter_config.json"
    write(added, "{}")
    assert "was not there when merge ended" in refused(
        lambda: integrity.check(run, "merged", silent), added
    )


def test_a_model_card_may_be_written_but_is_pulled_as_it_was(top: Path) -> None:
    run = top / "runs" / "run"
    card = run / "output" / "README.md"
    write(card, "as trained")
    seals.seal(run, "train", ("output",))
    write(card, "by hand")
    integrity.check(run, "merge", silent)
    refused(lambda: agent._sealed_manifest(RunFolder(run), ["adapter"]), card)


def test_seals_are_whole_or_none(top: Path) -> None:
    """One digit of a seal that this use does not look at: who knows what else is another."""
    file = top / "runs" / "run" / seals.SEALS
    digest = read_json(file)["files"]["predict/predict_results.json"]["sha256"]
    other = ("0" if digest[0] != "0" else "1") + digest[1:]
    write(file, file.read_text().replace(digest, other))
    told = refused(lambda: integrity.check(file.parent, "merge", silent), file)
    assert f"`rm {file}` lets the results count as they are now" in told


def test_what_a_tracker_adds_to_a_result_is_no_part_of_it(top: Path) -> None:
    run = top / "runs" / "run"
    write(run / "output" / "runs" / "Jan14" / "events.out.tfevents.1.host.2.0", "curves")
    integrity.check(run, "merge", silent)


def test_inputs_whose_stamps_are_known_are_not_read(
    top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = top / "runs" / "run"
    integrity.check(run, "train", silent)
    read: list[str] = []
    once = inputs.sha256_of

    def noted(files: dict[str, Path], tell: seals.Tell) -> Any:
        read.extend(files)
        return once(files, tell)

    monkeypatch.setattr(inputs, "sha256_of", noted)
    integrity.check(run, "train", silent)
    assert read == []
    rows = top / "data" / "rows.json"
    write(rows, rows.read_text())
    integrity.check(run, "train", silent)
    integrity.check(run, "train", silent)
    assert read == [str(rows)]
    # On another machine nothing is known of the files.
    (run / inputs.STAMPS).unlink()
    integrity.check(run, "train", silent)
    assert len(read) == 1 + len(DATA - {"data/dataset_info.json"}) + len(MODEL | START | OTHER)


def test_another_key_of_the_registry_changes_nothing(top: Path) -> None:
    registry = top / "data" / "dataset_info.json"
    write_json(registry, read_json(registry) | {"more": {"file_name": "more.json"}})
    integrity.check(top / "runs" / "run", "train", silent)


def test_an_environment_of_another_lock_is_refused(
    top: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = top / "runs" / "run"
    monkeypatch.setattr(inputs.sys, "prefix", str(tmp_path))
    integrity.check(run, "before", silent)
    assert not (run / seals.ENVIRONMENT).exists()
    made = {"flavour": "cu128", "lock_sha256": "a" * 64}
    write_json(tmp_path / ENVIRONMENT_MARKER, made | {"versions": {}})
    integrity.check(run, "before", silent)
    integrity.check(run, "train", silent)
    write_json(tmp_path / ENVIRONMENT_MARKER, made | {"lock_sha256": "b" * 64})
    with pytest.raises(UsageError, match=r"stack: .* is now of lock cu128 with sha256 bbb"):
        integrity.check(run, "train", silent)
    integrity.check(run, "merge", silent)
    # One bit, with which it would be the same lock again.
    write_json(run / seals.ENVIRONMENT, {"flavour": "cu128", "lock_sha256": "b" * 64})
    refused(lambda: integrity.check(run, "train", silent), run / seals.ENVIRONMENT)


def test_the_results_of_an_older_version_are_compared_with_what_it_recorded(top: Path) -> None:
    run = RunFolder(top / "runs" / "run")
    weights = run.path / "output" / "adapter_model.safetensors"
    (run.path / seals.SEALS).unlink()
    record = {"size": weights.stat().st_size, "sha256": sha256_of(weights)}
    run.emit("summary", phase="train", files={weights.name: record})
    content = weights.read_bytes()
    flip(weights)
    refused(lambda: integrity.check(run.path, "adapter", silent), weights)
    weights.write_bytes(content)
    said: list[str] = []
    integrity.check(run.path, "adapter", said.append)
    integrity.check(run.path, "adapter", silent)
    assert len(said) == 1 and "made by an older version" in said[0]
    assert "`inv train --config configs/train/x.yaml`" in said[0]
    flip(weights)
    refused(lambda: integrity.check(run.path, "adapter", silent), weights)
    run.events_file.unlink()


def test_a_phase_that_is_cut_off_between_file_and_seal_leaves_no_false_one(top: Path) -> None:
    run = top / "runs" / "run"
    with pytest.raises(ZeroDivisionError), seals.rewriting(run, "proof", "proof.json"):
        write(run / "proof.json", '{"passed": true}')
        raise ZeroDivisionError
    said: list[str] = []
    seals_left = seals.read(run)
    assert "proof.json" not in seals_left and "parity.json" in seals_left
    integrity.check(run, "export", said.append)
    assert "its phase was cut off" in said[0]


def test_the_request_of_a_pulled_run_is_this_machines(top: Path) -> None:
    run = top / "runs" / "run"
    write_json(run / COPY_FILE, {"from": "gpu1", "files": {"output/adapter_config.json": {}}})
    flip(run / "config.yaml")
    flip(run / "run.json")
    seals.check(run, seals.REQUEST)
    seals.seal(run, seals.SETTLED, seals.REQUEST)
    flip(run / "config.yaml")
    refused(lambda: seals.check(run, seals.REQUEST), run / "config.yaml")
    config = run / "output" / "adapter_config.json"
    flip(config)
    told = refused(lambda: seals.check(run, ("output",)), config)
    assert "`inv pull --on gpu1 --run run --what adapter` brings it again" in told


def test_a_new_prediction_records_its_rows_anew(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deliberate changes stay possible: a plan that was checked anew is a new record."""
    run = RunFolder(top / "runs" / "run")
    write(top / "data" / "rows.json", "[]")
    with pytest.raises(UsageError, match="changed since run run was made"):
        integrity.check(run.path, "predict", silent)
    asked = run.request()
    asked = replace(asked, inputs={inputs.TRAIN: asked.inputs[inputs.TRAIN]})
    target = LocalTarget.__new__(LocalTarget)
    monkeypatch.setattr(target, "_folder", lambda _: run)
    target.renew(Plan(RunLocation(run.path, Path("python"), {}), (), asked))
    integrity.check(run.path, "predict", silent)
    with pytest.raises(UsageError, match="changed since run run was made"):
        integrity.check(run.path, "train", silent)


@pytest.mark.parametrize("use", ["after", "merge", "proof", "predict", integrity.ADAPTER])
@pytest.mark.parametrize("key", ["auto_mapping", "megatron_config"])
def test_an_adapter_that_names_code_is_not_loaded(top: Path, use: str, key: str) -> None:
    """Sealed as it is: so a host can send it."""
    run = top / "runs" / "run"
    file = run / "output" / "adapter_config.json"
    write(file, json.dumps({"peft_type": "LORA", key: {"x": 1}, "megatron_core": "antigravity"}))
    seals.seal(run, "train", ("output",))
    told = refused(lambda: integrity.check(run, use, silent), file)
    assert f"{key} is set, which names code" in told


@pytest.mark.parametrize("key", ["ref_model_adapters", "reward_model_adapters", "reward_model"])
def test_no_other_adapter_that_names_code_is_loaded(top: Path, key: str) -> None:
    run = top / "runs" / "run"
    file = top / "other" / "adapter_config.json"
    write(file, json.dumps({"peft_type": "LORA", "auto_mapping": {"x": 1}}))
    config = yaml.safe_load((run / "config.yaml").read_text()) | {key: str(file.parent)}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    seals.seal(run, "create", seals.REQUEST)
    told = refused(lambda: integrity.check(run, "train", silent), file)
    assert "auto_mapping is set, which names code" in told
