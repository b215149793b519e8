"""The pieces that outlive a disk: /dev/full refuses every byte, a small tmpfs the last ones."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from disks import Disk
from event_rows import event_rows
from tunesmith.core.files import read_json, write_json
from tunesmith.job.run import journal, limits, queue, relay
from tunesmith.job.run.codec import encode
from tunesmith.job.run.folder import RunFolder, acquire
from tunesmith.job.run.journal import Journal, Reporter
from tunesmith.job.run.relay import RELAY, Receiver
from tunesmith.job.run.schema import Heartbeat, PostRunCommand, RunStatus
from tunesmith.job.supervisor import attempt as attempts
from tunesmith.job.supervisor.attempt import Attempt
from tunesmith.job.supervisor.intake import Intake
from tunesmith.job.system import disk

pytestmark = pytest.mark.unit


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "one")
    folder.path.mkdir()
    return folder


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Disk]:
    with Disk(tmp_path / "disk", "full") as made:
        (made.folder / "one").mkdir()
        yield made


BEAT = Heartbeat(step=1, total_steps=2, time=1.0, paused=False)
RUNNING, FAILED = RunStatus(state="running"), RunStatus(state="failed")


def refuse_events(run: RunFolder) -> None:
    run.events_file.symlink_to("/dev/full")


def names(run: RunFolder) -> list[str]:
    return [event["event"] for event in event_rows(run.events_file)]


def test_events_wait_in_order_and_are_told_later(run: RunFolder) -> None:
    refuse_events(run)
    book = Journal(run)
    for number in range(5):
        book.emit("log", step=number)
    book.status(RUNNING)
    assert book.trouble is not None
    assert not run.status_file.exists(), "a status never outruns its events"
    run.events_file.unlink()
    assert book.flush()
    told = event_rows(run.events_file)
    assert [event.get("step") for event in told] == [0, 1, 2, 3, 4, None]
    assert "No space left on device" in told[-1]["text"]
    assert read_json(run.status_file) == encode(RUNNING)
    assert book.trouble is None


def test_events_that_wait_are_bounded(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "BOUND", 3)
    refuse_events(run)
    book = Journal(run)
    for number in range(5):
        book.emit("log", step=number)
    run.events_file.unlink()
    assert book.flush()
    told = event_rows(run.events_file)
    assert [event.get("step") for event in told] == [2, 3, 4, None]
    assert "but for 2 events" in told[-1]["text"]


def test_what_is_no_fault_of_a_disk_is_raised(run: RunFolder) -> None:
    run.events_file.mkdir()
    with pytest.raises(IsADirectoryError):
        Journal(run).emit("log")
    with pytest.raises(IsADirectoryError):
        Reporter(run)("log")


def test_a_line_is_written_whole_or_not_at_all(full: Disk) -> None:
    file = full.folder / "lines"
    line = b"x" * 999 + b"\n"
    disk.append(file, line)
    full.fill()
    with pytest.raises(OSError, match="No space left"):
        for _ in range(10):
            disk.append(file, line)
    content = file.read_bytes()
    assert 0 < len(content) < 10_000
    assert set(content.splitlines(keepends=True)) == {line}


def test_a_torn_line_of_a_dead_writer_is_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    for torn in (b"{", b"x" * 200_000):
        file.write_bytes(b"one\n" + torn)
        disk.append(file, b"two\n")
        assert file.read_bytes() == b"one\ntwo\n"


def test_a_halted_writer_does_not_halt_the_others(tmp_path: Path) -> None:
    import fcntl

    file = tmp_path / "lines"
    with file.open("ab") as halted:
        fcntl.flock(halted, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="halted") as error:
            disk.append(file, b"two\n")
    assert disk.fault(error.value)
    disk.append(file, b"two\n")
    assert file.read_bytes() == b"two\n"


def test_the_last_words_find_room_that_is_taken_at_once(full: Disk) -> None:
    run = RunFolder(full.folder / "one")
    book = Journal(run)
    book.open()
    write_json(run.status_file, encode(RUNNING))
    full.fill()
    ended = threading.Event()

    def fill_again() -> None:
        while not ended.is_set():
            full.fill()

    thread = threading.Thread(target=fill_again)
    thread.start()
    try:
        book.emit("run_ended", pad="x" * 5000)
        book.status(FAILED)
        assert read_json(run.status_file) == encode(RUNNING)
        book.last_words(1, lambda: False)
    finally:
        ended.set()
        thread.join()
    assert read_json(run.status_file) == encode(FAILED)
    assert not run.reserve_file.exists()


def test_the_last_events_come_before_the_last_status(full: Disk) -> None:
    run = RunFolder(full.folder / "one")
    book = Journal(run)
    book.open()
    full.fill()
    book.emit("run_ended", state="failed", failure=None, pad="x" * 100_000)
    book.status(FAILED)
    assert book.last_words(0, lambda: False)
    assert names(run) == ["note", "run_ended"]
    assert read_json(run.status_file) == encode(FAILED)


def test_a_run_is_refused_where_its_reserve_does_not_fit(full: Disk) -> None:
    run = RunFolder(full.folder / "one")
    full.fill()
    with pytest.raises(OSError, match="No space left"):
        Journal(run).open()
    assert not run.reserve_file.exists()


def test_a_worker_is_heard_past_the_disk(
    full: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(full.folder / "one")
    book = Journal(run)
    intake = Intake(run, book)
    monkeypatch.setenv(RELAY, intake.address)
    tell = Reporter(run)
    full.fill()
    tell("log", step=1, pad="x" * 5000)
    tell.heartbeat(encode(BEAT))
    (full.folder / "filler").unlink()
    # What comes after it goes the same way, and so keeps its place.
    tell("log", step=2)
    assert names(run) == []
    news = intake.new()
    assert [encode(event)["step"] for event in news.events] == [1, 2]
    assert news.heartbeats == [BEAT]
    assert book.flush()
    assert names(run)[:2] == ["log", "log"]
    assert intake.new().events == [], "told once"


def test_a_worker_without_a_supervisor_keeps_its_events(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Path(os.devnull).open("wb") as other:
        # A later process with the supervisor's pid: what is there is not the pipe.
        monkeypatch.setenv(RELAY, f"/proc/{os.getpid()}/fd/{other.fileno()} 1")
        refuse_events(run)
        tell = Reporter(run)
        tell("log", step=1)
        tell("log", step=2)
        run.events_file.unlink()
        tell("log", step=3)
    assert [event["step"] for event in event_rows(run.events_file)] == [1, 2, 3]


def test_more_than_a_pipe_holds_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    receiver = Receiver()
    monkeypatch.setenv(RELAY, receiver.address)
    lines = [b'{"event": "%d", "pad": "%s"}\n' % (n, b"x" * 3000) for n in range(1000)]
    sent: list[int] = []
    thread = threading.Thread(target=lambda: sent.append(relay.send(lines)))
    thread.start()
    found = []
    while thread.is_alive() or (more := receiver.received()):
        found += more if not thread.is_alive() else receiver.received()
        time.sleep(0.01)
    assert sent == [1000]
    assert [value["event"] for value in found] == [str(n) for n in range(1000)]


def test_a_line_of_output_ends_no_worker(tmp_path: Path) -> None:
    done = tmp_path / "done"
    code = f"""
