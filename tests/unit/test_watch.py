"""Pieces of a run, cut where a reader can take them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.core.files import write_json
from tunesmith.job.run.codec import encode
from tunesmith.job.run.events import EventTail
from tunesmith.job.run.folder import RunFolder
from tunesmith.job.run.replies import RunSnapshot
from tunesmith.job.run.watch import PIECE, poll, read_log

pytestmark = pytest.mark.unit


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    write_json(folder.request_file, {"phases": []})
    write_json(folder.status_file, {"run_id": "run", "state": "succeeded", "failure": None})
    return folder


def test_a_log_is_cut_between_characters(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    content = ("你好" * 100_000).encode()
    log.write_bytes(content[:-1])
    text, offset = read_log(log, 0, whole=True)
    assert text == content[:offset].decode()
    assert PIECE - 4 < offset <= PIECE
    pieces = [text]
    while True:
        text, after = read_log(log, offset, whole=False)
        if after == offset:
            break
        pieces.append(text)
        offset = after
    assert "".join(pieces) == content[:-3].decode(), "the torn character is left for later"
    assert read_log(log, offset, whole=True) == ("\ufffd", len(content) - 1)
    assert read_log(tmp_path / "none", 7, whole=True) == ("", 7)


def test_bytes_that_are_no_text_hold_nothing_up(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_bytes(b"a\xff\xfe\r50%\rb")
    assert read_log(log, 0, whole=False) == ("a\ufffd\ufffd\r50%\rb", 9)


def test_events_come_in_pieces_of_whole_lines(run: RunFolder) -> None:
    for number in range(5000):
        run.emit("log", step=number, text="x" * 100)
    run.emit("note", text="y" * (2 * PIECE))
    seen, offset, lines = [], 0, 0
    while True:
        line = poll(run, offset, -1)
        seen += line.events
        offset, lines = line.events_offset, lines + 1
        if not line.more:
            break
    assert [encode(event).get("step") for event in seen] == [*range(5000), None]
    assert offset == run.events_file.stat().st_size
    assert 3 <= lines <= 10
    assert EventTail(run.events_file).new() == seen


def test_nothing_new_is_no_more(run: RunFolder) -> None:
    run.emit("log", step=1)
    with run.events_file.open("ab") as stream:
        stream.write(b'{"time": 1, "ev')
    line = poll(run, 0, 0)
    assert (len(line.events), line.more) == (1, False)
    assert poll(run, line.events_offset, 0) == RunSnapshot(
        run.status(), (), line.events_offset, "", 0
    )
