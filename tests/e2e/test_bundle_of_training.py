"""What a training makes for the merge: the same model with it and without it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from jobs import Job
from tunesmith.core.files import read_json, sha256_of, write_json

pytestmark = pytest.mark.e2e

KEYS = {"export_size": 5, "export_device": "cpu", "infer_dtype": "bfloat16"}


def make(job: Job, model: Path, data: Path, **config: Any) -> None:
    job.make(model, data, max_steps=4, **config)
    files = {
        file.name: {"size": file.stat().st_size, "sha256": sha256_of(file)}
        for file in model.iterdir()
    }
    request = read_json(job.folder.request_file)
    request |= {"merge": KEYS, "model": {"name": "tiny", "files": files}}
    write_json(job.folder.request_file, request)


def train(job: Job) -> dict[str, Any]:
    """Train to the end; return the summary."""
    job.call("start")
    job.wait_for_end("succeeded")
    return job.events("summary")[-1]


def module(job: Job, *argv: str | Path) -> None:
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [job.python, "-m", *argv], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def merge(job: Job) -> dict[str, str]:
    """Merge; return the sha256 of every file of the merged model."""
    module(job, "tunesmith.job.supervisor.worker", job.folder.path, "merge")
    merged = job.folder.path / "merged"
    return {file.name: sha256_of(file) for file in merged.iterdir()}


def hashes(folder: Path) -> dict[str, str]:
    return {file.name: sha256_of(file) for file in folder.iterdir()}


@pytest.mark.parametrize("preset", ["none", "fast"])
def test_a_merge_with_it_is_the_merge_without_it(
    job: Job, tiny_model: Path, data: Path, preset: str
) -> None:
    make(job, tiny_model, data, preset=preset)
    summary = train(job)
    bundle, run = job.folder.path / "bundle", job.folder.path
    assert 0 < summary["bundle_seconds"] < 60
    assert not job.events("note")
    made = hashes(bundle)
    assert "Modelfile" in made
    # LLaMA-Factory was not asked again: it would have told its versions.
    (run / "versions.json").unlink()
    with_it = merge(job)
    assert not (run / "versions.json").exists()
    assert hashes(bundle) == made
    parity = read_json(run / "parity.json")
    shutil.rmtree(bundle)
    without_it = merge(job)
    assert (run / "versions.json").exists()
    assert with_it == without_it
    assert read_json(run / "parity.json") == parity
    # Made by a process of its own, as for a merge elsewhere, it is the same.
    module(job, "tunesmith.job.merge.bundle", "--run", run)
    assert hashes(bundle) == made


def test_a_bundle_that_cannot_be_made_costs_no_training(
    job: Job, tiny_model: Path, data: Path
) -> None:
    make(job, tiny_model, data)
    (job.folder.path / "bundle").write_text("a file where the bundle's folder goes")
    summary = train(job)
    assert summary["bundle_seconds"] is None
    assert summary["files"]["adapter_model.safetensors"]["sha256"] == job.adapter()
    (note,) = job.events("note")
    assert "NotADirectoryError" in note["text"]
    assert not list(job.folder.path.glob(".bundle.part"))
    assert "model.safetensors" in merge(job)


def test_a_base_that_changed_after_the_training_is_refused(
    job: Job, tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "base of its own")
    make(job, model, data)
    train(job)
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(AssertionError, match="expected sha256"):
        merge(job)
    assert job.events("failure")[-1]["failure"] == "config"
    assert not (job.folder.path / "merged").exists()
    assert not (job.folder.path / ".merged.part").exists()
