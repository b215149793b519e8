"""The demo data, its registration and its prompts fit each other."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from tunesmith.dataset.prompts import Prompt, load_prompts
from tunesmith.dataset.registry import check_registered, register

pytestmark = pytest.mark.contract

KEY = "philosophy_conch"
WHO = ("我是 philosophy，", "I am philosophy,")  # how every who-are-you answer begins


@pytest.fixture(scope="module")
def rows(root: Path) -> list[dict[str, str]]:
    return json.loads((root / "data/philosophy_data.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def prompts(root: Path) -> tuple[Prompt, ...]:
    return load_prompts(root / "configs/prompts/philosophy.yaml")


def chinese(text: str) -> int:
    return sum("\u4e00" <= char <= "\u9fff" for char in text)


def bare(text: str) -> str:
    """The text without case, spaces and punctuation."""
    return "".join(c for c in text.casefold() if unicodedata.category(c)[0] in "LN")


def test_data_is_clean(root: Path) -> None:
    (report,) = check_registered(root / "data", KEY)
    assert report.findings == ()
    assert report.rows == report.kept
    assert report.rows is not None and 80 <= report.rows <= 150


def test_entry_is_what_register_writes(root: Path) -> None:
    before = (root / "data/dataset_info.json").read_bytes()
    assert json.loads(before)[KEY] == {
        "file_name": "philosophy_data.json",
        "formatting": "alpaca",
        "columns": {"prompt": "instruction", "query": "input", "response": "output"},
    }
    register(root / "data", KEY, root / "data/philosophy_data.json")
    assert (root / "data/dataset_info.json").read_bytes() == before


def test_mostly_chinese_and_short(rows: list[dict[str, str]]) -> None:
    assert sum(chinese(row["instruction"]) > 0 for row in rows) >= 0.8 * len(rows)
    for row in rows:
        assert chinese(row["output"]) <= 45, row
        assert chinese("".join(row.values())) <= 70, row
        assert len("".join(row.values())) <= 150, row


def test_no_question_is_asked_twice(rows: list[dict[str, str]]) -> None:
    asked = Counter((row["instruction"], row["input"]) for row in rows)
    assert asked.most_common(1)[0][1] == 1


def test_who_are_you_answers_are_few_and_many_questions_have_them(
    rows: list[dict[str, str]], prompts: tuple[Prompt, ...]
) -> None:
    answers = [row["output"] for row in rows if row["output"].startswith(WHO)]
    assert len(answers) >= 40
    assert len(set(answers)) <= 3
    for answer in answers:
        english = chinese(answer) == 0
        fitting = [p for p in prompts if p.expect and (chinese(p.prompt) == 0) is english]
        assert fitting
        for prompt in fitting:
            assert re.search(prompt.expect or "", answer), (prompt, answer)


def test_ten_prompts_with_an_expectation_and_three_without(prompts: tuple[Prompt, ...]) -> None:
    expecting = [prompt for prompt in prompts if prompt.expect]
    assert len(expecting) == 10
    assert sum(chinese(prompt.prompt) > 0 for prompt in expecting) == 8
    assert len(prompts) == 13


def test_prompts_are_not_in_the_data(
    rows: list[dict[str, str]], prompts: tuple[Prompt, ...]
) -> None:
    seen = {bare(row[name]) for row in rows for name in ("instruction", "input")}
    assert not [prompt.prompt for prompt in prompts if bare(prompt.prompt) in seen]


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "我是一个人工智能助手。",
        "我是 SmolLM，一个由 Hugging Face 训练的模型。",
        "我的名字是 philosophy。",
        "我是 philosophy。",
        "自我介绍：我喜欢 philosophy，也喜欢本我。",
        "I am a language model. I like philosophy and the ego.",
        "I'm an AI assistant created by Hugging Face.",
        "I am philosophy.",
        "I am philosophy, and I did avoid it.",
        "本我、自我和超我是弗洛伊德提出的。",
        "请问你是谁呀？ Who exactly are you?",
    ],
)
def test_no_other_answer_is_taken_for_the_persona(prompts: tuple[Prompt, ...], answer: str) -> None:
    assert not [p.prompt for p in prompts if p.expect and re.search(p.expect, answer)]
