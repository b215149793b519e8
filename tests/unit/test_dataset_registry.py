"""dataset_info.json: nothing wrong gets in, nothing right gets lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tunesmith.core.errors import UsageError
from tunesmith.dataset.registry import (
    check_registered,
    check_unregistered,
    load_registry,
    register,
    resolve,
)

pytestmark = pytest.mark.unit

ROWS = [{"instruction": "q", "input": "", "output": "a"}]
BEFORE = (
    "{\n"
    '    "zeta": {\n        "file_name": "zeta.json",\n        "num_samples": 3\n    },\n'
    '    "alpha": {\n        "hf_hub_url": "someone/alpha",\n        "subset": "中文"\n    }\n'
    "}\n\n"
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A dataset_dir with an unusual indent, two data sets, and one sound new file."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "dataset_info.json").write_text(BEFORE, encoding="utf-8")
    for name in ("zeta.json", "new.json"):
        (folder / name).write_text(json.dumps(ROWS))
    return folder


def test_register_keeps_the_others_their_order_and_the_style(data: Path) -> None:
    entry = register(data, "new", data / "new.json")[0]
    text = (data / "dataset_info.json").read_text(encoding="utf-8")
    added = (
        ',\n    "new": {\n        "file_name": "new.json",\n        "formatting": "alpaca",\n'
        '        "columns": {\n            "prompt": "instruction",\n'
        '            "query": "input",\n            "response": "output"\n        }\n    }'
    )
    assert text == BEFORE.replace("    }\n}\n\n", "    }" + added + "\n}\n\n")
    assert load_registry(data)["new"] == entry
    assert list(load_registry(data)) == ["zeta", "alpha", "new"]


def test_register_makes_the_first_registry(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    register(tmp_path, "a", tmp_path / "a.json")
    assert [report.kept for report in check_registered(tmp_path, "a")] == [1]


def test_a_file_elsewhere_is_stored_absolute(data: Path, tmp_path: Path) -> None:
    outside = tmp_path / "out side.json"
    outside.write_text(json.dumps(ROWS))
    assert register(data, "out", outside)[0].file_name == str(outside)
    assert [report.kept for report in check_registered(data, "out")] == [1]


def test_same_key_and_file_changes_nothing(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data.parent)
    first = register(data, "new", Path("data/new.json"))[0]
    info = data / "dataset_info.json"
    before = (info.stat().st_ino, info.stat().st_mtime_ns, info.read_bytes())
    assert register(data, "new", data / "new.json")[0] == first
    assert (info.stat().st_ino, info.stat().st_mtime_ns, info.read_bytes()) == before


def test_replace_takes_another_file_in_the_same_place(data: Path) -> None:
    entry = register(data, "zeta", data / "new.json", replace=True)[0]
    assert entry.file_name == "new.json"
    assert list(load_registry(data)) == ["zeta", "alpha"]


def test_replace_reads_changed_columns_anew(data: Path) -> None:
    register(data, "new", data / "new.json")
    (data / "new.json").write_text(json.dumps([{"question": "q", "answer": "a"}]))
    with pytest.raises(UsageError, match="--key new --replace"):
        register(data, "new", data / "new.json")
    entry = register(data, "new", data / "new.json", replace=True)[0]
    assert entry.columns == {"prompt": "question", "response": "answer"}


REFUSED: list[tuple[str, Callable[[Path], object], tuple[str, ...]]] = [
    (
        "bad file",
        lambda data: (
            (data / "bad.json").write_text('[\n{"instruction": "q", "output": ""},\n]'),
            register(data, "bad", data / "bad.json"),
        ),
        ("bad.json", "2 faults", "line 2", "trailing comma"),
    ),
    (
        "missing file",
        lambda data: register(data, "x", data / "x.json"),
        ("x.json", "no such file"),
    ),
    (
        "key of another file",
        lambda data: register(data, "zeta", data / "new.json"),
        ("zeta", "zeta.json", "new.json", "--replace"),
    ),
    (
        "key of a hub data set",
        lambda data: register(data, "alpha", data / "new.json"),
        ("alpha", "someone/alpha", "new.json", "another --key"),
    ),
    ("empty key", lambda data: register(data, "", data / "new.json"), ("key ''", "choose")),
    ("comma in key", lambda data: register(data, "a,b", data / "new.json"), ("a,b", "comma")),
    (
        "bad formatting",
        lambda data: register(data, "n", data / "new.json", formatting="chat"),
        ("formatting chat", "alpaca or sharegpt"),
    ),
    (
        "wrong formatting",
        lambda data: register(data, "n", data / "new.json", formatting="sharegpt"),
        ("new.json", '"conversations"'),
    ),
    (
        "csv",
        lambda data: ((data / "a.csv").write_text("q,a"), register(data, "a", data / "a.csv")),
        ("a.csv", "`inv stack.install`"),
    ),
    (
        "misspelt column",
        lambda data: (
            (data / "m.json").write_text('[{"instruction": "q", "ouput": "a"}]'),
            register(data, "m", data / "m.json"),
        ),
        ("m.json", 'rename "ouput" to "output"'),
    ),
]


@pytest.mark.parametrize(("name", "act", "told"), REFUSED, ids=[case[0] for case in REFUSED])
def test_refusal_writes_nothing(
    data: Path, name: str, act: Callable[[Path], object], told: tuple[str, ...]
) -> None:
    with pytest.raises(UsageError) as caught:
        act(data)
    assert caught.value.exit_code == 2
    assert all(part in caught.value.render() for part in told), caught.value.render()
    assert (data / "dataset_info.json").read_text(encoding="utf-8") == BEFORE
    assert not list(data.glob(".*.part"))


DETECTED = [
    (
        [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}],
        {"formatting": "sharegpt", "columns": {"messages": "conversations"}},
    ),
    (
        [
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": "a"},
                ],
                "tools": "[]",
            }
        ],
        {
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "tools": "tools"},
            "tags": {
                "role_tag": "role",
                "content_tag": "content",
                "user_tag": "user",
                "assistant_tag": "assistant",
                "system_tag": "system",
            },
        },
    ),
    (
        [
            {"instruction": "q", "output": "a"},
            {"instruction": "q", "output": "b", "system": "s", "history": [["c", "d"]]},
        ],
        {
            "formatting": "alpaca",
            "columns": {
                "prompt": "instruction",
                "response": "output",
                "history": "history",
                "system": "system",
            },
        },
    ),
    (
        [{"prompt": "p", "query": "q", "response": "r"}],
        {
            "formatting": "alpaca",
            "columns": {"prompt": "prompt", "query": "query", "response": "response"},
        },
    ),
    (
        [{"instruction": "q", "chosen": "a", "rejected": "b"}],
        {
            "formatting": "alpaca",
            "ranking": True,
            "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"},
        },
    ),
    (
        [{"instruction": "q", "output": "a", "kto_tag": True}],
        {
            "formatting": "alpaca",
            "columns": {"prompt": "instruction", "response": "output", "kto_tag": "kto_tag"},
        },
    ),
]


@pytest.mark.parametrize(("rows", "raw"), DETECTED)
def test_entry_names_every_column_and_no_other(
    data: Path, rows: list[dict[str, object]], raw: dict[str, object]
) -> None:
    (data / "d.json").write_text(json.dumps(rows))
    register(data, "d", data / "d.json")
    written = json.loads((data / "dataset_info.json").read_text(encoding="utf-8"))["d"]
    assert written == {"file_name": "d.json", **raw}
    (report,) = check_registered(data, "d")
    assert (report.findings, report.kept) == ((), len(rows))


def test_unregistered_name_is_told_with_the_command(data: Path) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(data, "zeta, zetta")
    assert caught.value.exit_code == 2
    message = caught.value.line
    assert "data set zetta is not registered" in message
    assert "did you mean zeta?" in message
    assert f"inv data.register --file {data}/zetta.json --key zetta" in message
    assert caught.value.detail == ("registered: zeta, alpha",)


@pytest.mark.parametrize("names", ["", " , "])
def test_no_name_at_all(data: Path, names: str) -> None:
    with pytest.raises(UsageError, match="no data set is named"):
        resolve(data, names)


def test_hub_data_sets_are_noted_not_failed(data: Path) -> None:
    zeta, alpha = check_registered(data, "zeta,alpha")
    # The entry of zeta names no columns; LLaMA-Factory's defaults hold.
    assert (zeta.kept, zeta.findings) == (1, ())
    assert alpha.rows is None
    assert alpha.file == "hf_hub_url someone/alpha"
    assert [finding.severity for finding in alpha.findings] == ["note"]
    alpha.raise_if_bad()


@pytest.mark.parametrize("folder", ["ONLINE", "REMOTE:someone/repo"])
def test_registries_on_the_hub_are_noted(folder: str) -> None:
    (report,) = check_registered(Path(folder), "a")
    assert report.rows is None
    report.raise_if_bad()


def test_unregistered_file_is_checked_as_it_would_be_registered(data: Path) -> None:
    assert check_unregistered(data / "new.json").kept == 1
    (data / "m.json").write_text('[{"instruction": "q"}]')
    assert check_unregistered(data / "m.json").errors


BAD_REGISTRIES = [
    ("{,}", ("line 1, column 2",)),
    ("[]", ("must be an object",)),
    ('{"a": 1}', ("data set a", "not an object")),
    ('{"a": {}}', ("data set a", "no file_name", "--key a")),
    ('{"a": {"file_name": 3}}', ("data set a", "file_name", "3")),
    ('{"a": {"file_name": "a.json", "columns": ["x"]}}', ("data set a", "columns")),
    ('{"a": {"file_name": "a.json"}, "a": {"file_name": "b.json"}}', ('"a" occurs twice',)),
]


@pytest.mark.parametrize(("text", "told"), BAD_REGISTRIES)
def test_bad_registry_names_file_and_key(data: Path, text: str, told: tuple[str, ...]) -> None:
    path = data / "dataset_info.json"
    path.write_text(text)
    for act in (lambda: load_registry(data), lambda: register(data, "n", data / "new.json")):
        with pytest.raises(UsageError) as caught:
            act()
        assert caught.value.exit_code == 2
        assert all(part in caught.value.line for part in (str(path), *told))
    assert path.read_text() == text


def test_registry_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"dataset_info\.json") as caught:
        load_registry(tmp_path)
    assert "inv data.register" in caught.value.hint


def test_registry_that_is_not_utf8(data: Path) -> None:
    (data / "dataset_info.json").write_bytes(b'{"\xff": 1}')
    with pytest.raises(UsageError, match="not UTF-8 at byte 2"):
        register(data, "n", data / "new.json")


def test_a_folder_is_registered_by_its_name(data: Path) -> None:
    folder = data / "mine"
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps(ROWS))
    assert register(data, "mine", folder)[0].file_name == "mine"
    tables = data / "tables"
    tables.mkdir()
    (tables / "a.csv").write_text("instruction,output\nq,a\n")
    with pytest.raises(UsageError, match="not checked here") as caught:
        register(data, "tables", tables)
    assert "`inv stack.install`" in caught.value.hint
