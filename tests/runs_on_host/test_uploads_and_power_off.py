"""What lies before and after a run on a host: its base model from here, a prediction with it,
and the power-off. The tests run in the order of the file, on one provisioned host."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import cli
from replica.replica import Replica
from replica_fixtures import PROVISIONED, HostProject, inv
from support import as_fetched, lacking
from tunesmith.core.errors import TunesmithError
from tunesmith.core.files import sha256_of
from tunesmith.plan.build import plan_merge
from tunesmith.plan.start import start_on_run
from tunesmith.project import Project
from tunesmith.targets.factory import target_of
from tunesmith.targets.host import HostTarget

pytestmark = pytest.mark.host

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SHORT = ("--no-evaluate", "max_steps=2", "save_steps=2", "max_samples=16", "--queue")
PREDICT = "configs/predict/smollm2_135m_lora_sft.yaml"
# So slow that the line can be cut while the weights are under way.
KBYTES_PER_SECOND = 12_000
Provisioned = tuple[HostProject, Replica]


def base(replica: Replica) -> Path:
    """Tunesmith's folder of the host, as this machine sees it."""
    return replica.disk / "tunesmith"


def inputs(replica: Replica, run: str) -> dict[str, str]:
    folder = base(replica) / "runs" / run / "inputs"
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}


@pytest.fixture(scope="module")
def trained(provisioned_host: Provisioned) -> Iterator[Provisioned]:
    """The host with a run `short` on it, two steps long."""
    made, replica = provisioned_host
    inv(made, "train", "--on", PROVISIONED, "--run", "short", *SHORT)
    yield made, replica
    for run in json.loads(made.inv("runs", "--on", PROVISIONED, "--json").stdout):
        inv(made, "rm", "--on", PROVISIONED, "--run", run["run_id"])


def test_a_prediction_leaves_the_data_of_the_training_alone(trained: Provisioned) -> None:
    made, replica = trained
    before = inputs(replica, "short")
    file = made.project.root / "data" / "philosophy_data.json"
    kept = file.read_bytes()
    rows = json.loads(kept)
    file.write_text(json.dumps(rows[-4:], ensure_ascii=False), encoding="utf-8")
    try:
        words = ("--on", PROVISIONED, "--run", "short", "--config", PREDICT, "max_new_tokens=4")
        said = inv(made, "predict", *words)
        fresh = sha256_of(file)
    finally:
        file.write_bytes(kept)
    assert "predict_rouge-l" in said
    assert f"answers: {PROVISIONED}:" in said
    after = inputs(replica, "short")
    assert after.items() >= before.items()
    assert after["predict/dataset_dir/philosophy_data.json"] == fresh
    assert after["dataset_dir/philosophy_data.json"] != fresh
    folder = base(replica) / "runs/short/predict/philosophy_conch"
    answers = folder / "generated_predictions.jsonl"
    assert [json.loads(line)["label"].strip() for line in answers.read_text().splitlines()] == [
        row["output"].strip() for row in rows[-4:]
    ]


