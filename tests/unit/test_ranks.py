"""Which of several processes is the cause, and how their end is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.job.run.exit_codes import FAILED, STOPPED
from tunesmith.job.supervisor import ranks
from tunesmith.job.supervisor.ranks import RankFailure
from tunesmith.job.system import processes

NAN = RankFailure("nan", "the loss became nan at step 3", (), None, 20.0)
# As gloo and NCCL word it (torch 2.8).
GLOO = (
    "RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] "
    "Connection closed by peer [127.0.0.1]:35211"
)
LOST = RankFailure("code", GLOO, (), None, 10.0)
NCCL = RankFailure(
    "code",
    "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:3356, "
    "remote process exited or there was a network error, NCCL version 2.27.3",
    (),
    None,
    11.0,
)
OOM = RankFailure("gpu_oom", "OutOfMemoryError: CUDA out of memory", (), None, 30.0)


def judged(
    codes: dict[int, int], words: dict[int, RankFailure], *, stopping: bool = False
) -> tuple[int, int | None, str | None]:
    code, rank, word = ranks.verdict(codes, words, stopping=stopping, oom_killed=False)
    return code, rank, None if word is None else word.failure


def test_who_blames_no_other_is_the_cause_though_it_spoke_later() -> None:
    assert judged({0: 21}, {0: LOST, 1: OOM, 2: NCCL}) == (FAILED, 1, "gpu_oom")
    assert judged({1: 21}, {1: NAN, 3: OOM}) == (FAILED, 1, "nan")


def test_a_rank_that_was_killed_is_the_cause_whatever_survivors_say() -> None:
    code, rank, word = ranks.verdict({0: 21, 1: -9}, {0: LOST}, stopping=False, oom_killed=False)
    assert (code, rank) == (FAILED, 1)
    assert word is not None
    assert (word.failure, word.message) == ("killed", "rank 1 was ended by SIGKILL")
    code, rank, word = ranks.verdict({1: -9}, {}, stopping=False, oom_killed=True)
    assert word is not None
    assert word.failure == "host_oom"


def test_what_the_others_say_when_they_are_ended_is_no_cause() -> None:
    """torchrun's agent signals whole groups: loaders of data die, and their ranks say so."""
    loader = RankFailure(
        "host_oom",
        "RuntimeError: DataLoader worker (pid 4694) is killed by signal: Terminated.",
        (),
        None,
        9.0,
    )
    assert judged({1: -9}, {0: loader}) == (FAILED, 1, "killed")
    assert judged({1: 21}, {0: loader, 1: OOM}) == (FAILED, 1, "gpu_oom")
    assert judged({1: STOPPED}, {0: loader}, stopping=True) == (STOPPED, None, None)


def test_where_only_survivors_speak_it_may_pass() -> None:
    assert judged({0: 21, 2: 21}, {0: LOST, 2: NCCL}) == (FAILED, 0, "killed")


def test_a_stop_is_a_stop() -> None:
    assert judged({1: STOPPED}, {}) == (STOPPED, None, None)
    # One that was asked before it listened died of it.
    assert judged({1: -signal.SIGTERM}, {}, stopping=True) == (STOPPED, None, None)
    assert judged({1: -signal.SIGTERM}, {}) == (FAILED, 1, "killed")
    # A checkpoint that failed on the way is no stop.
    assert judged({0: 21, 1: STOPPED}, {0: NAN}, stopping=True) == (FAILED, 0, "nan")


def test_an_end_without_a_word_is_judged_by_its_code() -> None:
    assert judged({0: 3}, {}) == (3, None, None)


def test_words_come_back_as_they_were_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ranks.RECORDS, str(tmp_path))
    monkeypatch.setenv("RANK", "12")
    word = RankFailure("data", "row 3", ("a", "b"), True, 1.5)
    ranks.leave_word(word)
    assert ranks.words_of(tmp_path) == {12: word}


def test_processes_in_sessions_of_their_own_are_found_and_ended() -> None:
    """A child's child in its own session, whose parent has gone: no group holds it."""
    mark = f"{os.getpid()} with a space"
    script = "import subprocess, sys; subprocess.Popen(['sleep', '600'], start_new_session=True)"
    env = {**os.environ, "TUNESMITH_TEST_MARK": mark, "RANK": "3"}
    subprocess.run([sys.executable, "-c", script], env=env, check=True)
    [found] = processes.marked("TUNESMITH_TEST_MARK", mark)
    assert found.rank == 3
    assert processes.marked("TUNESMITH_TEST_MARK", mark[:-1]) == []
    assert processes.end("TUNESMITH_TEST_MARK", mark, 20) == []
    assert processes.marked("TUNESMITH_TEST_MARK", mark) == []
