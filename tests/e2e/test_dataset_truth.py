"""`kept` is what LLaMA-Factory itself keeps: its loader, converter and first filter are run."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tunesmith.dataset.check import check_file
from tunesmith.dataset.convert import convert, write
from tunesmith.dataset.media import MediaPlace
from tunesmith.dataset.registry import check_unregistered, load_registry
from tunesmith.dataset.report import DatasetReport

pytestmark = pytest.mark.e2e

BROKEN = Path(__file__).resolve().parent.parent / "broken"

PROGRAM = Path(__file__).resolve().parents[1] / "training" / "programs" / "kept_rows.py"


def alpaca(**change: Any) -> dict[str, Any]:
    value = {"instruction": "q", "input": "", "output": "a", **change}
    return {key: held for key, held in value.items() if held is not ...}


def talk(*roles: str) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": "t"} for role in roles]}


NAMED = {"columns": {"prompt": "instruction", "query": "input", "response": "output"}}
TALKS = {"formatting": "sharegpt"}
# key: (rows, entry, rows kept, whether LLaMA-Factory stops with an error)
CASES: dict[str, tuple[list[Any], dict[str, Any], int, bool]] = {
    "good": ([alpaca(), alpaca(output="1")], NAMED, 2, False),
    "no_output": ([alpaca(), alpaca(output=...), alpaca(output=None)], NAMED, 1, False),
    "empty_output": ([alpaca(), alpaca(output="")], NAMED, 2, False),
    "all_numbers": ([alpaca(output=1), alpaca(output=2)], NAMED, 0, False),
    "one_number": ([alpaca(), alpaca(output=2)], NAMED, 0, True),
    "number_asked": ([alpaca(instruction=5)], NAMED, 0, True),
    "mixed_kinds": ([alpaca(id=1), alpaca(id="b")], NAMED, 0, True),
    "false_asked": ([alpaca(instruction=False)], NAMED, 1, False),
    "some_inputs": ([alpaca(), alpaca(input=...)], {}, 2, False),
    "no_inputs": ([alpaca(input=...)], {}, 0, True),
    "no_response": ([alpaca()], {"columns": {"prompt": "instruction"}}, 0, False),
    "bad_history": (
        [alpaca(history=[["q"]])],
        {"columns": {**NAMED["columns"], "history": "history"}},
        0,
        True,
    ),
    "ranking": ([alpaca()], {**NAMED, "ranking": True}, 0, True),
    "talks": (
        [
            talk("human", "gpt"),
            talk("system", "human", "gpt", "human", "gpt"),
            talk("gpt", "human"),
            talk("human"),
            talk("user", "gpt"),
            talk(),
        ],
        TALKS,
        2,
        False,
    ),
    "no_talk": ([talk("human", "gpt"), {"conversations": None}], TALKS, 0, True),
}
# key: (bytes, suffix, rows kept, whether LLaMA-Factory stops with an error)
RAW: dict[str, tuple[bytes, str, int, bool]] = {
    "lines": (b'{"instruction": "q", "output": "a"}\n\n' * 2, ".jsonl", 2, False),
    "lines_as_json": (b'{"instruction": "q", "output": "a"}\n' * 2, ".json", 2, False),
    "list_as_jsonl": (b'[{"instruction": "q", "output": "a"}]', ".jsonl", 1, False),
    "bom_list": (b'\xef\xbb\xbf[{"instruction": "q", "output": "a"}]', ".json", 0, True),
    "bom_lines": (b'\xef\xbb\xbf{"instruction": "q", "output": "a"}\n', ".jsonl", 1, False),
    "trailing_comma": (b'[{"instruction": "q", "output": "a"},\n]', ".json", 0, True),
    "key_twice_list": (b'[{"instruction": "q", "output": "a", "output": "b"}]', ".json", 1, False),
    "key_twice_lines": (b'{"instruction": "q", "output": "a", "output": "b"}', ".jsonl", 0, True),
    "dates_lines": (b'{"instruction": "q", "output": "2024-05-01"}\n', ".jsonl", 0, False),
    "dates_list": (b'[{"instruction": "q", "output": "2024-05-01"}]', ".json", 1, False),
    "huge_number": (
        b'[{"instruction": "q", "output": "a", "n": 1000000000000000000000000000000}]',
        ".json",
        0,
        True,
    ),
    "empty": (b"", ".json", 0, True),
}


def broken_cases() -> dict[str, dict[str, Any]]:
    cases: dict[str, dict[str, Any]] = json.loads((BROKEN / "cases.json").read_text("utf-8"))
    return cases


def made_of(parts: list[Any]) -> str:
    """Return the text of [text or parts, times] pairs."""
    return "".join(
        (text if isinstance(text, str) else made_of(text)) * times for text, times in parts
    )


def lay_out(folder: Path, root: Path) -> dict[str, tuple[int, bool | None]]:
    """Write every case and their registry; return {key: (rows kept, whether it stops)}."""
    registry: dict[str, Any] = {}
    expected: dict[str, tuple[int, bool | None]] = {}
    for key, (rows, entry, kept, stops) in CASES.items():
        for suffix in (".json", ".jsonl"):
            name = key + suffix
            text = "\n".join(map(json.dumps, rows)) if suffix == ".jsonl" else json.dumps(rows)
            (folder / name).write_text(text)
            registry[name] = {"file_name": name, **entry}
            expected[name] = (kept, stops)
    for key, (data, suffix, kept, stops) in RAW.items():
        (folder / (key + suffix)).write_bytes(data)
        columns = {"columns": {"prompt": "instruction", "response": "output"}}
        registry[key] = {"file_name": key + suffix, **columns}
        expected[key] = (kept, stops)
    shutil.copytree(BROKEN / "files", folder / "broken")
    shutil.copytree(BROKEN / "media", folder / "media")
    for name, case in broken_cases().items():
        if "parts" in case:
            with (folder / "broken" / name).open("w") as stream:
                stream.write(made_of(case["parts"]))
        registry[f"broken/{name}"] = {"file_name": f"broken/{name}", **case["entry"]}
        expected[f"broken/{name}"] = (case["kept"], None)
    demo = json.loads((root / "data/dataset_info.json").read_bytes())["philosophy_conch"]
    shutil.copy(root / "data/philosophy_data.json", folder)
    registry["demo"] = demo
    expected["demo"] = (120, False)
    (folder / "dataset_info.json").write_text(json.dumps(registry))
    (folder / "how.json").write_text(json.dumps(ways()))
    return expected


def ways() -> dict[str, dict[str, str]]:
    """Stage and template of the cases that have one."""
    cases = broken_cases().items()
    named = ("stage", "template")
    return {f"broken/{key}": {n: case[n] for n in named if n in case} for key, case in cases}


@dataclass(frozen=True)
class Truth:
    """What LLaMA-Factory did with every case, what was expected, and what the check says."""

    found: dict[str, dict[str, Any]]
    expected: dict[str, tuple[int, bool | None]]
    reports: dict[str, DatasetReport]


@pytest.fixture(scope="module")
def truth(
    tmp_path_factory: pytest.TempPathFactory, root: Path, training_python: Path, base_model: Path
) -> Iterator[Truth]:
    folder = tmp_path_factory.mktemp("truth")
    expected = lay_out(folder, root)
    done = subprocess.run(
        [training_python, PROGRAM, folder, base_model],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found, records = json.loads((folder / "found.json").read_text())

    def tables(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
        """What the training environment read, as tables_of does, without another start."""
        return map(json.loads, records[str(files[0])])

    reports = {}
    how = ways()
    for key, entry in load_registry(folder).items():
        way = how.get(key, {})
        media = MediaPlace(folder / "media", way.get("template"))
        stage = way.get("stage", "sft")
        reports[key] = check_file(
            entry.path(folder), entry, stage, tables=tables, thorough=True, media=media
        )
    yield Truth(found, expected, reports)
    shutil.rmtree(folder)


def test_the_cases_say_what_llamafactory_does(truth: Truth) -> None:
    wrong = {
        key: (truth.found[key], (kept, stops))
        for key, (kept, stops) in truth.expected.items()
        if truth.found[key]["kept"] != kept
        or (stops is not None and stops != (truth.found[key]["why"] is not None))
    }
    assert not wrong


def test_kept_is_what_llamafactory_keeps(truth: Truth) -> None:
    kept = {key: found["kept"] for key, found in truth.found.items()}
    ours = {key: report.kept for key, report in truth.reports.items()}
    assert {key: (ours[key], kept[key]) for key in kept if ours[key] != kept[key]} == {}


def test_every_broken_file_is_refused_or_explained(truth: Truth) -> None:
    cases = broken_cases()
    assert len(cases) >= 180
    unexplained = {}
    for name, case in cases.items():
        report = truth.reports[f"broken/{name}"]
        told = [
            finding
            for finding in report.findings
            if case["says"] in finding.message + finding.fix
            and finding.severity == case.get("severity", "error")
            and (finding.row, finding.line) == (case.get("row"), case.get("line"))
        ]
        if not told or (report.kept < (report.rows or 0) and not report.errors):
            unexplained[name] = report.lines(5)
    assert unexplained == {}


def test_tokens_are_those_that_llamafactory_trains(truth: Truth) -> None:
    counted = {key: f for key, f in truth.found.items() if f["trained"] is not None}
    assert len(counted) >= 80
    ours = {key: found["replayed"] for key, found in counted.items()}
    theirs = {key: [found["kept"], found["trained"]] for key, found in counted.items()}
    assert {key: (ours[key], theirs[key]) for key in theirs if ours[key] != theirs[key]} == {}


def test_what_stops_the_preparation_is_an_error(truth: Truth) -> None:
    refused = {key: f["refused"] for key, f in truth.found.items() if f["refused"]}
    assert len(refused) >= 15
    # Of the formats of pictures not every one is known here: that is a warning.
    silent = {
        key: why
        for key, why in refused.items()
        if not truth.reports[key].errors
        and not any("begins as no picture" in f.message for f in truth.reports[key].warnings)
    }
    assert silent == {}


def test_what_is_said_of_a_table_mends_it(truth: Truth) -> None:
    followed = []
    for key, report in truth.reports.items():
        advice = {f.fix for f in report.errors if "`inv data.convert " in f.fix}
        if not advice:
            continue
        (command,) = {fix.split("`inv ")[1].split("`")[0] for fix in advice}
        verb, path = shlex.split(command)
        made = write(Path(path), convert(Path(path)))
        wrong = check_unregistered(made).errors
        # What is no answer in the table is none after it.
        assert {f.message for f in wrong} <= {'"output" is empty'}, (key, verb, wrong)
        followed.append(key)
    assert len(followed) >= 10
