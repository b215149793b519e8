"""What a second pull does with what the first one brought, and with what was made here."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tunesmith.errors import UsageError
from tunesmith.files import read_json
from tunesmith.hosts import transfer
from tunesmith.job.pulled import PARTS, disown_merged, manifest
from tunesmith.job.rundir import COPY_FILE, RunFolder, acquire
from tunesmith.targets.host import HostTarget

pytestmark = pytest.mark.unit

FILES = {
    "run.json": "{}",
    "status.json": '{"state": "succeeded"}',
    "train.log": "log",
    "report.html": "page",
    "proof.json": "{}",
    "output/adapter_model.safetensors": "adapter",
    "around/kit.json": "{}",
    "merged/model.safetensors": "merged there",
    "merged/MANIFEST.json": "{}",
    "predict/generated_predictions.jsonl": "{}",
    "export/model.gguf": "gguf",
}
BY_PART = {
    "adapter": {"output/adapter_model.safetensors", "around/kit.json"},
    "merged": {"merged/model.safetensors", "merged/MANIFEST.json"},
    "log": {"train.log"},
    "report": {"report.html"},
    "predict": {"predict/generated_predictions.jsonl"},
    "export": {"export/model.gguf"},
}
RECORD = {"run.json", "status.json", "proof.json"}


class Host(HostTarget):
    """A folder of this machine in the place of a host."""

    def __init__(self, there: Path, here: Path) -> None:
        self.name = "gpu1"
        self.said: list[str] = []
        self.there = there
        self._tell = self.said.append
        self._remote: Any = None
        self._project: Any = SimpleNamespace(home=here, runs=here / "runs")
        self.layout: Any = SimpleNamespace(runs=there)

    def status(self, run_id: str) -> dict[str, Any]:
        return {"state": "succeeded"}

    def _manifest(self, run_id: str, parts: Sequence[str]) -> dict[str, dict[str, Any]]:
        run = RunFolder(self.there / run_id)
        return dict(manifest(run, parts, lambda *_: None)["files"])

    def write(self, name: str, text: str) -> None:
        """Write a file of the run there, replacing it as everything there does."""
        file = self.there / "r" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        file.write_text(text)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """A host with a run `r` of every part."""

    def download(_: Any, folder: str, names: Iterable[str], into: Path, __: Any) -> None:
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
    return {path.relative_to(folder).as_posix() for path in files} - {COPY_FILE}


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
        assert (folder / name).read_text() == FILES[name]


def test_what_the_host_has_anew_is_told_and_what_it_lost_goes_when_asked_for(host: Host) -> None:
    host.pull("r", PARTS)
    host.write("merged/model.safetensors", "merged again")
    (host.there / "r/around/kit.json").unlink()
    host.said.clear()
    folder = host.pull("r", ["adapter"])
    assert host.said == [
        "merged: stays as it was pulled before, gpu1 has another now: "
        "`inv pull --on gpu1 --run r --what merged` brings it"
    ]
    assert (folder / "merged/model.safetensors").read_text() == "merged there"
    assert not (folder / "around").exists()
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


def test_nothing_is_pulled_over_a_run_that_is_worked_on_here(host: Host) -> None:
    folder = host.pull("r", ["adapter"])
    lock = acquire(RunFolder(folder))
    with pytest.raises(UsageError, match="being worked on here"):
        host.pull("r", ["log"])
    lock.release()
    host.pull("r", ["log"])
