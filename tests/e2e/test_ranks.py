"""Two processes train: the same losses as one, and an end of every kind that leaves nothing."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from jobs import Job
from support import THOROUGH
from tunesmith.core.files import read_json, write_json
from tunesmith.job.run.process import WORKER_OF, start_ticks
from tunesmith.job.system.processes import Marked, marked

pytestmark = pytest.mark.e2e

CONFIG = {
    "max_steps": 30,
    "save_steps": 5,
    "lora_dropout": 0.0,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
}


def of(job: Job) -> list[Marked]:
    return marked(WORKER_OF, str(job.folder.path))


def rank(job: Job, number: int) -> int:
    """The pid of a rank itself; its loaders of data have its number too, and later pids."""
    return next(process.pid for process in of(job) if process.rank == number)


def two(job: Job, model: Path, data: Path, **config: object) -> Job:
    """The run with `--gpus 2 --keep-batch`: the same config, shared by two processes."""
    limits = config.pop("limits", None)
    job.make(model, data, env={"OMP_NUM_THREADS": "1"}, limits=limits, **{**CONFIG, **config})  # type: ignore[arg-type]
    request = read_json(job.folder.request_file)
    write_json(job.folder.request_file, request | {"gpus": {"count": 2}, "keep_batch": True})
    return job


def reached(job: Job, step: int) -> None:
    job.wait(lambda: job.step() >= step or job.state() != "running", f"step {step}", 400)
    assert job.state() == "running", f"{job.folder.status()}\n{job.log_tail()}"


def test_two_processes_are_one_whatever_happens(
    tmp_path: Path, training_python: Path, tiny_model: Path, data: Path, job: Job
) -> None:
    """A rank is killed, the run is stopped, it goes on: every loss is that of one process."""
    alone = Job(training_python, tmp_path / "one" / "run")
    alone.make(tiny_model, data, env={"NPROC_PER_NODE": "1"}, **CONFIG)
    alone.call("start")
    alone.wait_for_end("succeeded")

    # Its loaders of data are no ranks, and a stop is none of their business.
    two(job, tiny_model, data, dataloader_num_workers=1).call("start")
    reached(job, 8)
    os.kill(rank(job, 1), signal.SIGKILL)
    job.wait(lambda: len(job.events("phase_started")) == 2, "another attempt", 400)
    [failure] = job.events("failure")
    assert (failure["failure"], failure["rank"]) == ("killed", 1)
    assert failure["message"] == "rank 1 was ended by SIGKILL"

    reached(job, 20)
    job.call("stop")
    job.wait_for_end("stopped")
    assert of(job) == []
    assert len(job.events("failure")) == 1
    job.call("start")
    job.wait_for_end("succeeded")
    assert of(job) == []

    assert job.losses().keys() == alone.losses().keys()
    worst = max(abs(loss - alone.losses()[step]) for step, loss in job.losses().items())
    assert worst < 5e-5, worst
    assert len(job.events("summary")) == 1
    notes = [event["text"] for event in job.events("note")]
    assert "2 processes x 2 rows x 1 accumulated = 4 rows a step" in notes
    changed = {event["what"]: event["to"] for event in job.events("changed")}
    assert changed["gradient_accumulation_steps"] == 1
    assert changed["average_tokens_across_devices"] is True


def test_a_rank_that_hangs_shows_its_stack_and_is_replaced(
    job: Job, tiny_model: Path, data: Path
) -> None:
    limits = {"stall_seconds": 30, "stall_steps": 1, "dump_seconds": 5}
    # So long that it cannot end while the stacks are written: the hung rank is woken for that.
    two(job, tiny_model, data, max_steps=5000, limits=limits).call("start")
    reached(job, 6)
    hung = rank(job, 1)
    os.kill(hung, signal.SIGSTOP)
    job.wait(lambda: bool(job.events("restarting")), "a restart", 400)
    assert job.events("restarting")[0]["failure"] == "stalled"
    log = job.folder.log_file.read_text(errors="replace")
    assert log.count("Current thread") >= 3, "the stacks of both, and of who watches them"
    assert start_ticks(hung) is None
    job.wait(lambda: bool(job.events("resumed")), "the next attempt", 400)
    job.call("stop")
    job.wait_for_end("stopped")
    assert of(job) == []


def test_the_rank_that_fails_names_the_failure(job: Job, tiny_model: Path, data: Path) -> None:
    """The loss is watched by rank 0 alone; rank 1 waits for it in a collective and says nothing."""
    two(job, tiny_model, data, learning_rate=1e30, limits={"restarts": 0}).call("start")
    job.wait_for_end("failed")
    status = job.folder.status()
    assert status.failure == "nan", status
    [failure] = job.events("failure")
    assert (failure["failure"], failure["rank"]) == ("nan", 0)
    assert of(job) == []


@pytest.mark.skipif(not THOROUGH, reason="a minute more; run it with TUNESMITH_THOROUGH=1")
def test_ranks_that_lost_everybody_are_ended_before_the_next_attempt(
    job: Job, tiny_model: Path, data: Path
) -> None:
    """Supervisor and agent are killed while a rank hangs: no lock is held, but memory is."""
    two(job, tiny_model, data, max_steps=16).call("start")
    reached(job, 6)
    hung = rank(job, 1)
    agent = next(process.pid for process in of(job) if process.rank is None)
    os.kill(hung, signal.SIGSTOP)
    os.kill(job.supervisor(), signal.SIGSTOP)  # so that it cannot end what is left first
    os.kill(agent, signal.SIGKILL)
    os.kill(job.supervisor(), signal.SIGKILL)
    job.wait(lambda: not job.folder.busy(), "the lock", 60)
    assert hung in [process.pid for process in of(job)]
    time.sleep(random.Random(3).random())
    job.call("start")
    job.wait(lambda: job.state() == "running", "a new attempt")
    job.wait_for_end("succeeded")
    assert start_ticks(hung) is None
    assert of(job) == []