import sys
from tunesmith.job.run import streams
streams.outlive_disk()
for number in range(1000):
    print("a line", number)
    print("a line", number, file=sys.stderr)
sys.stdout.flush()
open({str(done)!r}, "w").write("done")
"""
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=full)
    assert (ended.returncode, done.exists()) == (0, True)


def test_missing_output_is_counted(full: Disk, tmp_path: Path) -> None:
    log, printed = full.folder / "log", tmp_path / "printed"
    code = f"""
from pathlib import Path
from tunesmith.job.run import streams
streams.outlive_disk()
print("x" * 10_000)
Path({str(printed)!r}).touch()
input()
print("again")
"""
    log.write_bytes(b"")
    full.fill()
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=stream, stderr=stream
        )
    deadline = time.monotonic() + 60
    while not printed.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    (full.folder / "filler").unlink()
    process.communicate(b"\n", timeout=60)
    assert "bytes are missing]\nagain\n" in log.read_text()
    assert process.returncode == 0


def test_locks_need_no_room(tmp_path: Path) -> None:
    for way in ("full", "read_only"):
        with Disk(tmp_path / way, way) as there:
            run = RunFolder(there.folder / "one")
            run.path.mkdir()
            acquire(run).release()
            turn, ahead = queue.take(there.folder, "one")
            assert turn is not None
            turn.release()
            there.refuse()
            if way == "full":
                lock = acquire(run)
                assert run.busy()
                lock.release()
            turn, ahead = queue.take(there.folder, "one")
            assert turn is not None, ahead
            assert queue.take(there.folder, "two")[0] is None
            turn.release()


def test_a_turn_is_taken_where_none_was_ever_taken(tmp_path: Path) -> None:
    with Disk(tmp_path / "disk", "read_only") as there:
        there.refuse()
        turn, ahead = queue.take(there.folder, "one")
        assert (turn is not None, ahead) == (True, [])


def test_a_command_needs_no_log(run: RunFolder, tmp_path: Path) -> None:
    run.log_file.symlink_to("/dev/full")
    refuse_events(run)
    mark = tmp_path / "mark"
    after = PostRunCommand(("sh", "-c", f"echo something; touch '{mark}'"), "succeeded", 0.0)
    told: list[str] = []
    limits.carry_out(after, run, lambda e, **_: told.append(e), lambda: False, in_turn=True)
    assert mark.exists()
    assert told == ["after_command_ended"]


def test_an_old_heartbeat_is_no_news(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker_file = tmp_path / "worker"
    worker_file.write_text("#!/bin/sh\nexec sleep 60\n")
    worker_file.chmod(0o755)
    monkeypatch.setattr(attempts.sys, "executable", str(worker_file))
    beat = Heartbeat(step=3, total_steps=9, step_seconds=1.0, paused=False, time=1.0)
    write_json(run.heartbeat_file, encode(beat))
    worker = Attempt(run, "fetch", dict(os.environ), [], tmp_path)
    worker.poll()
    worker.hear(replace(beat, step=4, time=2.0))
    time.sleep(0.1)
    worker.poll()
    assert worker.heartbeat is not None and worker.heartbeat.step == 4
    assert worker.silent_seconds() > 0.05
    worker.kill()


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, "disk_full"),
        (errno.EDQUOT, "disk_full"),
        (errno.EROFS, "read_only"),
        (errno.EIO, "read_only"),
        (errno.ENOENT, None),
        (errno.EPIPE, None),
    ],
)
def test_whose_fault_it_is(number: int, expected: str | None) -> None:
    error = OSError(number, os.strerror(number))
    assert disk.fault(error) == expected
    wrapped = RuntimeError("it failed")
    wrapped.__cause__ = error
    assert disk.fault(wrapped) == expected
