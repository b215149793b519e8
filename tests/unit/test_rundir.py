"""The run folder: one writer, honest status, events that survive a torn line."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from event_rows import event_rows
from tunesmith.core.errors import UsageError
from tunesmith.core.files import write_json
from tunesmith.job.run.codec import encode
from tunesmith.job.run.events import DamagedLine, EventTail, damaged_lines, mend_events
from tunesmith.job.run.folder import RunFolder, acquire, claim_output
from tunesmith.job.run.process import Identity, identify

pytestmark = pytest.mark.unit

HOLD = """
import sys, time
from pathlib import Path
from tunesmith.job.run.folder import RunFolder, acquire
lock = acquire(RunFolder(Path(sys.argv[1])))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "20261124-1200-demo")
    folder.path.mkdir()
    write_json(folder.request_file, {"run_id": folder.run_id, "phases": ["train"]})
    return folder


def holder(run: RunFolder) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_second_writer_is_refused_and_told_who_works_there(run: RunFolder) -> None:
    process = holder(run)
    try:
        with pytest.raises(UsageError, match=f"process {process.pid} on .* works in it") as caught:
            acquire(run)
        assert caught.value.exit_code == 2
        assert run.busy()
    finally:
        process.kill()
        process.wait()
    assert not run.busy(), "a lock must not outlive its holder"
    acquire(run).release()


def test_a_dead_run_is_not_shown_as_running(run: RunFolder) -> None:
    write_json(run.status_file, {"run_id": run.run_id, "state": "running", "failure": None})
    process = holder(run)
    assert run.status().state == "running"
    process.send_signal(signal.SIGKILL)
    process.wait()
    status = run.status()
    assert (status.state, status.failure) == ("failed", "killed")
    assert f"inv resume --run {run.run_id}" in status.message


def test_a_run_that_ends_while_it_is_read_is_not_shown_as_dead(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(run.status_file, {"run_id": run.run_id, "state": "running", "failure": None})
    look = RunFolder.busy

    def end_then_look(folder: RunFolder) -> bool:
        ended = {"run_id": run.run_id, "state": "succeeded", "failure": None}
        write_json(run.status_file, ended)
        return look(folder)

    monkeypatch.setattr(RunFolder, "busy", end_then_look)
    assert run.status().state == "succeeded"


def test_a_reader_does_not_keep_a_run_from_starting(run: RunFolder) -> None:
    run.lock_file.touch()
    reader = os.open(run.lock_file, os.O_RDONLY)
    fcntl.flock(reader, fcntl.LOCK_SH)  # as `busy` does, for a moment
    done = threading.Timer(0.05, os.close, [reader])
    done.start()
    acquire(run).release()
    done.join()


def test_torn_last_event_is_left_out_then_mended(run: RunFolder) -> None:
    run.emit("log", step=1, loss=2.5)
    with run.events_file.open("ab") as stream:
        stream.write(b'{"time": 1, "event": "lo')
    assert [event["step"] for event in event_rows(run.events_file)] == [1]
    mend_events(run.events_file)
    run.emit("log", step=2, loss=2.0)
    assert [event["step"] for event in event_rows(run.events_file)] == [1, 2]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"not json", "not JSON at byte 0"),
        (b"[]", "expected an object, found a list"),
        (b'{"event": 3}', "event: expected a word, found 3"),
        (b'{"event": "phase_ended", "phase": "train"}', 'the key "state" is missing'),
        (b'{"event": "queued", "ahead": [1]}', "ahead[0]: expected a run id, found 1"),
        (b"\xff", "not UTF-8 at byte 0"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_damaged_line_is_told_with_its_place_and_hides_no_other(
    run: RunFolder, line: bytes, why: str
) -> None:
    run.emit("log", step=1)
    size = run.events_file.stat().st_size
    with run.events_file.open("ab") as stream:
        stream.write(line + b"\n")
    run.emit("log", step=2)
    assert [event["step"] for event in event_rows(run.events_file)] == [1, 2]
    (told,) = damaged_lines(run.events_file)
    assert told.startswith(f"the line at byte {size} is damaged: ")
    assert why in told
    assert isinstance(EventTail(run.events_file).new()[1], DamagedLine)


def test_tail_reads_each_event_once(run: RunFolder) -> None:
    tail = EventTail(run.events_file)
    assert tail.new() == []
    run.emit("log", step=1)
    assert [encode(e)["step"] for e in tail.new()] == [1]
    run.emit("log", step=2)
    assert [encode(e)["step"] for e in tail.new()] == [2]
    assert EventTail(run.events_file, tail.offset).new() == []


def test_nan_is_told(run: RunFolder) -> None:
    run.emit("log", step=1, loss=float("nan"))
    assert str(event_rows(run.events_file)[0]["loss"]) == "nan"


def test_output_of_another_run_is_refused_with_its_owner(run: RunFolder, tmp_path: Path) -> None:
    output = tmp_path / "shared output"
    claim_output(run, output)
    claim_output(run, output)
    other = RunFolder(tmp_path / "other")
    with pytest.raises(UsageError, match=f"belongs to run {run.run_id}"):
        claim_output(other, output)


def test_output_with_files_of_unknown_origin_is_refused_and_left_alone(
    run: RunFolder, tmp_path: Path
) -> None:
    precious = tmp_path / "results" / "adapter_model.safetensors"
    precious.parent.mkdir()
    precious.write_bytes(b"precious")
    with pytest.raises(UsageError, match="already has files"):
        claim_output(run, precious.parent)
    assert [p.name for p in precious.parent.iterdir()] == [precious.name]


def test_identity_tells_a_process_from_a_later_one_with_its_pid() -> None:
    me = identify()
    assert me.alive()
    assert not Identity(me.pid, me.started + 1, me.init_started, me.hostname).alive()
    assert not Identity(me.pid, me.started, me.init_started + 1, me.hostname).alive()
    assert not Identity(me.pid, me.started, me.init_started, "elsewhere").alive()
    assert Identity.from_json(json.loads(json.dumps(me.to_json()))) == me


def test_a_zombie_is_not_alive() -> None:
    child = subprocess.Popen(["sleep", "60"])
    identity = identify(child.pid)
    assert identity.alive()
    os.kill(child.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while identity.alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not identity.alive()
    child.wait()


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"run\.json is missing"):
        RunFolder(tmp_path).request()
