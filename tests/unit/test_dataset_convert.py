"""Files of other tools become rows that the check finds nothing wrong with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith.core.errors import UsageError
from tunesmith.dataset.convert import convert, write
from tunesmith.dataset.registry import check_unregistered

CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def node(role: str, *parts: Any, parent: str | None, kind: str = "text") -> dict[str, Any]:
    content = {"content_type": kind, "parts": list(parts)}
    return {"message": {"author": {"role": role}, "content": content}, "parent": parent}


def converted(tmp_path: Path, name: str, content: str | bytes) -> tuple[list[Any], dict[str, int]]:
    """Convert a file; return its rows, after the check has found no error, and the changes."""
    file = tmp_path / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    conversion = convert(file)
    made = write(file, conversion)
    report = check_unregistered(made)
    assert not report.errors, report.errors
    rows = [json.loads(line) for line in made.read_text("utf-8").splitlines()]
    assert rows == conversion.rows
    assert report.kept == len(rows)
    return rows, dict(conversion.changes)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gb18030"])
def test_cells_of_a_table_stay_what_they_are(tmp_path: Path, delimiter: str, encoding: str) -> None:
    lines = [
        ["instruction", "output"],
        ["How many?", "007"],
        ["Which country?", "NA"],
        ["哪里？", "1.0"],
        ["None?", "None"],
        [f'"a{delimiter}b\n""c"""', "null"],
    ]
    text = "\r\n".join(delimiter.join(line) for line in lines)
    rows, changes = converted(tmp_path, "t.csv", text.encode(encoding))
    assert [row["output"] for row in rows] == ["007", "NA", "1.0", "None", "null"]
    assert rows[4]["instruction"] == f'a{delimiter}b\n"c"'
    assert rows[2]["instruction"] == "哪里？"
    assert ("read as gb18030, written as UTF-8" in changes) == (encoding == "gb18030")


def test_rows_with_cells_too_many_are_named(tmp_path: Path) -> None:
    rows, changes = converted(tmp_path, "t.csv", "instruction,output\nq,a\nq2,a2,x\n")
    assert rows == [{"instruction": "q", "output": "a"}, {"instruction": "q2", "output": "a2"}]
    assert changes == {"rows with more or fewer cells than columns: 2": 1}


def test_openai(tmp_path: Path) -> None:
    first = {
        "messages": [
            said("system", "Be kind."),
            said(
                "user", [{"type": "text", "text": "Weather"}, {"type": "text", "text": "in Rome?"}]
            ),
            said("assistant", None, tool_calls=[CALL]),
            said("tool", "21", tool_call_id="1"),
            said("assistant", "21 degrees.", reasoning_content="Look."),
        ],
        "tools": [TOOL],
    }
    second = {
        "messages": [
            said("user", "2+2?"),
            said("assistant", "4"),
            said("user", "3+3?"),
            said("assistant", "7", weight=0),
            said("user", "No."),
            said("assistant", "6"),
        ]
    }
    third = {"messages": [said("assistant", "Hi!"), said("user", "a"), said("user", "b")]}
    third["messages"] += [said("assistant", "c"), said("user", "d")]
    content = "".join(json.dumps(row) + "\n" for row in (first, second, third))
    rows, changes = converted(tmp_path, "chat.jsonl", content)
    assert [turn["from"] for turn in rows[0]["conversations"]] == [
        "system",
        "human",
        "function_call",
        "observation",
        "gpt",
    ]
    assert rows[0]["conversations"][1]["value"] == "Weather\nin Rome?"
    call = json.loads(rows[0]["conversations"][2]["value"])
    assert call == [{"name": "weather", "arguments": {"city": "Rome"}}]
    assert rows[0]["conversations"][4]["value"] == "<think>\nLook.\n</think>\n\n21 degrees."
    assert json.loads(rows[0]["tools"]) == [TOOL]
    assert [turn["value"] for turn in rows[1]["conversations"]] == ["2+2?", "4"]
    assert [turn["value"] for turn in rows[2]["conversations"]] == ["a\n\nb", "c"]
    assert changes == {
        "turns from the first of weight 0 on were left out": 1,
        "a question without an answer at the end was left out": 2,
        "an answer before the first question was left out": 1,
        "messages of one side that follow one another were joined": 1,
    }


def test_chatgpt_takes_the_branch_that_was_shown(tmp_path: Path) -> None:
    document = {
        "title": "t",
        "current_node": "e",
        "mapping": {
            "root": {"message": None, "parent": None},
            "a": node("system", "", parent="root"),
            "b": node("user", "Q", parent="a"),
            "c": node("assistant", "left", parent="b"),
            "d": node("assistant", "print(1)", parent="b", kind="code"),
            "e": node("assistant", "A", {"asset_pointer": "x"}, parent="d", kind="multimodal_text"),
        },
    }
    rows, changes = converted(tmp_path, "conversations.json", json.dumps([document]))
    assert [turn["value"] for turn in rows[0]["conversations"]] == ["Q", "A"]
    assert changes == {
        "a turn of kind code was left out": 1,
        "a part of a message that is no text was left out": 1,
    }


