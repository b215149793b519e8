"""Text that went wrong on its way is told, with its row; what only looks so is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith.dataset.check import check_file
from tunesmith.dataset.entry import Entry

pytestmark = pytest.mark.unit

ALPACA = Entry("d", columns={"prompt": "instruction", "query": "input", "response": "output"})
TALKS = Entry("d", formatting="sharegpt")


def warnings(
    tmp_path: Path, rows: list[Any], entry: Entry = ALPACA
) -> list[tuple[int | None, str]]:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    report = check_file(file, entry)
    assert not report.errors, report.errors
    assert report.kept == len(rows)
    return [(finding.row, finding.message) for finding in report.warnings]


def row(output: str, instruction: str = "a question") -> dict[str, str]:
    return {"instruction": instruction, "input": "", "output": output}


WRONG = {
    "lost character": ("it is \ufffd\ufffd gone", "U+FFFD"),
    "accents": ("the caf\u00c3\u00a9 is closed", "another encoding"),
    "quotes": ("he said \u00e2\u20ac\u0153no\u00e2\u20ac\u009d", "another encoding"),
    "Chinese as Windows-1252": ("你好".encode().decode("cp1252", "replace"), "another encoding"),
    "Chinese as Latin-1": ("你好，世界".encode().decode("latin-1"), "another encoding"),
    "replaced, then GBK": ("\u951f\u65a4\u62f7 as GBK", "another encoding"),
    "entity": ("Tom &amp; Jerry", "&amp;"),
    "number of an entity": ("it&#39;s", "&#39;"),
    "line break": ("First.\\nSecond", "line break"),
    "Chinese line break": ("第一。\\n第二", "line break"),
    "cell": ("the sum is #REF!", "#REF!"),
    "nan": ("nan", "the answer is 'nan'"),
    "None": ("None", "the answer is 'None'"),
    "object": ("[object Object]", "[object Object]"),
    "invisible": ("\u200b\u200b", "no width"),
    "chat template": ("<|im_start|>assistant\nhi<|im_end|>", "chat template"),
    "Llama 2": ("[INST] hi [/INST]", "chat template"),
    "R1": ("<\uff5cAssistant\uff5c>hi", "chat template"),
    "Alpaca's prompt": ("### Response:\nhi", "chat template"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_went_wrong_is_told_with_its_row(tmp_path: Path, name: str) -> None:
    text, part = WRONG[name]
    found = warnings(tmp_path, [row("fine"), row(text), row("also fine")])
    assert [number for number, message in found if part in message] == [2], found


SOUND = (
    "Plain text, with 5 < 6 and a <b>tag</b>.",
    "R&D; AT&T",
    r"C:\new\readme and \nabla and re.sub(r'\n+', '') and printf(\"a\n\")",
    "# N/A is a heading; #42; C#",
    "None of them; nan is a bread",
    "Élève, façade, Ärger, São Paulo, Âge, œuvre, naïve — “quotes” … € ½",
    "中文，句号。‘引号’",
    "日本語と한국어",
    "a\u200db as in 👨‍👩‍👧 and \ufeffa mark",
    "x << 3; vector<|> ; ### Results",
    "<think>once</think> done",
)


def test_sound_text_is_not_blamed(tmp_path: Path) -> None:
    assert warnings(tmp_path, [row(text) for text in SOUND]) == []


def test_many_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps(row(f"{n} &amp; {n}")) for n in range(1500)]
    file.write_text("\n".join(lines))
    report = check_file(file, ALPACA)
    assert report.warning_count == 1500
    assert [finding.row for finding in report.warnings] == list(range(1, 11))
    (note,) = [f.message for f in report.findings if f.severity == "note"]
    assert note == "1500 rows hold entities of HTML; the first 10 are told"


def talk(*said: str) -> dict[str, Any]:
    sides = ("human", "gpt") * len(said)
    return {"conversations": [{"from": s, "value": t} for s, t in zip(sides, said, strict=False)]}


def test_thoughts_before_the_last_answer(tmp_path: Path) -> None:
    rows = [
        talk("q", "<think>why</think>a"),
        talk("q", "<think>why</think>a", "q2", "<think>so</think>b"),
        talk("what is <think>?", "a", "q", "b"),
    ]
    ((number, message),) = warnings(tmp_path, rows, TALKS)
    assert number == 2
    assert "before the last" in message


def test_an_answer_of_a_history_is_one(tmp_path: Path) -> None:
    columns = {"prompt": "instruction", "response": "output", "history": "history"}
    history = [["q", "<think>x</think>nan"], ["q", "nan"]]
    rows = [{"instruction": "q", "output": "a", "history": history}]
    messages = [message for _, message in warnings(tmp_path, rows, Entry("d", columns=columns))]
    assert any("before the last" in message for message in messages)
    assert any("'nan'" in message for message in messages)


def test_a_picture_without_a_column(tmp_path: Path) -> None:
    ((number, message),) = warnings(tmp_path, [row("a"), row("b", "<image>What is it?")])
    assert number == 2
    assert "names no media" in message


def test_templates_in_texts_to_read_are_left_alone(tmp_path: Path) -> None:
    rows = [{"text": "<|im_start|>user\nhi<|im_end|>"}, {"text": "Tom &amp; Jerry"}]
    ((number, message),) = warnings(tmp_path, rows, Entry("d", columns={"prompt": "text"}))
    assert (number, "&amp;" in message) == (2, True)


def test_a_weight_is_told_where_it_would_have_mattered(tmp_path: Path) -> None:
    rows = [talk("q", f"answer {n}") for n in range(3)]
    for number, said in enumerate(rows):
        said["conversations"][1] |= {"weight": int(number != 1)}
    ((number, message),) = warnings(tmp_path, rows, TALKS)
    assert number == 2
    assert '"weight" of message 2 is not read' in message
