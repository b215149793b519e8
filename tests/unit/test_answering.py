"""Which weights answer, and how their answers are drawn."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tunesmith.core.errors import UsageError
from tunesmith.job.evaluation import chat
from tunesmith.job.inference import engine
from tunesmith.job.inference.engine import Sampling
from tunesmith.job.run import config as run_config

pytestmark = pytest.mark.unit


def options(**change: Any) -> argparse.Namespace:
    values = {
        "run": None,
        "max_new_tokens": 32,
        "seed": 1,
        "greedy": False,
        "temperature": None,
        "top_p": None,
    }
    return argparse.Namespace(**(values | change))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder that ships DeepSeek-R1's sampling."""
    folder = tmp_path / "model"
    folder.mkdir()
    shipped = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "bos_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(shipped))
    return folder


def chosen(model: Path, **change: Any) -> Sampling:
    return chat.choose_sampling(options(**change), {"model_name_or_path": str(model)})


def test_a_model_answers_with_the_sampling_it_ships(model: Path) -> None:
    sampling = chosen(model)
    assert (sampling.do_sample, sampling.temperature, sampling.top_p) == (True, 0.6, 0.95)


def test_a_model_that_ships_none_gets_llama_factorys(tmp_path: Path) -> None:
    sampling = chosen(tmp_path)
    assert (sampling.do_sample, sampling.temperature, sampling.top_p) == (True, 0.95, 0.7)


def test_the_runs_config_goes_before_the_model_and_flags_before_both(
    model: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"temperature": 0.3, "top_p": 0.5}))
    sampling = chosen(model, run=tmp_path, top_p=0.8)
    assert (sampling.temperature, sampling.top_p) == (0.3, 0.8)


@pytest.mark.parametrize("change", [{"greedy": True}, {"temperature": 0.0}])
def test_greedy_and_temperature_zero_draw_nothing(model: Path, change: dict[str, Any]) -> None:
    assert chosen(model, **change) == Sampling(max_new_tokens=32, seed=1)


@pytest.mark.parametrize(
    "change",
    [
        {"greedy": True, "temperature": 0.5},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"max_new_tokens": 0},
    ],
)
def test_sampling_that_makes_no_sense_is_refused(model: Path, change: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        chosen(model, **change)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--run", "nowhere"], "not a run folder"),
        (["--model", "nowhere", "--template", "smollm"], "not a model folder"),
        (["--run", "{run}", "--what", "merged"], "inv merge --run run"),
        (["--run", "{run}", "--thinking"], "a run records its own"),
        (["--model", "{model}"], "--model needs --template"),
    ],
)
def test_chat_says_what_is_missing_and_ends_with_2(
    arguments: list[str], told: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = model.parent / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump({"output_dir": str(run / "output")}))
    (model / "config.json").write_text("{}")
    code = chat.main([text.format(run=run, model=model) for text in arguments])
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert told in captured.err


def test_training_continues_the_last_adapter_it_is_given() -> None:
    output = Path("/runs/x/output")
    assert run_config.tuned_adapters({}, output) == [str(output)]
    config: dict[str, Any] = {"adapter_name_or_path": "/a, /b"}
    assert run_config.starting_adapters(config) == ["/a", "/b"]
    assert run_config.tuned_adapters(config, output) == ["/a", str(output)]
    config["create_new_adapter"] = True
    assert run_config.tuned_adapters(config, output) == ["/a", "/b", str(output)]


class ByteTokenizer:
    """A stand-in: one token a byte, as byte-level tokenizers do with a rare character."""

    def decode(self, ids: list[int], **_: bool) -> str:
        return bytes(i for i in ids if i).decode("utf-8", "replace")


def test_a_character_cut_by_the_token_limit_is_left_out() -> None:
    whole = list("你好".encode())
    answer = engine.answer_of(ByteTokenizer(), whole[:-1], stop=[0])
    assert (answer.text, answer.tokens, answer.finished) == ("你", 5, False)
    assert engine.answer_of(ByteTokenizer(), [*whole, 0], stop=[0]).text == "你好"


def test_text_that_comes_in_pieces_has_no_torn_character() -> None:
    said: list[str] = []
    pieces = engine._Pieces(ByteTokenizer(), said.append)
    pieces.put(np.array([1]))
    for byte in "你好".encode()[:-1]:
        pieces.put(np.array([byte]))
    pieces.end()
    assert "".join(said) == "你"
