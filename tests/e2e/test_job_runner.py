"""The job runner under real LLaMA-Factory training: killed, stopped, starved, hung.

A tiny random Llama with SmolLM2's tokenizer trains LoRA in float32 on the CPU, so that
an undisturbed run is an exact oracle: after any disturbance every step's loss and the
final adapter must be the same.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agents import Agent
from disks import Disk
from event_rows import event_rows
from jobs import SAVE_STEPS, STANDINS, STEPS, Job
from support import THOROUGH, lacking
from tunesmith.core.files import read_json
from tunesmith.job.run import checkpoints
from tunesmith.job.run.codec import encode
from tunesmith.job.run.folder import OWNER_FILE, claim_output

pytestmark = pytest.mark.e2e

GPU_MEMORY = STANDINS / "gpu_memory.py"


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, training_python: Path, tiny_model: Path, data: Path
) -> Job:
    made = Job(training_python, tmp_path_factory.mktemp("runs") / "undisturbed")
    made.make(tiny_model, data)
    made.call("start")
    made.wait_for_end("succeeded")
    assert sorted(made.losses()) == list(range(1, STEPS + 1))
    return made


def equal_to_oracle(job: Job, oracle: Job) -> None:
    assert job.losses().keys() == oracle.losses().keys()
    worst = max(abs(loss - oracle.losses()[step]) for step, loss in job.losses().items())
    assert worst <= 1e-6, worst
    assert job.adapter() == oracle.adapter()


def die_in_save(job: Job) -> bool:
    """Kill the worker while a checkpoint is being written; say whether it was hit."""
    output = job.folder.output
    sealed = {step for step, _ in checkpoints.folders(output)}
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        fresh = [(s, p) for s, p in checkpoints.folders(output) if s not in sealed]
        if fresh:
            os.kill(job.worker(), signal.SIGKILL)
            return not (fresh[-1][1] / checkpoints.MANIFEST).exists()
    raise AssertionError(f"no checkpoint in 60 s\n{job.log_tail()}")


def test_interruptions_lose_nothing(
    job: Job, undisturbed: Job, tiny_model: Path, data: Path
) -> None:
    """kill -9 of the worker, of the supervisor, of both, SIGTERM, Ctrl-C, and inside a save."""
    job.make(tiny_model, data)
    chance = random.Random(20)
    kinds = ["worker", "in save", "supervisor", "stop", "both", "in save", "interrupt"]
    done: list[str] = []
    hits = 0
    job.call("start")
    # All kinds, and a kill that did hit a save.
    rounds = 20 if THOROUGH else len(kinds)
    while len(done) < rounds or not hits:
        assert len(done) < 40, "no kill hit a save"
        kind = kinds[len(done) % len(kinds)]
        attempts = len(job.events("phase_started"))
        job.wait(lambda: job.worker() > 0 or job.state() != "running", "a worker in training")
        assert job.state() == "running", f"after {done}: {job.folder.status()}\n{job.log_tail()}"
        target = min(job.step() + chance.randrange(6), STEPS - 1)
        job.wait(lambda target=target: job.step() >= target, f"step {target}")
        time.sleep(chance.random() * 0.1)
        worker, supervisor = job.worker(), job.supervisor()
        if kind == "in save":
            hits += die_in_save(job)
        elif kind == "worker":
            os.kill(worker, signal.SIGKILL)
        elif kind == "supervisor":
            os.kill(supervisor, signal.SIGKILL)
        elif kind == "both":
            os.kill(supervisor, signal.SIGSTOP)  # so that it cannot restart the worker first
            os.kill(worker, signal.SIGKILL)
            os.kill(supervisor, signal.SIGKILL)
        elif kind == "stop":
            job.call("stop")
        else:
            os.kill(supervisor, signal.SIGINT)
        done.append(kind)
        if kind not in ("worker", "in save"):  # else the supervisor goes on by itself
            job.wait(lambda: not job.folder.busy(), f"the lock after {kind}", 60)
            expected = "stopped" if kind in ("stop", "interrupt") else "failed"
            assert job.state() == expected, kind
            job.call("start")
        else:
            before = attempts
            job.wait(
                lambda before=before: len(job.events("phase_started")) > before, "a new attempt"
            )
    job.wait_for_end("succeeded")

    equal_to_oracle(job, undisturbed)
    reached = 0
    for event in event_rows(job.folder.events_file):
        if event["event"] == "log":
            reached = event["step"]
        elif event["event"] == "resumed":
            assert 0 <= reached - event["step"] <= SAVE_STEPS, (reached, event)
    assert len(job.events("resumed")) >= 0.7 * len(done)
    left = [p.name for p in job.folder.output.iterdir() if p.name.startswith("checkpoint-")]
    assert len(left) == 2, "rotation keeps save_total_limit"


def test_a_host_dies_and_the_merge_follows_in_the_end(
    tmp_path: Path, root: Path, undisturbed: Job, tiny_model: Path, data: Path
) -> None:
    """A run of a host through its agent: fetch, train, kill -9 of all, train, merge, proof."""
    agent = Agent(undisturbed.python, tmp_path, root / "configs")
    job = Job(agent.python, agent.runs / "run").make(tiny_model, data)
    order = {"name": str(tiny_model), "configs": str(root / "configs")}
    request = encode(job.folder.request()) | {
        "created": "now",
        "title": "a run of a host",
        "turn": "refuse",
        "phases": ["fetch", "train", "merge", "proof"],
        "fetch": order | {"store": str(tmp_path / "models")},
        "merge": {"infer_dtype": "float32"},
    }
    request["env"] |= {"HF_HOME": str(tmp_path / "hf")}
    agent.ask("renew", "run", stdin={"request": request})
    agent.ask("start", "run")
    try:
        job.wait(lambda: job.step() >= 2 * SAVE_STEPS + 2, "some checkpoints")
        agent.kill("run")
        assert job.state() == "failed"
        reached = job.step()
        assert agent.ask("resume-all")["started"] == ["run"]
        job.wait(lambda: job.events("resumed"), "the resume")
        assert 0 <= reached - job.events("resumed")[0]["step"] <= SAVE_STEPS
        lines = list(agent.watch("run", "--log", "0"))
    finally:
        agent.end_all()
    assert lines[-1]["status"]["phases"] == dict.fromkeys(request["phases"], "succeeded")
    assert "".join(line["log"] for line in lines).encode() == job.folder.log_file.read_bytes()
    equal_to_oracle(job, undisturbed)
    assert agent.ask("manifest", "run")["files"]["output/adapter_model.safetensors"] == {
        "size": (job.folder.output / "adapter_model.safetensors").stat().st_size,
        "sha256": undisturbed.adapter(),
    }
    assert "merged/model.safetensors" in agent.ask("manifest", "run", "--what", "merged")["files"]


def test_killed_between_the_last_checkpoint_and_the_result(
    job: Job, undisturbed: Job, tiny_model: Path, data: Path
) -> None:
    """transformers would train one step too many when it resumes from a finished training."""
    job.make(tiny_model, data)
    shutil.copytree(undisturbed.folder.output, job.folder.output)
    (job.folder.output / OWNER_FILE).unlink()
    for left in [*job.folder.output.glob("adapter_*"), *job.folder.output.glob("*.png")]:
        left.unlink()
    claim_output(job.folder, job.folder.output.with_name("made"))
    shutil.copy(job.folder.output.with_name("made") / OWNER_FILE, job.folder.output)
    assert job.call("run", check=False).returncode == 0, job.log_tail()
    assert job.adapter() == undisturbed.adapter()
    assert job.losses() == {}, "no step was left to train"
    assert (job.folder.output / "training_loss.png").is_file()
    result = {p.name for p in job.folder.output.iterdir() if p.is_file()}
    assert not {name for name in result if name.startswith(("optimizer", "rng_state"))}


def test_a_worker_whose_supervisor_is_gone_at_its_start_does_nothing(
    job: Job, tiny_model: Path, data: Path
) -> None:
    job.make(tiny_model, data)
    gone = subprocess.Popen(["true"])
    gone.wait()
    argv = [job.python, "-m", "tunesmith.job.supervisor.worker", job.folder.path, "train"]
    environment = {**os.environ, "TUNESMITH_SUPERVISOR_PID": str(gone.pid)}
    done = subprocess.run(argv, env=environment, timeout=60, check=False)
    assert done.returncode == 20
    assert not job.folder.output.exists()


def test_a_second_train_in_the_same_run_is_refused(job: Job, tiny_model: Path, data: Path) -> None:
    job.make(tiny_model, data)
    job.call("start")
    try:
        second = job.call("run", check=False)
        assert second.returncode == 2
        assert f"process {job.supervisor()} on" in second.stderr
        starting = job.call("start", check=False)
        assert (starting.returncode, job.state()) == (2, "running")
    finally:
        job.call("stop")
        job.wait_for_end("stopped")
    # Stopped while loading: nothing was trained yet, and the next start begins anew.
    assert job.folder.status().phases == {"train": "stopped"}


def test_output_of_another_run_is_refused(
    job: Job, undisturbed: Job, tiny_model: Path, data: Path
) -> None:
    job.make(tiny_model, data, output_dir=str(undisturbed.folder.output))
    before = undisturbed.adapter()
    done = job.call("run", check=False)
    assert done.returncode == 2
    assert "belongs to run undisturbed" in done.stderr
    assert undisturbed.adapter() == before


def test_nan_stops_at_once_and_says_what_to_change(job: Job, tiny_model: Path, data: Path) -> None:
    job.make(tiny_model, data, learning_rate=1.0e30, lr_scheduler_type="constant", save_steps=500)
    assert job.call("run", check=False).returncode == 1
    status = job.folder.status()
    assert (status.state, status.failure) == ("failed", "nan")
    assert "the loss became nan at step" in status.message
    assert "lower learning_rate" in status.message
    assert job.step() < 5, "it must not go on for long"
    assert not (job.folder.output / "adapter_model.safetensors").exists()


def test_gpu_oom_steps_down_with_the_same_effective_batch(
    job: Job, undisturbed: Job, tiny_model: Path, data: Path
) -> None:
    job.make(
        tiny_model,
        data,
        env={"STANDIN_GPU_ROWS": "1"},
        standin=GPU_MEMORY,
        max_steps=6,
        disable_gradient_checkpointing=True,
    )
    assert job.call("run", check=False).returncode == 0, job.log_tail()
    assert read_json(job.folder.adjustments_file) == {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
    }
    told = [(e["what"], e["from"], e["to"]) for e in job.events("changed")]
    assert told == [
        ("per_device_train_batch_size", 4, 2),
        ("gradient_accumulation_steps", 1, 2),
        ("per_device_train_batch_size", 2, 1),
        ("gradient_accumulation_steps", 2, 4),
    ]
    # The same rows in the same order: the first loss differs only by dropout's draws.
    assert abs(job.losses()[1] - undisturbed.losses()[1]) < 0.05


def test_gpu_oom_that_nothing_mends_is_reported(job: Job, tiny_model: Path, data: Path) -> None:
    job.make(
        tiny_model,
        data,
        env={"STANDIN_GPU_ROWS": "-1"},
        standin=GPU_MEMORY,
        per_device_train_batch_size=1,
        disable_gradient_checkpointing=True,
    )
    assert job.call("run", check=False).returncode == 1
    status = job.folder.status()
    assert status.failure == "gpu_oom"
    assert "lower cutoff_len" in status.message
    told = [(e["what"], e["to"]) for e in job.events("changed")]
    assert told == [("disable_gradient_checkpointing", False)]


def test_a_hung_worker_is_dumped_restarted_once_then_reported(
    job: Job, undisturbed: Job, tiny_model: Path, data: Path
) -> None:
    job.make(tiny_model, data, limits={"stall_seconds": 15})
    job.call("start")
    # Hung right after its first step, then past a checkpoint.
    for round_, step in ((1, 1), (2, SAVE_STEPS + 2)):
        job.wait(lambda n=round_: len(job.events("phase_started")) == n, f"attempt {round_}")
        job.wait(lambda: job.worker() > 0, "training")
        job.wait(lambda n=step: job.step() >= n, "some steps")
        os.kill(job.worker(), signal.SIGSTOP)
        hung_at = time.monotonic()
        if round_ == 1:
            job.wait(lambda: bool(job.events("restarting")), "the stall to be seen")
            # Silence counts from the newest heartbeat, which is up to a second and a step old.
            assert time.monotonic() - hung_at >= 12
    job.wait_for_end("failed")
    assert job.folder.status().failure == "stalled"
    assert "most recent call first" in job.folder.log_file.read_text(errors="replace")
    job.call("start")
    job.wait_for_end("succeeded")
    equal_to_oracle(job, undisturbed)


@pytest.fixture
def disk(tmp_path: Path, job: Job) -> Iterator[Path]:
    """A file system of 200 MB and 400 inodes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = "size=200m,nr_inodes=400"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tunesmith", folder])
    if mounted.returncode != 0:
        lacking("no right to mount a small file system", "run the tests as root")
    try:
        yield folder
    finally:
        if job.folder.busy():
            job.call("stop", check=False)
            job.wait(lambda: not job.folder.busy(), "the end", 60)
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_pauses_the_run_until_there_is_room(
    job: Job, undisturbed: Job, tiny_model: Path, data: Path, disk: Path
) -> None:
    filler = disk / "filler"
    filler.write_bytes(b"\1" * 150_000_000)
    job.make(tiny_model, data, output_dir=str(disk / "output"))
    job.call("start")
    job.wait(lambda: bool(job.events("paused")), "the pause")
    why = job.events("paused")[0]["why"]
    assert str(disk / "output") in why
    assert "free" in why
    assert not checkpoints.folders(disk / "output"), "nothing half-written"
    time.sleep(2)
    assert job.state() == "running"
    filler.unlink()
    job.wait_for_end("succeeded")
    assert job.losses() == undisturbed.losses()


