"""How a training starts: with what it needs and no more, on rows that are the data's.

What is left out and what is found again must not be seen in the result: the adapter is that of
`llamafactory-cli train`, byte for byte. How rows are read: tests/training/test_rows.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import STANDINS, Job
from tunesmith.core.files import read_json, sha256_of

pytestmark = pytest.mark.e2e


# For three steps: no checkpoint between.
SHORT: dict[str, Any] = {"max_steps": 3, "save_steps": 100}


def trained(job: Job, model: Path, data: Path, env: dict[str, str], **config: Any) -> Job:
    """Train to a good end."""
    job.make(model, data, env=env, **SHORT, **config)
    job.call("start")
    job.wait_for_end("succeeded")
    return job


def test_a_job_loads_less_and_trains_the_same(
    tmp_path: Path, job: Job, training_python: Path, tiny_model: Path, data: Path
) -> None:
    env = {"HF_HOME": str(tmp_path / "hub")}
    trained(job, tiny_model, data, env, standin=STANDINS / "names_modules.py")
    log = job.folder.log_file.read_text(errors="replace")
    loaded = set(re.findall(r"(?m)^module: (\S+)$", log))
    assert {"torch", "peft", "llamafactory.train.sft.workflow"} <= loaded
    left_out = {"bitsandbytes", "sklearn", "nltk", "llamafactory.train.dpo.trainer"}
    assert not left_out & loaded

    output = tmp_path / "theirs"
    config = yaml.safe_load(job.folder.config_file.read_text()) | {"output_dir": str(output)}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    argv = [training_python.with_name("llamafactory-cli"), "train", file]
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(argv, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sha256_of(output / "adapter_model.safetensors") == job.adapter()


def test_rows_are_found_again_and_changed_rows_never_missed(
    tmp_path: Path, training_python: Path, tiny_model: Path, data: Path
) -> None:
    env = {"HF_HOME": str(tmp_path / "hub")}
    rows = read_json(data / "rows.json")
    assert len(rows[0]["output"]) > 1

    def run(name: str, content: Any) -> Job:
        folder = tmp_path / f"data of {name}"
        folder.mkdir(exist_ok=True)
        (folder / "rows.json").write_text(json.dumps(content))
        # The time of change says nothing: an archive unpacked, a file synchronised.
        os.utime(folder / "rows.json", (1_000_000, 1_000_000))
        (folder / "dataset_info.json").write_text((data / "dataset_info.json").read_text())
        made = Job(training_python, tmp_path / "runs" / f"{name}-{len(content[0]['output'])}")
        made.folder.path.parent.mkdir(exist_ok=True)
        return trained(made, tiny_model, folder, env, overwrite_cache=True)

    def prepared() -> set[Path]:
        return set((tmp_path / "hub" / "datasets").rglob("cache-*.arrow"))

    first = run("one", rows)
    there = prepared()
    assert there
    assert [event["to"] for event in first.events("changed")] == [False]

    # Elsewhere, in another run: nothing is prepared anew.
    assert run("two", rows).losses() == first.losses()
    assert prepared() == there

    # In the same place, of the same size and time: other rows are other rows.
    changed = [row | {"output": row["output"][::-1]} for row in rows]
    changed[0]["output"] += " "
    assert run("one", changed).losses() != first.losses()
    assert prepared() > there
