"""Every fault of a data file is found, placed, and told how to mend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tunesmith.core.errors import UsageError
from tunesmith.dataset.check import check_file
from tunesmith.dataset.entry import Entry
from tunesmith.dataset.report import DatasetReport

pytestmark = pytest.mark.unit

ALPACA = Entry("k", columns={"prompt": "instruction", "query": "input", "response": "output"})
DEFAULT = Entry("k")
SHAREGPT = Entry("k", formatting="sharegpt")
OPENAI = Entry(
    "k",
    formatting="sharegpt",
    columns={"messages": "messages"},
    tags={
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
    },
)
GOOD = '{"instruction": "q", "input": "", "output": "a"}'
OTHER = '{"instruction": "r", "input": "", "output": "b"}'


def row(**change: Any) -> str:
    value = {"instruction": "x", "input": "", "output": "y", **change}
    return json.dumps({k: v for k, v in value.items() if v is not ...}, ensure_ascii=False)


def listed(*rows: str) -> str:
    """A JSON list with one row a line: row N stands in line N + 1."""
    return "[\n" + ",\n".join(rows) + "\n]\n"


def talk(*turns: tuple[str, Any]) -> str:
    return json.dumps({"conversations": [{"from": role, "value": text} for role, text in turns]})


TALK = talk(("human", "q"), ("gpt", "a"))


class Case(NamedTuple):
    name: str
    text: str | bytes
    row: int | None
    line: int | None
    message: str
    fix: str
    entry: Entry = ALPACA
    file: str = "x.json"


def examine(tmp_path: Path, case: Case) -> DatasetReport:
    path = tmp_path / case.file
    data = case.text if isinstance(case.text, bytes) else case.text.encode()
    path.write_bytes(data)
    return check_file(path, case.entry)


ERRORS = [
    # the file
    Case(
        "gbk", listed(row(instruction="你好")).encode("gbk"), None, 2, "byte 19 (0xc4)", "GB18030"
    ),
    Case("utf-16", listed(GOOD).encode("utf-16"), None, 1, "not UTF-8 at byte 0", "UTF-16"),
    Case("latin-1", listed(GOOD, row(output="\xff!")).encode("latin-1"), None, 3, "0xff", "UTF-8"),
    Case("bom", b"\xef\xbb\xbf" + listed(GOOD).encode(), None, 1, "byte order mark", "sed -i"),
    Case("no bytes", "", None, 1, "the file is empty", "list of rows"),
    Case("only spaces", " \n\n", None, 1, "the file is empty", "list of rows"),
    Case("empty list", "[ ]\n", None, 1, "the list is empty", "at least one row"),
    Case(
        "unknown suffix", listed(GOOD), None, None, "tells the type by", "rename", ALPACA, "x.dat"
    ),
    # the top level
    Case("object", json.dumps({"a": 1}), None, 1, "the top level is one object", "put [ before"),
    Case("list below", json.dumps({"data": [{"a": 1}]}), None, 1, "one object", 'under "data"'),
    Case("string", '"hello"', None, 1, "the top level is one string", "put [ before"),
    Case("no brackets", f"{GOOD},\n{OTHER}\n", None, 1, "stand in no list", "put [ and ]"),
    # syntax
    Case("no JSON", "hello", 1, 1, "not JSON: 'hello'", "write a row"),
    Case("trailing comma in list", f"[\n{GOOD},\n]", 1, 2, "trailing comma before ]", "delete"),
    Case(
        "trailing comma in row", listed(GOOD, OTHER[:-1] + ",}"), 2, 3, "comma before }", "delete"
    ),
    Case("comma too many", f"[\n{GOOD},\n,{OTHER}]", None, 3, "a comma too many", "delete"),
    Case("comma missing", f"[\n{GOOD}\n{OTHER}\n]", 2, 3, "missing before this row", "add it"),
    Case(
        "key comma missing",
        listed('{"instruction": "q" "output": "a"}'),
        1,
        2,
        "missing",
        'or write \\"',
    ),
    Case(
        "row not closed", f"[\n{GOOD[:-1]}\n,{OTHER}]", 1, 3, "key in double quotes", '"key": value'
    ),
    Case(
        "row not closed, no comma", f"[\n{GOOD[:-1]}\n{OTHER}]", 1, 3, "comma is missing", "the }"
    ),
    Case("colon missing", listed('{"instruction" "q"}'), 1, 2, "a colon is missing", "write :"),
    Case("cut off in a row", f"[\n{GOOD},\n{OTHER[:-1]}", 2, 3, "ends inside this row", "cut off"),
    Case("cut off in the list", f"[\n{GOOD}\n", None, 2, "ends inside the list", "add ]"),
    Case("string not closed", '[\n{"output": "a}\n]', 1, 2, "a line break inside a string", r"\n"),
    Case("string to the end", '[\n{"output": "a', 1, 2, "string is not closed", 'add "'),
    Case("tab in a string", '[{"output": "a\tb"}]', 1, 1, "control character", r"\t"),
    Case("bad escape", r'[{"output": "C:\data"}]', 1, 1, "an escape JSON does not know", r"\\"),
    Case("single quotes", "[\n{'output': 'a'}\n]", 1, 2, "a single quote", "double quotes"),
    Case("Chinese quotes", "[\n{“output”: 1}\n]", 1, 2, "the character “", 'write "'),
    Case("Chinese comma", '[{"a": "b"，"c": "d"}]', 1, 1, "the character ，", "write ,"),
    Case("comment", f"[\n{GOOD},\n// more\n{OTHER}]", 2, 3, "a comment", "delete it"),
    Case("Python None", '[{"input": None}]', 1, 1, "None is Python", "write null"),
    Case("text after the list", f"[{GOOD}]\n[{OTHER}]", None, 2, "after the end", "delete it"),
    Case("nested too deeply", "[" + "[" * 100_000, 1, 1, "nested 100000 deep", "flatten"),
    Case("NaN", listed(GOOD, '{"instruction": "", "output": NaN}'), 2, 3, "NaN cannot", "null"),
    Case("Infinity", listed(row(n=float("-inf"))), 1, 2, "-Infinity cannot", "null"),
    Case(
        "huge number",
        listed(row(n=...)[:-1] + ', "n": ' + "9" * 5000 + "}"),
        1,
        2,
        "5000 digits",
        "delete",
    ),
    Case(
        "key twice",
        listed(GOOD, '{"output": "a", "output": "b"}'),
        2,
        3,
        '"output" stands twice',
        "delete one",
    ),
    Case(
        "half a character",
        listed(r'{"instruction": "q", "input": "", "output": "\ud83d"}'),
        1,
        2,
        "half a character",
        "whole",
    ),
    # rows
    Case("row is a string", listed(GOOD, '"q"'), 2, 3, 'a string ("q"), not an object', "{...}"),
    Case("row is null", listed(GOOD, "null"), 2, 3, "null, not an object", "{...}"),
    Case("no output", listed(GOOD, row(output=...)), 2, 3, 'no "output"', "delete the row"),
    Case(
        "output misspelt",
        listed(GOOD, row(output=..., ouput="y")),
        2,
        3,
        'but "ouput"',
        'rename it to "output"',
    ),
    Case(
        "output misspelt by case",
        listed(GOOD, row(output=..., Output="y")),
        2,
        3,
        'but "Output"',
        'to "output"',
    ),
    Case(
        "input misspelt",
        listed(GOOD, row(input=..., inputs="y")),
        2,
        3,
        'but "inputs"',
        'to "input"',
    ),
    Case(
        "output empty", listed(GOOD, row(output="")), 2, 3, '"output" is empty', "write the answer"
    ),
    Case(
        "output blank",
        listed(GOOD, row(output=" \n")),
        2,
        3,
        '"output" is empty',
        "write the answer",
    ),
    Case(
        "output null", listed(GOOD, row(output=None)), 2, 3, '"output" is null', "write the answer"
    ),
    Case("output number", listed(GOOD, row(output=3)), 2, 3, "a number (3), not a string", '"3"'),
    Case(
        "output list",
        listed(GOOD, row(output=["y"])),
        2,
        3,
        'a list (["y"]), not',
        "write a string",
    ),
    Case(
        "instruction number",
        listed(GOOD, row(instruction=5)),
        2,
        3,
        '"instruction" is a number',
        '"5"',
    ),
    Case(
        "input boolean",
        listed(GOOD, row(input=True)),
        2,
        3,
        '"input" is a boolean',
        "write a string",
    ),
    Case(
        "no instruction",
        listed(GOOD, row(instruction=...)),
        2,
        3,
        'no "instruction"',
        'add "instruction"',
    ),
    Case(
        "mixed kinds",
        listed(row(id=1), row(id="b", output="z")),
        2,
        3,
        '"id" holds string here and number in row 1',
        "one kind",
    ),
    Case(
        "mixed kinds below",
        listed(row(id={"a": [1, "b"]})),
        1,
        2,
        '"id.a[]" holds string',
        'delete "id"',
    ),
    Case(
        "bad history",
        listed(row(history=[["q"]])),
        1,
        2,
        "not a list of pairs",
        '[["question"',
        Entry("k", columns={**(ALPACA.columns or {}), "history": "history"}),
    ),
    Case(
        "dates in JSON Lines",
        row(output="2024-05-01") + "\n",
        1,
        1,
        "turns into a timestamp",
        ".json file",
        ALPACA,
        "x.jsonl",
    ),
    # columns
    Case(
        "named column absent",
        listed(row(input=...)),
        None,
        None,
        'no row has the column "input"',
        "inv data.register --file",
    ),
    Case(
        "default column absent",
        listed(row(input=...)),
        None,
        None,
        "named by default as query",
        "--replace",
        DEFAULT,
    ),
    Case(
        "column misspelt in all rows",
        listed(row(output=..., ouput="y")),
        1,
        2,
        'no row has the column "output"',
        'rename "ouput"',
    ),
    Case(
        "needed column absent",
        listed(row(output=...)),
        None,
        None,
        'the column "output"',
        'add "output"',
    ),
    Case(
        "response not named",
        listed(GOOD),
        None,
        None,
        "names no response column",
        "inv data.register",
        Entry("k", columns={"prompt": "instruction", "query": "input"}),
    ),
    Case(
        "prompt not named",
        listed(GOOD),
        None,
        None,
        "names no prompt column",
        "inv data.register",
        Entry("k", columns={"response": "output"}),
    ),
    Case(
        "unknown role",
        listed(GOOD),
        None,
        None,
        '"respons" in columns',
        'write "response"',
        Entry("k", columns={"prompt": "instruction", "query": "input", "respons": "output"}),
    ),
    Case(
        "unknown formatting",
        listed(GOOD),
        None,
        None,
        "formatting alpaka is unknown",
        "alpaca or",
        Entry("k", formatting="alpaka"),
    ),
    Case(
        "sharegpt without tags",
        listed(TALK),
        None,
        None,
        "without content_tag",
        "inv data.register",
        Entry(
            "k",
            formatting="sharegpt",
            tags={"role_tag": "from", "user_tag": "human", "assistant_tag": "gpt"},
        ),
    ),
    # sharegpt
    Case(
        "no messages",
        listed(TALK, '{"id": 1}'),
        2,
        3,
        'no "conversations"',
        "add the messages",
        SHAREGPT,
    ),
    Case(
        "messages misspelt",
        listed(TALK, TALK.replace("conversations", "conversation")),
        2,
        3,
        'no "conv',
        'rename "conversation"',
        SHAREGPT,
    ),
    Case(
        "messages a string",
        listed(TALK, '{"conversations": "hi"}'),
        2,
        3,
        "is a string",
        "list of messages",
        SHAREGPT,
    ),
    Case(
        "messages empty",
        listed(TALK, '{"conversations": []}'),
        2,
        3,
        "is an empty list",
        "add the",
        SHAREGPT,
    ),
    Case(
        "message a string",
        listed(TALK, '{"conversations": ["hi"]}'),
        2,
        3,
        "message 1 is a string",
        "an object",
        SHAREGPT,
    ),
    Case(
        "wrong order",
        listed(TALK, talk(("gpt", "a"), ("human", "q"))),
        2,
        3,
        'message 1 is from "gpt" where human',
        "take turns",
        SHAREGPT,
    ),
    Case(
        "twice the same",
        listed(talk(("human", "q"), ("human", "q"))),
        1,
        2,
        'message 2 is from "human" where gpt',
        "take turns",
        SHAREGPT,
    ),
    Case(
        "odd count",
        listed(TALK, talk(("human", "q"))),
        2,
        3,
        "last question has no answer",
        "add the answer",
        SHAREGPT,
    ),
    Case(
        "only system",
        listed(TALK, talk(("system", "s"))),
        2,
        3,
        "only a system message",
        "add a question",
        SHAREGPT,
    ),
    Case(
        "unknown role tag",
        listed(talk(("user", "q"), ("gpt", "a"))),
        1,
        2,
        'message 1 is from "user"; known',
        'write "human"',
        SHAREGPT,
    ),
    Case(
        "role misspelt",
        listed(talk(("human", "q"), ("GPT", "a"))),
        1,
        2,
        'message 2 is from "GPT"',
        'write "gpt"',
        SHAREGPT,
    ),
    Case(
        "no role",
        listed(TALK, '{"conversations": [{"value": "q"}]}'),
        2,
        3,
        'message 1 has no "from"',
        "human or",
        SHAREGPT,
    ),
    Case(
        "no content",
        listed(TALK, '{"conversations": [{"from": "human"}]}'),
        2,
        3,
        'message 1 has no "value"',
        "a string",
        SHAREGPT,
    ),
    Case(
        "content number",
        listed(TALK, talk(("human", "q"), ("gpt", 3))),
        2,
        3,
        "message 2 has a number (3)",
        "a string",
        SHAREGPT,
    ),
    Case(
        "answer empty",
        listed(TALK, talk(("human", "q"), ("gpt", ""))),
        2,
        3,
        "an answer, is empty",
        "write the",
        SHAREGPT,
    ),
    Case(
        "other message keys",
        listed(TALK),
        1,
        2,
        'no message has the key "role"',
        "inv data.register",
        Entry("k", formatting="sharegpt", columns={"messages": "conversations"}, tags=OPENAI.tags),
    ),
    # JSON Lines
    Case(
        "line not JSON",
        f"{GOOD}\n{{oops}}\n{OTHER}\n",
        2,
        2,
        "key in double quotes",
        '"key"',
        ALPACA,
        "x.jsonl",
    ),
    Case(
        "line without output",
        f"{GOOD}\n\n{row(output=...)}\n",
        2,
        3,
        'no "output"',
        "add",
        ALPACA,
        "x.jsonl",
    ),
    Case(
        "commas between lines",
        f"{GOOD},\n{OTHER},\n",
        None,
        1,
        "stand in no list",
        "delete the commas",
        ALPACA,
        "x.jsonl",
    ),
]


@pytest.mark.parametrize("case", ERRORS, ids=[case.name for case in ERRORS])
def test_fault_is_found_placed_and_mended(tmp_path: Path, case: Case) -> None:
    report = examine(tmp_path, case)
    found = [
        fault
        for fault in report.errors
        if case.message in fault.message and (fault.row, fault.line) == (case.row, case.line)
    ]
    assert found, report.lines()
    assert case.fix in found[0].fix
    with pytest.raises(UsageError) as caught:
        report.raise_if_bad()
    assert caught.value.exit_code == 2
    assert str(tmp_path / case.file) in caught.value.message
    assert "\n" not in caught.value.message
    assert any(found[0].render() in line for line in caught.value.detail)


WARNINGS = [
    Case(
        "unknown column", listed(GOOD, row(note="n")), 2, 3, 'the column "note" (1 row', "delete it"
    ),
    Case(
        "near name beside the right one", listed(row(inputs="n")), 1, 2, '"inputs" (1 row', "delete"
    ),
    Case(
        "same row again",
        listed(GOOD, OTHER, GOOD),
        3,
        4,
        "the same as row 1 (line 2)",
        "delete one",
    ),
    Case(
        "empty prompt", listed(GOOD, row(instruction="")), 2, 3, "the prompt is empty", "a question"
    ),
    Case(
        "JSON Lines named .json", f"{GOOD}\n{OTHER}\n", None, None, "under the name .json", ".jsonl"
    ),
    Case(
        "bom on JSON Lines",
        b"\xef\xbb\xbf" + GOOD.encode(),
        None,
        1,
        "byte order",
        "sed",
        ALPACA,
        "x.jsonl",
    ),
]


@pytest.mark.parametrize("case", WARNINGS, ids=[case.name for case in WARNINGS])
def test_warning_is_told_and_stops_nothing(tmp_path: Path, case: Case) -> None:
    report = examine(tmp_path, case)
    report.raise_if_bad()
    (found,) = report.warnings
    assert case.message in found.message
    assert case.fix in found.fix
    assert (found.row, found.line) == (case.row, case.line)


SOUND = [
    Case("list", listed(GOOD, OTHER), 2, None, "", ""),
    Case("on one line", f"[{GOOD}, {OTHER}]", 2, None, "", ""),
    Case("JSON Lines", f"{GOOD}\n\n{OTHER}\n", 2, None, "", "", ALPACA, "x.jsonl"),
    Case("commas in strings", listed(row(output=",}"), row(output=",]")), 2, None, "", ""),
    Case("input left out of some", listed(GOOD, row(input=...)), 2, None, "", ""),
    Case("input null in some", listed(GOOD, row(input=None)), 2, None, "", ""),
    Case("defaults", listed(GOOD), 1, None, "", "", DEFAULT),
    Case(
        "a date among texts",
        f"{GOOD}\n{row(output='2024-05-01')}\n",
        2,
        None,
        "",
        "",
        ALPACA,
        "x.jsonl",
    ),
    Case(
        "sharegpt",
        listed(TALK, talk(("system", "s"), ("human", "q"), ("gpt", "a"))),
        2,
        None,
        "",
        "",
        SHAREGPT,
    ),
    Case(
        "tools",
        listed(
            talk(
                ("human", "q"),
                ("function_call", '{"name": "f", "arguments": {}}'),
                ("observation", "o"),
                ("gpt", "a"),
            ),
        ),
        1,
        None,
        "",
        "",
        SHAREGPT,
    ),
    Case(
        "openai",
        '[{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]',
        1,
        None,
        "",
        "",
        OPENAI,
    ),
    Case(
        "pairs",
        listed('{"instruction": "q", "chosen": "a", "rejected": "b"}'),
        1,
        None,
        "",
        "",
        Entry(
            "k",
            columns={"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"},
            other={"ranking": True},
        ),
    ),
]


@pytest.mark.parametrize("case", SOUND, ids=[case.name for case in SOUND])
def test_sound_file_has_no_findings(tmp_path: Path, case: Case) -> None:
    report = examine(tmp_path, case)
    assert report.findings == ()
    assert (report.rows, report.kept) == (case.row, case.row)


@pytest.mark.parametrize(
    ("name", "message"), [("none.json", "no such file"), ("dir.json", "a folder")]
)
def test_no_file(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "dir.json").mkdir()
    (tmp_path / "near.json").write_text("[]")
    report = check_file(tmp_path / name, ALPACA)
    assert message in report.errors[0].message
    assert (report.rows, report.kept, report.sha256) == (0, 0, None)
    with pytest.raises(UsageError, match=name) as caught:
        report.raise_if_bad()
    assert caught.value.exit_code == 2
    if name == "none.json":
        assert "near.json" in caught.value.message


def test_all_faults_in_one_report(tmp_path: Path) -> None:
    text = (
        "[\n"
        '  {"instruction": "a", "input": "", "output": "b",},\n'
        '  {"instruction": 1, "input": "", "output": "b"},\n'
        '  {"instruction": "c", "input": "" "output": "d"},\n'
        '  {"instruction": "e", "input": "", "output": ""},\n'
        '  {"instruction": "f", "input": "", "ouput": "g"},\n'
        "]\n"
    )
    path = tmp_path / "x.json"
    path.write_text(text)
    report = check_file(path, ALPACA)
    assert [(f.row, f.line) for f in report.errors] == [
        (1, 2),
        (3, 4),
        (5, 6),
        (2, 3),
        (4, 5),
        (5, 6),
    ]
    assert report.kept == 0
    with pytest.raises(UsageError, match="6 faults, the first: row 1, line 2, column 50") as caught:
        report.raise_if_bad()
    assert len(caught.value.detail) == 6


def test_faults_inside_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(
        listed(row(instruction="你好"), row(instruction="再见", output="")).encode("gbk")
    )
    assert [(f.row, f.line) for f in check_file(path, ALPACA).errors] == [(None, 2), (2, 3)]


def test_rows_after_a_broken_one_on_the_same_line_are_not_judged(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(f"[{GOOD}, {{oops}}, {row(output='')}]")
    report = check_file(path, ALPACA)
    assert len(report.errors) == 1
    assert [f.message for f in report.findings if f.severity == "note"] == [
        "rows after the last broken one were not checked"
    ]


def test_screen_shows_fifty_and_counts_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(listed(GOOD, *[row(instruction=str(n), output="") for n in range(60)]))
    report = check_file(path, ALPACA)
    assert len(report.errors) == 60
    with pytest.raises(UsageError) as caught:
        report.raise_if_bad()
    assert len(caught.value.detail) == 51
    assert caught.value.detail[-1] == "... and 10 more"


def test_characters_are_those_of_the_joined_prompt_and_the_answer(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(
        listed(
            row(instruction="你好", output="一二三"), row(instruction="a", input="bc", output="d")
        )
    )
    report = check_file(path, ALPACA)
    value = report.to_json()
    assert value["prompt_characters"] == {"min": 2, "median": 2, "max": 4}
    assert value["response_characters"] == {"min": 1, "median": 1, "max": 3}
    assert value["sha256"] == report.sha256 and len(value["sha256"]) == 64


@pytest.mark.parametrize(
    ("stage", "good"), [(None, True), ("sft", True), ("rm", False), ("dpo", False)]
)
def test_stage_must_fit_the_entry(tmp_path: Path, stage: str | None, good: bool) -> None:
    path = tmp_path / "x.json"
    path.write_text(listed(GOOD))
    report = check_file(path, ALPACA, stage)
    assert any("which stage rm refuses" in f.message for f in report.errors) is not good
    assert report.kept == (1 if good else 0)


def test_pretraining_needs_no_answers(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(listed('{"text": "a"}'))
    entry = Entry("k", columns={"prompt": "text"})
    assert check_file(path, entry, "pt").findings == ()
    assert check_file(path, entry, "sft").errors


def test_other_file_types_are_noted_not_judged(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("instruction,output\n")
    report = check_file(path, ALPACA)
    assert report.rows is None
    assert [f.severity for f in report.findings] == ["note"]
    report.raise_if_bad()


def test_many_trailing_commas_are_read_in_one_pass(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(listed(*[row(instruction=str(n))[:-1] + ",}" for n in range(5000)]))
    report = check_file(path, ALPACA)
    assert len(report.errors) == 5000
    assert (report.errors[-1].row, report.errors[-1].line) == (5000, 5001)


RANKED = Entry("k", columns=ALPACA.columns, other={"ranking": True})


@pytest.mark.parametrize(
    ("text", "entry", "kept"),
    [
        (listed(GOOD, row(output=...), row(output=None)), ALPACA, 1),
        (listed(GOOD, row(output="")), ALPACA, 2),
        (listed(row(id=1), row(id="b", output="z")), ALPACA, 0),
        (listed(row(instruction=5)), ALPACA, 0),
        (listed(row(instruction=False)), ALPACA, 1),
        (listed(row(n=10**30)), ALPACA, 0),
        (listed(GOOD), RANKED, 0),
        (
            listed(TALK, talk(), talk(("human", "q")), talk(("gpt", "a"), ("human", "q"))),
            SHAREGPT,
            1,
        ),
    ],
)
def test_kept_agrees_with_llamafactory(tmp_path: Path, text: str, entry: Entry, kept: int) -> None:
    """The figures are LLaMA-Factory's own: tests/e2e/test_dataset_truth.py measures them."""
    path = tmp_path / "x.json"
    path.write_text(text)
    assert check_file(path, entry, "sft").kept == kept