def test_a_disk_without_inodes_pauses_the_run_too(
    job: Job, tiny_model: Path, data: Path, disk: Path
) -> None:
    (disk / "small files").mkdir()
    for number in range(345):
        (disk / "small files" / str(number)).touch()
    job.make(tiny_model, data, output_dir=str(disk / "output"), max_steps=2 * SAVE_STEPS)
    job.call("start")
    job.wait(lambda: bool(job.events("paused")), "the pause")
    why = job.events("paused")[0]["why"]
    assert re.search(r"has \d+ free inodes, a checkpoint needs \d+", why), why
    assert not checkpoints.folders(disk / "output"), "nothing half-written"
    shutil.rmtree(disk / "small files")
    job.wait_for_end("succeeded")
    assert [step for step, _ in checkpoints.folders(disk / "output")] == [5, 10]


@pytest.mark.parametrize("way", ["full", "read_only"])
def test_training_outlives_the_disk_of_its_run(
    tmp_path: Path, training_python: Path, tiny_model: Path, data: Path, way: str
) -> None:
    steps = 6 * SAVE_STEPS
    with Disk(tmp_path / "disk", way, "200m") as disk:
        job = Job(training_python, disk.folder / "run")
        limits = {"disk_wait_seconds": 600 if way == "full" else 1}
        job.make(tiny_model, data, limits=limits, max_steps=steps)
        job.call("start")
        job.wait(lambda: job.step() >= 2 * SAVE_STEPS + 1, "some steps")
        kept = [step for step, _ in checkpoints.folders(job.folder.output)]
        worker = job.worker()
        disk.refuse()
        if way == "full":
            # The worker waits with its next checkpoint, and says so past the disk.
            time.sleep(10)
            assert Path(f"/proc/{worker}").exists()
            disk.take()
        else:
            job.wait(lambda: not Path(f"/proc/{worker}").exists(), "the worker's end")
            disk.take()
            job.wait_for_end("failed")
            assert job.folder.status().failure == "read_only"
            newest, _ = checkpoints.newest_valid(job.folder.output)
            assert newest is not None
            assert newest.step >= max(kept)
            job.call("start")
        job.wait_for_end("succeeded")
        assert sorted(job.losses()) == list(range(1, steps + 1))
        assert "took nothing for" in job.events("note")[0]["text"]
        assert [why["step"] % SAVE_STEPS for why in job.events("paused")] == [0]
