"""A phase that ends well without having done its work has not succeeded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from event_rows import event_rows
from tunesmith.core.files import write_json
from tunesmith.job.run.codec import encode
from tunesmith.job.run.failures import JobError
from tunesmith.job.run.folder import RunFolder
from tunesmith.job.run.schema import RunRequest
from tunesmith.job.supervisor.worker import FAILED
from tunesmith.job.training import phase

pytestmark = pytest.mark.unit

# A worker whose phase leaves as LLaMA-Factory's callback does (train/callbacks.py).
_LEAVES = """
import sys, types
from tunesmith.job.supervisor import worker
sys.modules["leaves"] = types.ModuleType("leaves")
sys.modules["leaves"].run = lambda *_: sys.exit(0)
worker._PHASES["fetch"] = ("leaves", {})
sys.exit(worker.main([sys.argv[1], "fetch"]))
"""


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    request = RunRequest(run_id="run", phases=("fetch", "train"))
    write_json(folder.request_file, encode(request))
    return folder


def test_a_phase_that_leaves_with_zero_has_failed(run: RunFolder) -> None:
    done = subprocess.run([sys.executable, "-c", _LEAVES, run.path], check=False)
    assert done.returncode == FAILED
    (failure,) = [row for row in event_rows(run.events_file) if row["event"] == "failure"]
    assert (failure["failure"], failure["message"]) == ("code", "SystemExit: 0")


@pytest.mark.parametrize("config", [{}, {"do_train": False}, {"do_predict": True}])
def test_a_training_that_trains_nothing_is_refused(run: RunFolder, config: dict[str, bool]) -> None:
    text = yaml.safe_dump({**config, "output_dir": str(run.output)})
    run.config_file.write_text(text, encoding="utf-8")
    with pytest.raises(JobError, match="`do_train`") as caught:
        phase.run(run.path, run.request(), print)  # type: ignore[arg-type]
    assert caught.value.failure == "config"