@pytest.fixture(scope="module")
def model(trained: Provisioned, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the base model on this machine."""
    (stored,) = (base(trained[1]) / "models").glob("*SmolLM2*@*")
    copy = tmp_path_factory.mktemp("laptop") / "SmolLM2"
    shutil.copytree(stored, copy, ignore=shutil.ignore_patterns("tunesmith-model.json"))
    return copy


@pytest.fixture
def with_environment(
    trained: Provisioned, model: Path, project: Project, training_python: Path
) -> Iterator[Path]:
    """The clone with base model and training environment, as a laptop has them: the link to it."""
    made, _ = trained
    inv(made, "model.fetch", MODEL, "--from", str(model))
    link = made.project.environment().path
    link.parent.mkdir()
    link.symlink_to(training_python.parent.parent)
    yield link
    shutil.rmtree(link.parent)
    shutil.rmtree(made.project.models)
    shutil.rmtree(made.project.runs)


def test_a_pull_that_merges_here_has_the_bytes_of_a_merge_there(
    trained: Provisioned, with_environment: Path
) -> None:
    made, replica = trained
    with made.entered():
        target = target_of(made.project, PROVISIONED, print)
        # Without its proof, which is another half minute.
        planned = plan_merge(made.project, target, "short", ())
        plan = dataclasses.replace(planned, phases=("merge",))
        offset = target.events("short", 0)[1]
        start_on_run(target, plan)
        *_, last = target.watch("short", offset)
    assert last.status.phases["merge"] == "succeeded", last.status.message
    there = base(replica) / "runs" / "short" / "merged"
    wanted = {file.name: sha256_of(file) for file in there.iterdir()}
    del wanted["MANIFEST.json"]
    here = made.project.runs / "short" / "merged"
    words = ("pull", "--on", PROVISIONED, "--run", "short")

    def merged() -> dict[str, str]:
        return {name: sha256_of(here / name) for name in wanted}

    def record() -> dict[str, str]:
        (run,) = (r for r in json.loads(inv(made, "runs", "--json")) if r["run_id"] == "short")
        phases: dict[str, str] = run["phases"]
        return {name: state for name, state in phases.items() if name in ("merge", "proof")}

    said = inv(made, "--dry", *words, "--merge-here", "--mirror", "cn")
    assert f"would merge its adapter with {MODEL} in {made.project.models}" in said
    assert not here.parent.exists()
    sent = bytes_sent(replica)
    said = inv(made, *words, "--merge-here")
    assert bytes_sent(replica) - sent < 0.1 * (there / "model.safetensors").stat().st_size
    assert "proof: succeeded" in said
    assert f"merged model: {here}" in said
    assert merged() == wanted
    assert json.loads((here.parent / "proof.json").read_text())["passed"]
    # The host has no proof, and what was done here is known after another pull.
    events = (here.parent / "events.jsonl").read_bytes()
    assert "merge, proof: done here, stays" in inv(made, *words, "--what", "log,report")
    assert record() == {"merge": "succeeded", "proof": "succeeded"}
    assert (here.parent / "events.jsonl").read_bytes() == events
    assert merged() == wanted
    # Where nothing is installed but the control half, only the sums may differ in the last bit.
    with_environment.unlink()
    said = inv(made, *words, "--merge-here")
    assert "merging with NumPy, result not verified" in said
    assert json.loads((here / "MANIFEST.json").read_text())["arithmetic"] == "numpy"
    weights = {"model.safetensors"}
    by_numpy = merged()
    assert {n: by_numpy[n] for n in wanted.keys() - weights} == {
        n: wanted[n] for n in wanted.keys() - weights
    }
    inv(made, *words, "--what", "log")
    assert (here.parent / "output/adapter_model.safetensors").is_file()
    assert merged() == by_numpy
    assert record() == {"merge": "succeeded"}
    said = inv(made, *words, "--what", "merged")
    assert f"merged: {PROVISIONED}'s has taken the place of what was made here" in said
    assert merged() == wanted
    assert record() == {"merge": "succeeded"}
    theirs = base(replica) / "runs/short/events.jsonl"
    assert (here.parent / "events.jsonl").read_bytes() == theirs.read_bytes()


def bytes_sent(replica: Replica) -> int:
    return int(replica.sh("cat /sys/class/net/eth0/statistics/tx_bytes"))


def forget_model(replica: Replica) -> None:
    for stored in (base(replica) / "models").glob("*SmolLM2*@*"):
        shutil.rmtree(stored)


def test_only_the_rest_of_a_base_model_is_sent_after_a_cut(
    trained: Provisioned, model: Path, tmp_path: Path
) -> None:
    made, replica = trained
    real = shutil.which("rsync")
    if real is None:
        lacking("no rsync", "`apt-get install rsync`")
    program = tmp_path / "bin/rsync"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {real} --bwlimit={KBYTES_PER_SECOND} "$@"\n')
    program.chmod(0o755)
    forget_model(replica)
    weights = (model / "model.safetensors").stat().st_size
    words = ("train", "--on", PROVISIONED, "--run", "carried", "--from-laptop", str(model), *SHORT)
    environment = made.environment | {"PATH": f"{program.parent}:{os.environ['PATH']}"}

    def begin(log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as stream:
            return subprocess.Popen(
                [sys.executable, "-m", "invoke", *words],
                cwd=made.project.root,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )

    def wait(share: float, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + 120
        while arrived(replica) < share * weights:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)

    received = bytes_received(replica)
    first = begin(tmp_path / "first.log")
    wait(0.3, first)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    second = begin(tmp_path / "second.log")
    time.sleep(1)
    wait(0.6, second)
    assert replica.cut_ssh("kill") > 0
    assert second.wait(timeout=300) == 0, (tmp_path / "second.log").read_text()
    said = (tmp_path / "second.log").read_text()
    assert "the connection was cut" in said
    assert re.search(r"^uploading: .* of 27\d\.\d MB \(\d+ %\)  .*MB/s  ETA \d", said, re.M)
    assert f"{MODEL} is on {PROVISIONED}, every file with the sha256 it has here" in said
    assert bytes_received(replica) - received < 1.15 * weights
    (stored,) = (base(replica) / "models").glob("*SmolLM2*@*")
    for file in model.iterdir():
        assert sha256_of(stored / file.name) == sha256_of(file), file.name
    request = json.loads((base(replica) / "runs/carried/run.json").read_text())
    assert request["model"]["source"].startswith("folder:")
    assert list((base(replica) / "uploads/models").iterdir()) == []


def arrived(replica: Replica) -> int:
    """Bytes of the largest file of a base model that is being sent."""
    sizes = [0]
    for path in (base(replica) / "uploads" / "models").rglob("*"):
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:
            continue  # it has just got its name
    return max(sizes)


def bytes_received(replica: Replica) -> int:
    return int(replica.sh("cat /sys/class/net/eth0/statistics/rx_bytes"))


def test_a_base_model_that_arrives_damaged_is_not_taken(trained: Provisioned, model: Path) -> None:
    made, replica = trained
    forget_model(replica)
    # Same size and time, so that rsync passes it over, as after a write that was lost.
    key = hashlib.sha256(MODEL.encode()).hexdigest()[:16]
    upload = base(replica) / "uploads" / "models" / key
    shutil.copytree(model, upload)
    content = bytearray((model / "model.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    stamp = (model / "model.safetensors").stat()
    (upload / "model.safetensors").write_bytes(content)
    os.utime(upload / "model.safetensors", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    said: list[str] = []
    with made.entered():
        target = target_of(made.project, PROVISIONED, said.append)
        assert isinstance(target, HostTarget)
        with pytest.raises(TunesmithError, match=r"model.safetensors did not arrive as it is"):
            target.send_model(MODEL, model)
        assert not list((base(replica) / "models").glob("*SmolLM2*@*"))
        target.send_model(MODEL, model)
        sent = bytes_received(replica)
        target.send_model(MODEL, model)
    assert said[-1] == f"base model: {MODEL} is on {PROVISIONED} already"
    assert bytes_received(replica) - sent < 1_000_000


def test_a_host_may_resume_its_runs_itself(trained: Provisioned) -> None:
    made, replica = trained
    replica.sh("echo 'echo mine' >/etc/autodl.sh")
    for _ in range(2):
        assert "by /etc/autodl.sh" in inv(made, "host.autostart", "--on", PROVISIONED)
    assert replica.sh("grep -c 'BEGIN tunesmith' /etc/autodl.sh") == "1\n"
    words = [word for word in SHORT if not word.startswith("max_")]
    inv(made, "train", "--on", PROVISIONED, "--run", "cut", "--no-attach", *words)
    folder = base(replica) / "runs" / "cut"
    heartbeat, events = folder / "heartbeat.json", folder / "events.jsonl"
    deadline = time.monotonic() + 120
    while not heartbeat.exists() or (json.loads(heartbeat.read_text()).get("step") or 0) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    replica.reboot()
    while '"resumed"' not in events.read_text():
        assert time.monotonic() < deadline + 60, (base(replica) / "autostart.log").read_text()
        time.sleep(0.2)
    inv(made, "stop", "--on", PROVISIONED, "--run", "cut")
    # A rebuild takes the line; whoever looks after the host next brings it back.
    replica.sh("rm /etc/autodl.sh")
    with made.entered():
        target = target_of(made.project, PROVISIONED, print)
        assert isinstance(target, HostTarget)
        target.renew_autostart()
        assert "autostart.sh" in replica.sh("cat /etc/autodl.sh")
        replica.sh("echo 'echo mine' >>/etc/autodl.sh")
        inv(made, "host.autostart", "--on", PROVISIONED, "--off")
        assert replica.sh("cat /etc/autodl.sh") == "echo mine\n"
        target.renew_autostart()
        assert replica.sh("cat /etc/autodl.sh") == "echo mine\n"


@pytest.fixture
def power_offs(trained: Provisioned) -> Iterator[Path]:
    """The file in which the host's shutdown notes that it was called; it does its work, too."""
    _, replica = trained
    mount = replica.options.mount
    replica.sh(
        f"cp /usr/bin/shutdown /root/shutdown && sed -i '2i date >>{mount}/power-offs' "
        "/usr/bin/shutdown"
    )
    notes = replica.disk / "power-offs"
    notes.write_text("")
    yield notes
    if not replica.running():
        replica.on()
    replica.sh("mv /root/shutdown /usr/bin/shutdown")
    notes.unlink()


def test_a_host_is_powered_off_once_and_only_after_a_whole_pull(
    trained: Provisioned, power_offs: Path, tmp_path: Path
) -> None:
    made, replica = trained
    last = ("--then", "report,pull,poweroff")
    # A run that fails.
    words = ("train", "--on", PROVISIONED, *last, *SHORT)
    with cli.clients(made.project.root, made.environment) as start:
        falling = start(*words, "--run", "falls", "max_steps=200")
        falling.wait_for("^step 1/", seconds=1200)
        replica.sh("pkill -KILL -f tunesmith.job; true", check=False)
        assert falling.end() == 1
    assert power_offs.read_text() == ""
    # A pull that is not whole: this machine's rsync leaves a wrong byte behind.
    real = shutil.which("rsync")
    program = tmp_path / "bin/rsync"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\n{real} "$@" || exit\nfor into; do :; done\n'
        "weights=$into/output/adapter_model.safetensors\n"
        '[ ! -f "$weights" ] || printf x | dd of="$weights" bs=1 seek=9999 conv=notrunc 2>&1\n'
    )
    program.chmod(0o755)
    environment = made.environment | {"PATH": f"{program.parent}:{os.environ['PATH']}"}
    done = cli.run(made.project.root, *words, "--run", "last", env=environment)
    assert done.returncode == 1, done.stdout
    assert "output/adapter_model.safetensors has changed while it was fetched" in done.stderr
    assert power_offs.read_text() == ""
    assert not (made.project.runs / "last").exists()
    # Whole: then it goes off.
    said = inv(made, "attach", "--on", PROVISIONED, "--run", "last")
    assert said.index("pulled: ") < said.index(f"{PROVISIONED}: powering off")
    assert f"{PROVISIONED}: off; " in said
    pulled = json.loads((made.project.runs / "last" / "pulled.json").read_text())["files"]
    for name, record in pulled.items():
        file = as_fetched(made.project.runs / "last", name)
        assert sha256_of(file) == record["sha256"], name
    assert len(power_offs.read_text().splitlines()) == 1
    deadline = time.monotonic() + 120
    while replica.running():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    # The next day it is switched on again, and somebody looks.
    replica.on()
    said = inv(made, "attach", "--on", PROVISIONED, "--run", "last")
    assert f"{PROVISIONED} stays on: run last has had its `/usr/bin/shutdown`" in said
    assert len(power_offs.read_text().splitlines()) == 1
