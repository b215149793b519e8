"""The contract of the two halves: today's files are read and written as they are, and a wrong value
is refused with its place."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tunesmith.core.errors import UsageError
from tunesmith.job.run import schema
from tunesmith.job.run.codec import Fault, decode, encode
from tunesmith.job.run.events import KINDS, Event, OtherEvent, read_events
from tunesmith.job.run.folder import RunFolder
from tunesmith.job.run.replies import RunShown
from tunesmith.maintain import run_schema

pytestmark = pytest.mark.unit

FILES = Path(__file__).parent / "contract1"
KINDS_OF_FILE: dict[str, type] = {
    "run.json": schema.RunRequest,
    "status.json": schema.RunStatus,
    "heartbeat.json": schema.Heartbeat,
    "pulled.json": schema.CopyRecord,
    "adjustments.json": schema.Adjustments,
}


def whole(name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((FILES / name).read_text(encoding="utf-8"))
    return value


def lines() -> list[dict[str, Any]]:
    text = (FILES / "events.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("name", KINDS_OF_FILE)
def test_a_file_of_version_1_is_read_and_written_as_it_is(name: str) -> None:
    kind = KINDS_OF_FILE[name]
    written = encode(decode(kind, whole(name)))
    version = {"version": 1} if hasattr(kind, "version") else {}
    assert written == whole(name) | version
    assert decode(kind, written) == decode(kind, whole(name))


def test_every_kind_of_event_is_read_and_written_as_it_is() -> None:
    events = [decode(Event, line) for line in lines()]
    assert [encode(event) for event in events] == lines()
    assert read_events(FILES / "events.jsonl") == events
    seen = {type(event) for event in events}
    assert seen == {*KINDS.values(), OtherEvent} - {KINDS["damaged_line"]}


def places(value: Any, at: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Return the place of every value of a document."""
    found = [at] if at else []
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            found += places(item, (*at, key))
    return found


def replaced(value: Any, at: tuple[str | int, ...], wrong: object) -> Any:
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = wrong
    return copy


def value_at(value: Any, at: tuple[str | int, ...]) -> Any:
    for key in at:
        value = value[key]
    return value


def spelt(at: tuple[str | int, ...]) -> str:
    text = ""
    for key in at:
        if isinstance(key, int):
            text += f"[{key}]"
        else:
            text += (f".{key}" if text else key) if key.isidentifier() else f'["{key}"]'
    return text


# What LLaMA-Factory's own schema describes, and what is only shown.
FREE = ("overrides", "merge", "predict", "entries", "value", "was", "figures", "from", "to")
FIGURES = ("formatting", "prompt_characters", "response_characters", "kept", "warnings")


@pytest.mark.parametrize("name", KINDS_OF_FILE)
def test_a_wrong_value_is_refused_with_its_place(name: str) -> None:
    tried = 0
    for at in places(whole(name)):
        if {*FREE, *FIGURES} & set(map(str, at)):
            continue
        for wrong in ({"an": ["object"]}, [[]], True, -(10**30)):
            flag = wrong is True and at[-1] in ("paused", "adapter", "allow_pickle")
            # An object of other keys is one whose own keys are absent.
            if flag or (isinstance(wrong, dict) and isinstance(value_at(whole(name), at), dict)):
                continue
            with pytest.raises(Fault) as caught:
                decode(KINDS_OF_FILE[name], replaced(whole(name), at, wrong))
            assert str(caught.value).startswith(spelt(at)), (at, wrong, str(caught.value))
            tried += 1
    assert tried >= 8


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"model": {"files": {"x": {"size": -1, "sha256": "0" * 64}}}},
            "model.files.x.size: expected a count (a whole number from 0), found -1",
        ),
        (
            {"model": {"files": {"a b": {"size": 1, "sha256": "0"}}}},
            """model.files["a b"].sha256: expected a sha256, found '0'""",
        ),
        ({"phases": ["train", 7]}, "phases[1]: expected a word, found 7"),
        ({"turn": "later"}, "turn: expected one of refuse, wait, found 'later'"),
        ({"owned": [{"why": "x"}]}, 'owned[0]: the key "key" is missing'),
        ({"limits": {"max_hours": 1}}, "limits: expected one of the keys disk_wait_seconds, "),
        ({"price": math.nan}, "price: expected "),
    ],
)
def test_the_place_and_both_values_are_named(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    run = RunFolder(tmp_path / "last")
    run.path.mkdir()
    run.request_file.write_text(json.dumps(whole("run.json") | change))
    with pytest.raises(UsageError) as caught:
        run.request()
    assert f"{run.request_file}: damaged: {words}" in caught.value.message


def test_unknown_keys_are_passed_over_but_for_limits_of_ours() -> None:
    more = {"of_a_newer_version": {"command": ["touch", "x"]}}
    request = decode(schema.RunRequest, whole("run.json") | more)
    assert request == decode(schema.RunRequest, whole("run.json"))
    shown = {"request": {"limits": more}, "status": {"state": "queued"}, "config": None}
    assert decode(RunShown, shown, foreign=True).request.limits == schema.Limits()


def test_what_a_host_says_is_cleaned_and_cut() -> None:
    status = {"state": "failed", "message": "a\x1b]0;x\x07b" + "x" * 5000, "detail": ["\x1b[2Jc"]}
    read = decode(schema.RunStatus, status, foreign=True)
    assert read.message is not None and read.message.startswith("abx")
    assert len(read.message) < 2000
    assert read.detail == ("c",)
    assert decode(schema.RunStatus, status).message == status["message"]
    with pytest.raises(Fault, match=r"detail: expected at most 1000 items, found '1001 items'"):
        decode(schema.RunStatus, {"state": "failed", "detail": [""] * 1001}, foreign=True)


def test_the_schema_for_people_is_that_of_the_types(root: Path) -> None:
    (text,) = run_schema.render(root).values()
    assert (root / run_schema.FILE).read_text(encoding="utf-8") == text, "`inv stack.render`"
    described = json.loads(text)
    Draft202012Validator.check_schema(described)

    def of(name: str) -> Draft202012Validator:
        definitions = {"$defs": described["$defs"]}
        return Draft202012Validator(definitions | described["properties"][name])

    for name, kind in KINDS_OF_FILE.items():
        assert list(of(name).iter_errors(encode(decode(kind, whole(name))))) == []
        first = next(iter(whole(name)))
        assert not of(name).is_valid(replaced(whole(name), (first,), [[]])), name
    for line in lines():
        assert of("events.jsonl").is_valid(line), line


def test_a_loss_may_be_no_number_and_a_time_may_not() -> None:
    assert math.isnan(decode(schema.RunStatus, {"state": "running", "loss": math.nan}).loss or 0)
    for figure in ("eta_seconds", "started", "tokens_per_second"):
        with pytest.raises(Fault, match=figure):
            decode(schema.RunStatus, {"state": "running", figure: math.nan})
