"""What a second pull does with what the first one brought, and with what was made here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from event_rows import event_rows
from tunesmith.core.callbacks import unseen
from tunesmith.core.errors import UsageError
from tunesmith.core.files import read_json, write_json
from tunesmith.hosts import transfer
from tunesmith.job.merge import offline
from tunesmith.job.run.codec import encode
from tunesmith.job.run.events import mend_events
from tunesmith.job.run.folder import COPY_FILE, RunFolder, acquire
from tunesmith.job.run.manifest import PARTS, USUAL, disown_merged, manifest
from tunesmith.job.run.replies import Manifest
from tunesmith.job.run.schema import RunStatus
from tunesmith.targets.host import HostTarget

pytestmark = pytest.mark.unit

FILES = {
    "run.json": "{}",
    "status.json": '{"state": "succeeded", "phase": "train", "phases": {"train": "succeeded"}}',
    "events.jsonl": '{"event": "run_started", "phases": ["train"], "time": 1}\n',
    "train.log": "log",
    "report.html": "page",
    "proof.json": "{}",
    "output/adapter_model.safetensors": "adapter",
    "bundle/bundle.json": "{}",
    "merged/model.safetensors": "merged there",
    "merged/MANIFEST.json": "{}",
    "predict/generated_predictions.jsonl": "{}",
    "export/model.gguf": "gguf",
}
BY_PART = {
    "adapter": {"output/adapter_model.safetensors", "bundle/bundle.json"},
    "merged": {"merged/model.safetensors", "merged/MANIFEST.json"},
    "log": {"train.log"},
    "report": set(),  # it is made here
    "predict": {"predict/generated_predictions.jsonl"},
    "export": {"export/model.gguf"},
}
RECORD = {"run.json", "status.json", "events.jsonl", "proof.json"}
# Of these the run has its own, and the host's are kept beside.
ADOPTED = {"run.json", "status.json"}


class Host(HostTarget):
    """A folder of this machine in the place of a host."""

    def __init__(self, there: Path, here: Path) -> None:
        self.name = "gpu1"
        self.said: list[str] = []
        self.there = there
        self._tell = self.said.append
        self._bar = unseen
        self._remote: Any = None
        self._project: Any = SimpleNamespace(home=here, runs=here / "runs")
        self.layout: Any = SimpleNamespace(runs=there)

    def status(self, run_id: str) -> RunStatus:
        return RunStatus(state="succeeded")

    def _manifest(self, run_id: str, parts: Sequence[str]) -> Manifest:
        return manifest(RunFolder(self.there / run_id), parts, lambda *_: None)

    def write(self, name: str, text: str) -> None:
        """Write a file of the run there, replacing it as everything there does."""
        file = self.there / "r" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        file.write_text(text)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """A host with a run `r` of every part."""

    def download(_: Any, folder: str, names: Iterable[str], into: Path, *__: Any) -> None:
        for name in names:
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(folder) / name, into / name)

    monkeypatch.setattr(transfer, "download", download)
    made = Host(tmp_path / "there", tmp_path / "here")
    for name, text in FILES.items():
        made.write(name, text)
    return made


def names(folder: Path) -> set[str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    found = {path.relative_to(folder).as_posix() for path in files} - {COPY_FILE}
    aside = {name for name in found if name.startswith("host/")}
    assert aside == {f"host/{name}" for name in ADOPTED}
    return found - aside


def merge_here(folder: Path) -> None:
    """Do to a pulled run what a merge does to it."""
    disown_merged(folder)
    (folder / "proof.json").unlink(missing_ok=True)
    shutil.rmtree(folder / "merged", ignore_errors=True)
    (folder / "merged").mkdir()
    (folder / "merged/model-00001-of-00002.safetensors").write_text("merged here")


@pytest.mark.parametrize("second", PARTS)
@pytest.mark.parametrize("first", PARTS)
def test_what_was_pulled_before_stays(host: Host, first: str, second: str) -> None:
    host.pull("r", [first])
    folder = host.pull("r", [second])
    expected = RECORD | BY_PART[first] | BY_PART[second]
    assert names(folder) == expected
    assert read_json(folder / COPY_FILE)["files"].keys() == expected
    for name in expected:
        kept = folder / "host" / name if name in ADOPTED else folder / name
        assert kept.read_text() == FILES[name]


def test_what_the_host_has_anew_is_told_and_what_it_lost_goes_when_asked_for(host: Host) -> None:
    host.pull("r", PARTS)
    host.write("merged/model.safetensors", "merged again")
    (host.there / "r/bundle/bundle.json").unlink()
    host.said.clear()
    folder = host.pull("r", ["adapter"])
    assert host.said == [
        "merged: stays as it was pulled before, gpu1 has another now: "
        "`inv pull --on gpu1 --run r --what merged` brings it"
    ]
    assert (folder / "merged/model.safetensors").read_text() == "merged there"
    assert not (folder / "bundle").exists()
    folder = host.pull("r", ["merged"])
    assert (folder / "merged/model.safetensors").read_text() == "merged again"


def test_a_model_merged_here_stays_without_the_proof_of_the_other(host: Host) -> None:
    folder = host.pull("r", PARTS)
    merge_here(folder)
    for what in ("adapter", "log"):
        host.pull("r", [what])
        assert (folder / "merged/model-00001-of-00002.safetensors").read_text() == "merged here"
        assert names(folder) >= BY_PART["adapter"] | BY_PART["export"]
        assert not names(folder) & {"proof.json", *BY_PART["merged"]}
    (folder / "proof.json").write_text("of ours")
    host.pull("r", ["log"])
    assert (folder / "proof.json").read_text() == "of ours"


def test_the_hosts_merged_model_replaces_the_one_made_here(host: Host) -> None:
    folder = host.pull("r", ["adapter"])
    merge_here(folder)
    host.pull("r", ["merged"])
    assert names(folder) == RECORD | BY_PART["adapter"] | BY_PART["merged"]


def work_here(folder: Path, *phases: str, state: str = "succeeded") -> None:
    """Write what a supervisor writes of phases done with a pulled run; the last ends in `state`."""
    run = RunFolder(folder)
    run.emit("run_started", phases=phases)
    status = encode(run.status())
    for phase in phases:
        ended = state if phase == phases[-1] else "succeeded"
        run.emit("phase_ended", phase=phase, state=ended)
        status |= {"state": ended, "phase": phase, "failure": None, "message": f"of {phase}"}
        status["phases"][phase] = ended
    write_json(run.status_file, status)
    with run.log_file.open("a") as log:
        log.write(f"log of {phases[-1]} here\n")


def more_there(host: Host, *phases: str, state: str = "succeeded") -> None:
    """Let the host do more with the run."""
    run = RunFolder(host.there / "r")
    events, log = run.events_file.read_text(), run.log_file.read_text()
    more = [{"event": "run_started", "phases": phases, "time": 2}]
    more += [{"event": "phase_ended", "phase": phase, "state": state} for phase in phases]
    host.write("events.jsonl", events + "".join(f"{json.dumps(event)}\n" for event in more))
    host.write("train.log", f"{log}more there\n")
    status = encode(run.status())
    status["phases"] |= dict.fromkeys(phases, state)
    host.write("status.json", json.dumps(status | {"state": state, "step": 9}))


def calls(folder: Path) -> list[list[str]]:
    events = event_rows(folder / "events.jsonl")
    return [event["phases"] for event in events if event["event"] == "run_started"]


def without_results(host: Host, *folders: str) -> None:
    """Let the host have trained the run, and no more."""
    for name in folders:
        shutil.rmtree(host.there / "r" / name)
    (host.there / "r/proof.json").unlink()


def test_the_record_of_a_merge_here_stays(host: Host) -> None:
    without_results(host, "merged", "export", "predict")
    folder = host.pull("r", USUAL)
    merge_here(folder)
    work_here(folder, "merge", "proof")
    (folder / "proof.json").write_text("of ours")
    for _ in range(2):
        host.said.clear()
        host.pull("r", PARTS)
        assert host.said[-1] == "merge, proof: done here, stays"
        assert RunFolder(folder).status().phases == dict.fromkeys(
            ("train", "merge", "proof"), "succeeded"
        )
        assert calls(folder) == [["train"], ["merge", "proof"]]
        assert (folder / "train.log").read_text() == "loglog of proof here\n"
        assert (folder / "proof.json").read_text() == "of ours"
    # What the host has done since comes, before what was done here.
    more_there(host, "train")
    work_here(folder, "predict")
    host.pull("r", ["log", "report"])
    host.pull("r", PARTS)
    assert RunFolder(folder).status().step == 9
    assert calls(folder) == [["train"], ["train"], ["merge", "proof"], ["predict"]]
    assert (folder / "train.log").read_text() == (
        "logmore there\nlog of proof here\nlog of predict here\n"
    )


def test_the_host_has_the_word_for_what_comes_from_it(host: Host) -> None:
    without_results(host, "merged", "export", "predict")
    folder = host.pull("r", PARTS)
    merge_here(folder)
    work_here(folder, "merge", "proof", state="failed")
    work_here(folder, "predict")
    (folder / "proof.json").write_text("of ours")
    host.write("merged/model.safetensors", "merged there")
    more_there(host, "merge")
    # The merged model here is ours, and so is the word for it.
    host.pull("r", ["log"])
    phases = RunFolder(folder).status().phases
    assert (phases["merge"], phases["proof"]) == ("succeeded", "failed")
    host.said.clear()
    host.pull("r", PARTS)
    assert RunFolder(folder).status().phases == dict.fromkeys(
        ("train", "merge", "predict"), "succeeded"
    )
    assert calls(folder) == [["train"], ["merge"], ["predict"]]
    assert not (folder / "proof.json").exists()
    assert host.said[-2:] == [
        "predict: done here, stays",
        "merged: gpu1's has taken the place of what was made here",
    ]


def test_a_proof_of_the_hosts_model_is_none_of_the_one_made_here(host: Host) -> None:
    more_there(host, "merge", "proof")
    folder = host.pull("r", USUAL)
    merge_here(folder)
    RunFolder(folder).emit("run_started", phases=["merge"])
    offline.record_merge(RunFolder(folder))
    host.pull("r", USUAL)
    assert "proof" not in RunFolder(folder).status().phases
    assert RunFolder(folder).status().phases["merge"] == "succeeded"


def test_a_failure_here_is_told_until_the_host_has_one(host: Host) -> None:
    without_results(host, "merged", "export")
    folder = host.pull("r", USUAL)
    work_here(folder, "merge", state="failed")
    host.pull("r", PARTS)
    status = encode(RunFolder(folder).status())
    assert (status["state"], status["message"]) == ("failed", "of merge")
    # One that was killed has no state to stay in.
    status["phases"]["merge"] = "running"
    write_json(folder / "status.json", status | {"state": "running"})
    host.pull("r", PARTS)
    assert RunFolder(folder).status().phases == {"train": "succeeded"}
    assert RunFolder(folder).status().state == "succeeded"


def test_a_failure_there_is_over_when_the_phase_was_done_here(host: Host) -> None:
    status = json.loads(FILES["status.json"])
    status["phases"] |= {"merge": "failed"}
    host.write("status.json", json.dumps(status | {"state": "failed", "phase": "merge"}))
    without_results(host, "merged", "export")
    folder = host.pull("r", USUAL)
    assert RunFolder(folder).status().state == "failed"
    work_here(folder, "merge", "proof")
    host.pull("r", PARTS)
    assert RunFolder(folder).status().state == "succeeded"
    # One in the training is not.
    host.write("status.json", json.dumps(status | {"state": "failed", "phase": "train"}))
    host.pull("r", PARTS)
    assert RunFolder(folder).status().state == "failed"


def test_a_line_torn_there_and_cut_off_here_costs_nothing(host: Host) -> None:
    whole = FILES["events.jsonl"]
    host.write("events.jsonl", f'{whole}{{"event": "phase_end')
    folder = host.pull("r", USUAL)
    mend_events(folder / "events.jsonl")
    work_here(folder, "merge")
    mend_events(host.there / "r/events.jsonl")
    more_there(host, "train")
    host.pull("r", USUAL)
    assert calls(folder) == [["train"], ["train"], ["merge"]]


def test_another_run_of_the_name_has_no_record_of_what_was_done_here(host: Host) -> None:
    folder = host.pull("r", USUAL)
    work_here(folder, "predict")
    again = '{"event": "run_started", "phases": ["train"], "time": 3}\n'
    host.write("events.jsonl", again)
    host.pull("r", USUAL)
    assert (folder / "events.jsonl").read_text() == again
    assert RunFolder(folder).status().phases == {"train": "succeeded"}


def test_a_copy_that_nobody_works_in_is_the_hosts_however_it_grew(host: Host) -> None:
    folder = host.results("r")
    # It was worked on: more came than the list had said.
    with (folder / "events.jsonl").open("a") as events:
        events.write('{"event": "log", "step": 1}\n')
    host.write("events.jsonl", (folder / "events.jsonl").read_text())
    host.results("r")
    assert (folder / "events.jsonl").read_text().count('"log"') == 1


def test_nothing_is_pulled_over_a_run_that_is_worked_on_here(host: Host) -> None:
    folder = host.pull("r", ["adapter"])
    lock = acquire(RunFolder(folder))
    with pytest.raises(UsageError, match="being worked on here"):
        host.pull("r", ["log"])
    lock.release()
    host.pull("r", ["log"])