def test_label_studio(tmp_path: Path) -> None:
    result = [{"type": "textarea", "value": {"text": ["The answer."]}}]
    tasks = [
        {"data": {"text": "Q"}, "annotations": [{"result": result}]},
        {"data": {"text": "R"}, "annotations": [{"result": result, "was_cancelled": True}]},
        {"data": {"image": "x.png"}, "annotations": [{"result": result}]},
    ]
    rows, changes = converted(tmp_path, "tasks.json", json.dumps(tasks))
    assert rows == [{"instruction": "Q", "input": "", "output": "The answer."}]
    assert sum(changes.values()) == 2


def test_pairs_of_conversations(tmp_path: Path) -> None:
    pairs = [
        {
            "chosen": [said("user", "Q"), said("assistant", "good")],
            "rejected": [said("user", "Q"), said("assistant", "bad")],
        },
        {
            "prompt": [said("user", "R")],
            "chosen": [said("assistant", "yes")],
            "rejected": [said("assistant", "no")],
        },
        {"chosen": [said("assistant", "alone")], "rejected": [said("assistant", "too")]},
    ]
    rows, changes = converted(tmp_path, "pairs.json", json.dumps(pairs))
    assert [row["chosen"]["value"] for row in rows] == ["good", "yes"]
    assert [row["rejected"]["value"] for row in rows] == ["bad", "no"]
    assert changes == {"a pair that is not one question with two answers was left out": 1}


def test_kto(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Q", "completion": "A", "label": True},
        {"prompt": "Q2", "completion": "B", "label": "false"},
        {"prompt": "Q3", "completion": "C", "label": 1},
        {"prompt": "Q4", "completion": "D", "label": 2},
        {"prompt": [said("user", "Q5")], "completion": [said("assistant", "E")], "label": True},
    ]
    made, changes = converted(tmp_path, "kto.jsonl", "\n".join(map(json.dumps, rows[:4])))
    assert [row["kto_tag"] for row in made] == [True, False, True]
    assert changes == {"a row whose label is 2 was left out": 1, "labels became true and false": 2}
    (talk,), _ = converted(tmp_path, "talk.json", json.dumps(rows[4:]))
    assert [turn["value"] for turn in talk["conversations"]] == ["Q5", "E"]
    assert talk["kto_tag"] is True


def test_labels_of_a_table(tmp_path: Path) -> None:
    table = "question,answer,label\nQ,A,TRUE\nQ2,B,FALSE\n"
    made, _ = converted(tmp_path, "kto.csv", table)
    assert [(row["output"], row["kto_tag"]) for row in made] == [("A", True), ("B", False)]
    classes, _ = converted(tmp_path, "classes.csv", "question,answer,label\nQ,A,1\n")
    assert classes == [{"question": "Q", "answer": "A", "label": "1"}]


def test_dialogues_as_text(tmp_path: Path) -> None:
    asked = "\n\nHuman: Q\n\nAssistant: A\n\nHuman: Q2\n\nAssistant:"
    pair = {"chosen": f"{asked} good", "rejected": f"{asked} bad"}
    (made,), _ = converted(tmp_path, "hh.json", json.dumps([pair]))
    assert [turn["value"] for turn in made["conversations"]] == ["Q", "A", "Q2"]
    assert (made["chosen"]["value"], made["rejected"]["value"]) == ("good", "bad")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xlsx", b"PK", "a spreadsheet"),
        ("a.docx", b"PK", "can be converted"),
        ("a.csv", b"only,a,head\n", "at least one row"),
        ("a.csv", b"a,a\n1,2\n", "column names"),
        ("a.json", b'[{"instruction": "q", "output": "a"}]', "not an export that is known"),
        ("a.json", b"[{", "the file ends"),
        ("a.json", b'[{"messages": [{"role": "user", "content": "q"}]}]', "no row can be made"),
    ],
)
def test_what_cannot_be_converted_is_told(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        convert(file)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_nothing_is_overwritten_unless_asked(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("instruction,output\nq,a\n")
    (tmp_path / "t.jsonl").write_text("mine")
    conversion = convert(file)
    with pytest.raises(UsageError, match="is there already"):
        write(file, conversion)
    assert (tmp_path / "t.jsonl").read_text() == "mine"
    assert write(file, conversion, replace=True).read_text() != "mine"
