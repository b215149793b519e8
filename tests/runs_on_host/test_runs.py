"""Runs on a host as their users have them: leave, come back, lose the line, lose the host.

One provisioned host; two runs. `path` is the whole way of a user, `long` is what faults are
done to. The tests run in the order of the file.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import cli
from cli import Client
from replica.replica import Replica
from replica_fixtures import PROVISIONED, HostProject, inv
from support import as_fetched

pytestmark = pytest.mark.host

RUNS = "/root/autodl-tmp/tunesmith/runs"
SAVE_STEPS = 4
Provisioned = tuple[HostProject, Replica]


@pytest.fixture
def client(
    provisioned_host: Provisioned,
) -> Iterator[Callable[..., Client]]:
    """Start `inv` in the background; what still runs at the end is ended."""
    made = provisioned_host[0]
    with cli.clients(made.project.root, made.environment) as start:
        yield start


def listed(made: HostProject) -> dict[str, dict[str, Any]]:
    """Return the runs of all targets by id, as `inv runs` knows them."""
    done = made.inv("runs", "--on", "all", "--json")
    cli.said(done)
    return {run["run_id"]: run for run in json.loads(done.stdout)}


def steps(events: list[dict[str, Any]]) -> list[int]:
    return [event["step"] for event in events if event["event"] == "log"]


def events_of(replica: Replica, run: str) -> list[dict[str, Any]]:
    text = replica.sh(f"cat {RUNS}/{run}/events.jsonl")
    return [json.loads(line) for line in text.splitlines()]


def test_a_training_is_left_with_ctrl_c_and_found_again_from_another_folder(
    provisioned_host: Provisioned, client: Callable[..., Client], tmp_path: Path
) -> None:
    made, _ = provisioned_host
    training = client(
        *("train", "--on", PROVISIONED, "--run", "path", "--then", "merge"),
        *("--prompts", "configs/prompts/philosophy.yaml", "--price", "1.98/h"),
        *("max_steps=12", f"save_steps={SAVE_STEPS}", "max_samples=48", "--queue"),
    )
    training.wait_for(r"^run path on gpu1$")
    training.wait_for(r"^measuring the base model")
    training.process.send_signal(signal.SIGINT)
    assert training.end() == 0
    assert "the run goes on; `inv attach --on gpu1 --run path` follows it" in training.said
    # Another laptop has the key and the inventory, and nothing of what this one did.
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(made.project.root, elsewhere, symlinks=True)
    attached = client("attach", "--on", PROVISIONED, root=elsewhere)
    attached.wait_for(r"^step 12/12  loss ", seconds=600)
    assert attached.end(600) == 0, attached.said
    assert re.search(r"step \d+/12  loss [\d.]+  lr \S+  \d+ tok/s .*cost 0\.\d\d", attached.said)
    for phase in ("fetch", "before", "train", "after", "merge", "proof"):
        assert re.search(rf"{phase}: succeeded after", attached.said), attached.said
    assert re.search(r"^report: .*report\.html", attached.said, re.M)
    assert "autodl deletes an instance and its disk 15 days after power-off" in attached.said


def test_what_was_made_there_is_used_like_what_is_made_here(
    provisioned_host: Provisioned,
) -> None:
    made, _ = provisioned_host
    path = listed(made)["path"]
    assert (path["on"], path["state"]) == (PROVISIONED, "succeeded")
    words = ("--what", "merged", "--greedy", "--prompt", "What is the conch?")
    there = made.inv("chat", "--on", PROVISIONED, "--run", "path", *words)
    assert there.returncode == 0, there.stderr
    assert len(there.stdout.strip()) > 3
    shown = inv(made, "report", "--on", PROVISIONED)
    assert "Held-out loss" in shown
    log = inv(made, "logs", "--on", PROVISIONED, "--run", "path")
    assert "train" in log.lower()


def test_a_run_goes_on_from_the_result_of_one_that_lies_there(
    provisioned_host: Provisioned,
) -> None:
    made, replica = provisioned_host
    said = inv(
        made,
        *("train", "--on", PROVISIONED, "--run", "on", "--no-evaluate", "--queue"),
        *("adapter_name_or_path=run:path", "max_steps=1", "max_samples=8"),
    )
    assert "uploading what changed of 2 files" in said, "the rows and their registry, no adapter"
    start = f"{RUNS}/on/inputs/adapter_name_or_path/0/adapter_model.safetensors"
    links, digest = replica.sh(f"stat -c %h {start}; sha256sum {start}").split()[:2]
    assert links == "2", "it is linked, not copied"
    request = json.loads(replica.sh(f"cat {RUNS}/on/run.json"))
    assert request["inputs"]["train"]["files"][start]["sha256"] == digest
    [origin] = request["origins"]
    assert (origin["run"], origin["host"], origin["result"]) == ("path", PROVISIONED, "output")
    assert f"Loaded adapter(s): {Path(start).parent}" in replica.sh(f"cat {RUNS}/on/train.log")
    assert listed(made)["on"]["origins"] == ["run:path"]
    inv(made, "rm", "on", "--on", PROVISIONED)


def test_a_pull_is_complete_or_absent_though_the_line_is_cut(
    provisioned_host: Provisioned, client: Callable[..., Client]
) -> None:
    made, replica = provisioned_host
    final = made.project.runs / "path"
    sent = _bytes_sent(replica)
    cuts = 0
    pulling = client("pull", "--on", PROVISIONED, "--run", "path")
    pulling.wait_for(r"^pulling \d+ files")
    while pulling.process.poll() is None and cuts < 10:
        # The kept connection and rsync's own: whatever is open.
        cuts += replica.cut_ssh("kill") > 0
        assert not final.exists()
        time.sleep(0.4)
    assert pulling.end() == 0, pulling.said
    assert cuts >= 3, "the pull was over before the line was cut often enough"
    manifest = json.loads((final / "pulled.json").read_text())["files"]
    assert {"run.json", "train.log", "output/adapter_model.safetensors"} <= manifest.keys()
    assert "merged/model.safetensors" in manifest
    for name, record in manifest.items():
        there = replica.sh(f"sha256sum {RUNS}/path/{name}").split()[0]
        file = as_fetched(final, name)
        here = subprocess.run(["sha256sum", str(file)], capture_output=True, text=True)
        assert there == here.stdout.split()[0] == record["sha256"], name
    total = sum(record["size"] for record in manifest.values())
    assert _bytes_sent(replica) - sent <= 1.3 * total
    # Again: nothing has changed, so nothing is fetched.
    sent = _bytes_sent(replica)
    again = inv(made, "pull", "--on", PROVISIONED, "--run", "path")
    assert "pulling" not in again
    assert _bytes_sent(replica) - sent < 1_000_000


def _bytes_sent(replica: Replica) -> int:
    """Return the bytes the host has sent on its network so far."""
    return int(replica.sh("cat /sys/class/net/eth0/statistics/tx_bytes"))


def test_of_two_that_start_at_once_one_works_and_the_other_is_told(
    provisioned_host: Provisioned, client: Callable[..., Client]
) -> None:
    made, replica = provisioned_host
    words = ("train", "--on", PROVISIONED, "--no-attach", "--no-evaluate", "max_steps=100")
    both = [client(*words, "--run", f"two-{number}") for number in (1, 2)]
    codes = [one.end() for one in both]
    assert sorted(codes) == [0, 2], [one.said for one in both]
    winner, loser = (f"two-{number}" for number in ((1, 2) if codes[0] == 0 else (2, 1)))
    said = both[0 if codes[0] == 2 else 1].said
    assert re.search(rf"run {winner} works on this host.*`inv train --on gpu1 --queue`", said), said
    # The one that waits is queued; it leaves the queue when asked to.
    inv(made, *words, "--run", "two-3", "--queue")
    states = {
        r["run_id"]: r["state"]
        for r in json.loads(made.inv("runs", "--on", "gpu1", "--json").stdout)
    }
    assert states["two-3"] == "queued"
    inv(made, "stop", "--on", PROVISIONED, "--run", "two-3")
    inv(made, "stop", "--on", PROVISIONED, "--run", winner)
    assert loser not in listed(made), "what was refused leaves nothing behind"
    for name in (winner, "two-3"):
        inv(made, "rm", "--on", PROVISIONED, "--run", name)
    assert "two-" not in replica.sh(f"ls {RUNS}")


def test_a_run_does_not_notice_what_happens_to_the_line(
    provisioned_host: Provisioned, client: Callable[..., Client]
) -> None:
    replica = provisioned_host[1]
    attached = client(
        *("train", "--on", PROVISIONED, "--run", "long", "--no-evaluate"),
        *("num_train_epochs=20", f"save_steps={SAVE_STEPS}", "eval_steps=1000"),
    )
    attached.wait_for(r"^step \d+/")
    hit = 0
    for _ in range(20):
        hit += replica.cut_ssh("kill") > 0
        time.sleep(0.5)
    assert hit >= 10
    back = attached.wait_for(r"^step \d+/", begin=len(attached.lines))
    assert attached.said.count("back after") >= 5
    # Half open: packets vanish, nobody says a word.
    silent = time.monotonic()
    replica.cut_ssh("drop")
    try:
        lost = attached.wait_for(r"looking for the host", seconds=120, begin=len(attached.lines))
        # TCP itself would wait for a quarter of an hour.
        assert attached.times[lost] - silent <= 90
        assert replica.cut_packets() > 0
    finally:
        replica.heal_ssh()
    attached.wait_for(r"^back after", seconds=120, begin=lost)
    attached.wait_for(r"^step \d+/", begin=back)
    shown = [int(n) for n in re.findall(r"(?m)^step (\d+)/", attached.said)]
    assert shown == sorted(set(shown))
    known = steps(events_of(replica, "long"))
    assert known == list(range(1, len(known) + 1))
    begun = [e["phase"] for e in events_of(replica, "long") if e["event"] == "phase_started"]
    assert begun == ["check", "fetch", "train"], "no phase twice"


def test_a_host_that_loses_power_costs_no_more_than_save_steps(
    provisioned_host: Provisioned, client: Callable[..., Client]
) -> None:
    made, replica = provisioned_host
    replica.reboot()
    before = steps(events_of(replica, "long"))[-1]
    long = listed(made)["long"]
    assert (long["state"], long["failure"]) == ("failed", "killed")
    again = client("resume", "--on", PROVISIONED)
    again.wait_for(r"^run long: continues")
    line = again.wait_for(r"^resumed at step \d+/")
    resumed = int(re.findall(r"\d+", again.lines[line])[0])
    assert resumed > 0
    assert before - resumed <= SAVE_STEPS
    again.wait_for(r"^step \d+/", begin=line)


def test_a_rebuilt_host_is_healed_and_continues(
    provisioned_host: Provisioned, client: Callable[..., Client]
) -> None:
    made, replica = provisioned_host
    replica.rebuild()
    before = steps(events_of(replica, "long"))[-1]
    refused = made.inv("resume", "--on", PROVISIONED)
    assert refused.returncode == 1
    assert "is not the pinned one; no command was sent" in refused.stderr
    inv(made, "host.trust", PROVISIONED)
    healed = client("resume", "--on", PROVISIONED, "--mirror", str(made.mirror))
    healed.wait_for(r"^run long: continues", seconds=600)
    line = healed.wait_for(r"^resumed at step \d+/")
    assert before - int(re.findall(r"\d+", healed.lines[line])[0]) <= SAVE_STEPS
    inv(made, "stop", "--on", PROVISIONED, "--run", "long")
    assert healed.end() == 0
    assert re.search(r"run long: stopped at step \d+", healed.said)
    assert " 0 failed" in inv(made, "host.verify", "--on", PROVISIONED)
    inv(made, "rm", "--on", PROVISIONED, "--run", "long")
