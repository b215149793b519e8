"""Whose turn it is: one run works at a time, the kernel forgets the dead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.job.run import queue

pytestmark = pytest.mark.unit

HOLD = """
import sys, time
from pathlib import Path
from tunesmith.job.run import queue
runs, run_id, how = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
held = queue.take(runs, run_id)[0] if how == "turn" else queue.QueueEntry(runs, run_id)
assert held
print("held", flush=True)
time.sleep(60)
"""


def holder(runs: Path, run_id: str, how: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", HOLD, str(runs), run_id, how]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


def test_the_turn_is_given_to_one_and_comes_back_with_its_end(tmp_path: Path) -> None:
    working = holder(tmp_path, "first", "turn")
    try:
        assert queue.take(tmp_path, "second") == (None, ["first"])
    finally:
        end(working)
    turn, ahead = queue.take(tmp_path, "second")
    assert turn is not None
    assert ahead == []
    owner = json.loads((tmp_path / ".turn").read_text())
    assert (owner["run_id"], owner["pid"]) == ("second", os.getpid())
    turn.release()
    turn, _ = queue.take(tmp_path, "third")
    assert turn is not None
    turn.release()


def test_nobody_passes_those_who_wait(tmp_path: Path) -> None:
    waiting = holder(tmp_path, "first", "ticket")
    with queue.QueueEntry(tmp_path, "second") as entry:
        assert queue.take(tmp_path, "third") == (None, ["first", "second"])
        assert entry.take() == (None, ["first"])
        end(waiting)
        turn, ahead = entry.take()
        assert (turn is not None, ahead) == (True, [])
    assert turn is not None
    assert queue.take(tmp_path, "third") == (None, ["second"])
    turn.release()
    assert [p.name for p in (tmp_path / ".waiting").iterdir()] == ["lock"]


def test_a_turn_lives_while_a_worker_has_it(tmp_path: Path) -> None:
    """kill -9 of the supervisor: its worker still trains, and nobody may start beside it."""
    turn, _ = queue.take(tmp_path, "first")
    assert turn is not None
    worker = subprocess.Popen(["sleep", "60"], pass_fds=[turn.descriptor])
    turn.release()
    assert queue.take(tmp_path, "second") == (None, ["first"])
    worker.kill()
    worker.wait()
    turn, _ = queue.take(tmp_path, "second")
    assert turn is not None
    turn.release()


def test_a_torn_name_does_not_free_the_turn(tmp_path: Path) -> None:
    turn, _ = queue.take(tmp_path, "first")
    assert turn is not None
    (tmp_path / ".turn").write_text('{"run')
    assert queue.take(tmp_path, "second") == (None, ["of an unknown name"])
    turn.release()
