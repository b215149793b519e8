"""What a client may rely on when it asks a host about runs; real processes, no training.

The fetch phase is what works here: it is real, needs no torch, and a hub that stalls keeps
it at work for as long as a test wants.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from agents import Agent, digest
from event_rows import event_rows
from hubserver import COMMIT, Hub, tiny_model
from support import THOROUGH
from tunesmith.core.files import read_json, write_json
from tunesmith.job.run.codec import encode
from tunesmith.job.run.schema import GpuFigures, Limits

pytestmark = pytest.mark.contract

STALLS = [100] * 50


@pytest.fixture
def stalled(hub: Hub) -> Hub:
    hub.stall["model.safetensors"] = list(STALLS)
    return hub


def upload(tmp_path: Path, content: bytes, **changed: Any) -> dict[str, Any]:
    file = tmp_path / "uploads" / "rows.json"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    record = {"source": str(file), "size": len(content), "sha256": digest(content)}
    return record | changed


def test_a_run_is_made_whole_or_not_at_all(agent: Agent, tmp_path: Path) -> None:
    order = {
        "run_id": "one",
        "request": {"phases": []},
        "config": {"template": "模板"},
        "inputs": {"data/rows.json": upload(tmp_path, b"[1]")},
    }
    for changed in ({"sha256": digest(b"[2]")}, {"size": 4}, {"source": str(tmp_path / "no")}):
        record = order["inputs"]["data/rows.json"] | changed  # type: ignore[index]
        bad = order | {"inputs": {"data/rows.json": record}}
        assert "input data/rows.json" in agent.ask("create", stdin=bad, code=2)["error"]
        assert list(agent.runs.iterdir()) == []
    for name in ("../../escaped", "/tmp/escaped"):
        bad = order | {"inputs": {name: upload(tmp_path, b"[1]")}}
        assert "outside the run" in agent.ask("create", stdin=bad, code=2)["error"]
    for run_id in ("", ".hidden", "a/b", "-x"):
        assert "run id" in agent.ask("create", stdin=order | {"run_id": run_id}, code=2)["error"]
    assert list(agent.runs.iterdir()) == []

    # What killed ones have left goes with the next.
    (agent.runs / ".zero.removed-7").mkdir()
    (agent.runs / ".one.incoming-old").mkdir()
    os.utime(agent.runs / ".one.incoming-old", (0, 0))
    answer = agent.ask("create", stdin=order)
    assert answer == {"run_id": "one"}
    run = agent.folder("one")
    assert (run.path / "inputs/data/rows.json").read_bytes() == b"[1]"
    assert yaml.safe_load(run.config_file.read_text()) == {"template": "模板"}
    assert "already exists" in agent.ask("create", stdin=order, code=2)["error"]
    assert [path.name for path in agent.runs.iterdir()] == ["one"]


def test_later_uploads_do_not_change_a_run(agent: Agent, tmp_path: Path) -> None:
    order = {"request": {"phases": []}, "config": None}
    first = {"inputs": {"rows.json": upload(tmp_path, b"[1]")}}
    agent.ask("create", stdin=order | first | {"run_id": "one"})
    source = Path(first["inputs"]["rows.json"]["source"])
    assert source.stat().st_nlink == 2, "a large file is not copied"
    source.unlink()
    taken = agent.folder("one").path / "inputs/rows.json"
    second = {"inputs": {"rows.json": upload(tmp_path, b"[2]")}}
    assert taken.read_bytes() == b"[1]"
    agent.ask("renew", "one", stdin=order | second)
    agent.ask("renew", "one", stdin=order | second)
    assert taken.read_bytes() == b"[2]"


def test_of_two_that_make_one_run_one_succeeds(agent: Agent) -> None:
    order = json.dumps({"run_id": "one", "request": {"phases": []}, "config": {}})
    for _ in range(3):
        started = [
            subprocess.Popen(
                agent.argv("create"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for _ in range(2)
        ]
        for process in started:
            assert process.stdin is not None
            process.stdin.write(order)
            process.stdin.close()
        assert sorted(process.wait() for process in started) == [0, 2]
        agent.ask("remove", "one")


def test_questions_about_runs(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")  # a host with an odd locale
    assert agent.ask("runs") == {"runs": []}
    assert "no runs in" in agent.ask("find", code=2)["error"]
    for run_id in ("b", "a", "c"):
        agent.create(run_id, {"phases": []}, {"template": "x"})
    os.utime(agent.folder("a").request_file)
    assert agent.ask("find") == {"run_id": "a"}
    assert agent.ask("find", "b") == {"run_id": "b"}
    refused = agent.ask("find", "z", code=2)["error"]
    assert "no run 'z'; the newest are a, b, c" in refused
    shown = agent.ask("show", "a")
    assert (shown["request"]["title"], shown["config"]) == ("run a", {"template": "x"})
    assert shown["status"]["state"] == "queued"
    agent.folder("b").request_file.write_text("{")
    listed = agent.ask("runs")["runs"]
    assert [(run["run_id"], run["state"]) for run in listed] == [
        ("b", "failed"),
        ("a", "queued"),
        ("c", "queued"),
    ]
    assert listed[0]["failure"] == "damaged"
    assert listed[1]["path"] == str(agent.runs / "a")
    renewed = {"request": {"phases": [], "title": "另一个", "created": "a"}}
    agent.ask("renew", "a", stdin=renewed)
    assert agent.ask("show", "a")["request"]["title"] == "另一个"


def test_what_is_refused_is_json_too(agent: Agent) -> None:
    assert "invalid choice" in agent.ask("dance", code=2)["error"]
    assert "required" in agent.ask("stop", code=2)["error"]
    assert "not JSON" in agent.ask("create", code=2)["error"]
    agent.create("one", {"phases": []})
    assert "unknown part 'soul'" in agent.ask("manifest", "one", "--what", "soul", code=2)["error"]
    assert "is not running" in agent.ask("stop", "one", code=2)["error"]


def test_an_answer_is_quick_and_loads_nothing_heavy(agent: Agent) -> None:
    modules = "tunesmith.job.supervisor.agent, tunesmith.job.supervisor.supervisor"
    code = f"import sys, {modules}; print(*sys.modules)"
    said = subprocess.run([agent.python, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "rich", "huggingface_hub", "transformers", "tunesmith.basemodel.fetch"}
    assert not heavy & set(said.stdout.split())
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for _ in range(5):
        agent.ask("runs")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 5
    # Of a processor's time, whatever else it does; torch alone takes more.
    assert seconds < 2, f"{seconds:.2f} s of CPU an answer"


def test_a_run_fetches_its_model_and_says_where_it_lies(agent: Agent, hub: Hub) -> None:
    run = agent.create_fetch("one", hub, model={"name": "org/tiny", "path": None})
    stamp = run.request_file.stat().st_mtime_ns
    agent.ask("start", "one")
    lines = list(agent.watch("one", "--log", "0"))
    assert lines[-1]["status"]["state"] == "succeeded", lines[-1]
    assert lines[-1]["status"]["phases"] == {"fetch": "succeeded"}
    told = [event for line in lines for event in line["events"]]
    assert told[0]["event"] == "run_started"
    assert told[-1]["event"] == "run_ended"
    progress = [event for event in told if event["event"] == "progress"]
    assert {event["phase"] for event in progress} == {"fetch"}
    assert progress[-1]["done"] <= progress[-1]["total"]
    assert any(event["event"] == "note" for event in told)

    shown = agent.ask("show", "one")
    model = shown["request"]["model"]
    assert model["source"] == f"hub:{hub.url}"
    assert (model["name"], model["revision"]) == ("org/tiny", COMMIT)
    weights = tiny_model()["model.safetensors"]
    assert model["files"]["model.safetensors"] == {"size": len(weights), "sha256": digest(weights)}
    assert shown["config"]["model_name_or_path"] == model["path"]
    assert (Path(model["path"]) / "model.safetensors").read_bytes() == weights
    assert run.request_file.stat().st_mtime_ns == stamp, "a fetch must not make it the newest"

    asked = len(hub.seen)
    agent.ask("start", "one", "fetch")
    agent.wait(lambda: len(agent.events("one", "run_ended")) == 2, "the second end")
    assert agent.wait_for("one", "succeeded").phases == {"fetch": "succeeded"}
    assert len(hub.seen) == asked, "what is proven costs no network"


def test_every_start_says_its_cause(agent: Agent, hub: Hub) -> None:
    run = agent.create_fetch("one", hub)
    refused = agent.ask("start", "one", "--cause", "whim", code=2)["error"]
    assert "invalid choice: 'whim'" in refused
    agent.ask("start", "one", "--cause", "resume")
    assert agent.wait_for("one", "succeeded").cause == "resume"
    agent.wait(lambda: not run.busy(), "the end")
    agent.ask("start", "one", "fetch")
    agent.wait(lambda: len(agent.events("one", "run_ended")) == 2, "the second end")
    status = agent.wait_for("one", "succeeded")
    assert (status.cause, status.retried) == ("user", None)
    assert [e["cause"] for e in agent.events("one", "run_started")] == ["resume", "user"]
    first, *rest = run.log_file.read_text().splitlines()
    words = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ run one started "
    assert re.fullmatch(words + r"\(resume\): fetch", first)
    assert [line for line in rest if re.fullmatch(words + r"\(user\): fetch", line)]


def test_a_model_that_cannot_be_had_says_which_source_failed_how(agent: Agent, hub: Hub) -> None:
    limits = {"limits": {"retry_seconds": 0.1, "restarts": 2}}
    agent.create_fetch("one", "http://127.0.0.1:9", **limits)
    agent.ask("start", "one")
    status = agent.wait_for("one", "failed")
    assert status.failure == "model"
    assert "org/tiny at main: no source can be reached (1 source tried)" in status.message
    assert "inv resume --run one" in status.message
    assert any("http://127.0.0.1:9: no connection" in line for line in status.detail)
    assert len(agent.events("one", "phase_started")) == 3, "it may pass: twice more"
    assert (status.cause, status.retried) == ("retry", "model")
    assert agent.events("one", "run_started")[0]["cause"] == "user"
    agent.ask("start", "one")

    hub.repos.clear()
    agent.create_fetch("two", hub, **limits)
    agent.ask("start", "two")
    status = agent.wait_for("two", "failed")
    assert (status.failure, len(agent.events("two", "phase_started"))) == ("model", 1)
    assert any(line.startswith(hub.url) for line in status.detail)
    agent.wait_for("one", "failed")


def test_a_watch_misses_nothing_and_shows_life(agent: Agent, stalled: Hub) -> None:
    run = agent.create_fetch("one", stalled)
    with run.log_file.open("ab") as log:
        log.write("日志 line\n".encode() * 60_000)
    agent.ask("start", "one")
    began, silence, text, offset = time.monotonic(), [], "", 0
    written_at = heard_at = 0.0
    for line in agent.watch("one", "--log", "0"):
        silence.append(time.monotonic() - began)
        began = time.monotonic()
        assert len(line["log"].encode()) <= 256 * 1024
        text, offset = text + line["log"], line["log_offset"]
        if "last" in line["log"]:
            break
        if "fresh" in line["log"]:
            heard_at = time.monotonic()
            with run.log_file.open("ab") as log:
                log.write("最".encode()[1:] + b"last\n")
        elif written_at == 0 and "more" not in line and len(silence) > 6:
            # After a sign of life: half a character first, the rest in the next write.
            with run.log_file.open("ab") as log:
                log.write(b"fresh " + "最".encode()[:1])
            written_at = time.monotonic()
    content = run.log_file.read_bytes()
    assert text.encode() == content[:offset]
    assert len(text) > 400_000
    # A sign of life comes every 3 s; beside other work it may be late, but it comes.
    assert max(silence) < 30, silence
    assert 0 < heard_at - written_at < 30
    rest = agent.ask("watch", "one", "--once", "--log", str(offset), "--events", "0")
    assert (rest["log"], rest["log_offset"]) == (content[offset:].decode(), len(content))
    assert rest["events"][0]["event"] == "run_started"
    seen = agent.ask("watch", "one", "--once", "--events", str(rest["events_offset"]))
    assert (seen["log"], seen["log_offset"]) == ("", -1)
    # The run goes on telling: what came since is told, and nothing twice.
    both = [*rest["events"], *seen["events"]]
    assert both == event_rows(run.events_file)[: len(both)]

    told = []
    lines = agent.watch("one", "--log", "0")
    for line in lines:
        told.append(line)
        if len(told) == 3:
            agent.kill("one")
    assert told[-1]["status"]["failure"] == "killed"
    assert [line["status"]["state"] for line in told[:-1]] == ["running"] * (len(told) - 1)
    late = list(agent.watch("one", "--log", "0"))
    assert [line["status"]["state"] for line in late] == ["running"] * (len(late) - 1) + ["failed"]
    assert "".join(line["log"] for line in late) == run.log_file.read_bytes().decode()


def test_a_watch_of_a_silent_run_shows_that_the_host_lives(agent: Agent) -> None:
    agent.create("one", {"phases": []})
    began, heard = time.monotonic(), []
    lines = agent.watch("one")
    for _ in zip(range(2), lines, strict=False):
        heard.append(time.monotonic() - began)
    assert len(heard) == 2
    assert 2 < heard[1] - heard[0] < 30
    agent.ask("remove", "one")
    # What was on its way may come first.
    *before, last = [line.get("error") for line in lines]
    assert last == "run one was removed"
    assert set(before) <= {None}


def test_two_that_start_at_the_same_moment_are_one(agent: Agent, stalled: Hub) -> None:
    for run_id in ("a", "b"):
        agent.create_fetch(run_id, stalled, turn="refuse")
    winners = set()
    for _ in range(20 if THOROUGH else 5):
        started = {
            run_id: subprocess.Popen(agent.argv("start", run_id), stdout=subprocess.PIPE, text=True)
            for run_id in ("a", "b")
        }
        codes = {run_id: process.wait() for run_id, process in started.items()}
        assert sorted(codes.values()) == [0, 2], codes
        winner, loser = sorted(codes, key=lambda run_id: codes[run_id])
        said, _ = started[loser].communicate()
        refused = json.loads(said)["error"]
        assert f"run {winner} works on this host" in refused
        assert "--queue" in refused
        assert not agent.folder(loser).busy()
        winners.add(winner)
        agent.ask("stop", winner)
        agent.wait_for(winner, "stopped")
    assert not list((agent.runs / ".waiting").glob("[0-9]*"))


def test_a_queue_keeps_its_order_and_survives_kills(agent: Agent, stalled: Hub) -> None:
    for run_id in ("a", "b", "c", "d", "e"):
        agent.create_fetch(run_id, stalled, turn="wait")
    agent.create_fetch("x", stalled, turn="refuse")
    for run_id in ("a", "b", "c", "d", "e"):
        agent.ask("start", run_id)
    assert agent.wait_for("a", "running").started > 0
    agent.wait(lambda: agent.status("e").ahead == ("a", "b", "c", "d"), "the queue")
    assert agent.status("e").state == "queued"
    assert agent.status("e").started is None
    assert "run a works on this host" in agent.ask("start", "x", code=2)["error"]
    for verb in ("renew", "remove"):
        stdin = {"request": {}} if verb == "renew" else None
        assert "works in it" in agent.ask(verb, "e", stdin=stdin, code=2)["error"]

    agent.kill("b")
    agent.ask("stop", "c")
    assert "left the queue" in agent.wait_for("c", "stopped").message
    agent.wait(
        lambda: (
            agent.status("e").ahead
            == (
                "a",
                "d",
            )
        ),
        "the shorter queue",
    )
    assert agent.status("b").failure == "killed"
    agent.kill("a")
    agent.wait_for("d", "running")
    agent.wait(lambda: agent.status("e").ahead == ("d",), "the next one's turn")
    assert agent.status("d").ahead == ()

    agent.kill("d")
    agent.wait_for("e", "running")
    agent.kill("e")
    answer = agent.ask("resume-all")
    # The ones that worked before the one that waited; c was stopped on purpose.
    assert answer == {"started": ["a", "d", "e", "b"], "refused": {}}
    assert agent.events("a", "run_started")[-1]["cause"] == "autostart"
    # It had waited before: its turn came.
    assert agent.events("d", "run_started")[0]["cause"] == "queue"
    assert agent.status("b").cause == "autostart"
    agent.wait(
        lambda: (
            agent.status("b").ahead
            == (
                "a",
                "d",
                "e",
            )
        ),
        "the new queue",
    )
    assert agent.ask("resume-all") == {"started": [], "refused": {}}


def test_a_run_of_a_gpu_is_not_resumed_without_one(agent: Agent, stalled: Hub) -> None:
    """AutoDL's no-GPU mode has 2 GiB of memory: a training would only be killed there."""
    run = agent.create_fetch("a", stalled)
    agent.ask("start", "a")
    agent.wait_for("a", "running")
    agent.kill("a")
    status = read_json(run.status_file)
    write_json(run.status_file, status | {"gpu": [{"name": "NVIDIA X"}]})
    answer = agent.ask("resume-all")
    assert answer["started"] == []
    assert "run a worked on a GPU, and there is none now" in answer["refused"]["a"]
    write_json(run.status_file, status)
    assert agent.ask("resume-all") == {"started": ["a"], "refused": {}}


def test_a_worker_without_its_supervisor_keeps_the_turn(agent: Agent, stalled: Hub) -> None:
    run = agent.create_fetch("a", stalled, turn="refuse")
    agent.create_fetch("b", stalled, turn="refuse")
    agent.ask("start", "a")
    agent.wait(lambda: len(agent.processes("a")) >= 2, "the worker")
    supervisor, *workers = agent.processes("a")
    assert workers
    agent.halt(*workers)  # as those that are busy with a checkpoint
    os.kill(supervisor, signal.SIGKILL)
    try:
        assert "run a works on this host" in agent.ask("start", "b", code=2)["error"]
        assert run.busy()
        assert agent.ask("resume-all") == {"started": [], "refused": {}}
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
    agent.wait(lambda: not run.busy(), "the end of the worker")
    assert agent.ask("start", "b") == {"run_id": "b"}


def test_a_run_ends_when_it_has_worked_as_long_as_it_may(agent: Agent, stalled: Hub) -> None:
    run = agent.create_fetch("one", stalled, limits={"max_seconds": 3600})
    agent.ask("start", "one")
    agent.wait(lambda: agent.status("one").worked_seconds > 1, "some work")
    agent.ask("stop", "one")
    first = agent.wait_for("one", "stopped")
    assert "max-hours" not in first.message
    limit, request = first.worked_seconds + 3, run.request()
    limited = replace(request, limits=Limits(max_seconds=limit))
    agent.ask("renew", "one", stdin={"request": encode(limited)})
    agent.ask("start", "one")
    status = agent.wait_for("one", "stopped")
    assert "max-hours reached" in status.message
    assert "inv resume --run one" in status.message
    assert status.started == first.started
    assert status.worked_seconds >= limit, "the first part counts"
    assert "its max-hours is" in agent.ask("start", "one", code=2)["error"]
    stalled.stall.clear()
    agent.ask("renew", "one", stdin={"request": encode(request)})
    agent.ask("start", "one")
    assert agent.wait_for("one", "succeeded").worked_seconds > status.worked_seconds


def test_a_command_follows_success_only(agent: Agent, hub: Hub, tmp_path: Path) -> None:
    done = {name: tmp_path / f"done of {name}" for name in ("good", "bad", "saved", "busy")}

    def after(name: str, seconds: float) -> dict[str, Any]:
        command = ["touch", str(done[name])]
        return {"after": {"command": command, "when": "succeeded", "seconds": seconds}}

    def ended(name: str) -> dict[str, Any]:
        agent.wait(lambda: agent.events(name, "after_command_ended"), "the command's end")
        return agent.events(name, "after_command_ended")[0]

    agent.create_fetch("good", hub, **after("good", 0.5))
    agent.ask("start", "good")
    lines = list(agent.watch("good"))
    told = [event["event"] for line in lines for event in line["events"]]
    assert told[-2:] == ["after_command", "run_ended"], "a watcher hears of it before the end"
    assert ended("good")["code"] == 0
    assert done["good"].exists()
    # Everything that was asked for is done: starting more on the run orders nothing again.
    done["good"].unlink()
    agent.ask("start", "good", "fetch")
    agent.wait(lambda: len(agent.events("good", "run_ended")) == 2, "the second end")

    hub.refuse = (404, {"X-Error-Code": "RepoNotFound"})
    agent.create_fetch("bad", hub, **after("bad", 0))
    agent.ask("start", "bad")
    agent.wait_for("bad", "failed")
    hub.refuse = None

    agent.create_fetch("saved", hub, **after("saved", 30))
    agent.ask("start", "saved")
    agent.wait_for("saved", "succeeded")
    agent.ask("stop", "saved")
    assert ended("saved")["why"] == "a stop was asked for"

    hub.stall["model.safetensors"] = list(STALLS)
    agent.create_fetch("next", hub)
    agent.ask("start", "next")
    agent.wait(lambda: hub.stall["model.safetensors"] != STALLS, "the stall")
    hub.stall["model.safetensors"].clear()
    agent.create_fetch("busy", hub, **after("busy", 0))
    agent.ask("start", "busy")
    assert ended("busy")["why"] == "run next needs the host"
    assert [name for name, file in done.items() if file.exists()] == []
    assert agent.events("bad", "after_command") == []

    request = {"after": {"command": "poweroff", "when": "succeeded"}}
    refused = agent.ask("create", stdin={"run_id": "odd", "request": request}, code=2)
    assert refused["error"] == "stdin: request.after.command: expected a list, found 'poweroff'"


def test_a_client_may_order_a_command_once_and_after_success_only(
    agent: Agent, hub: Hub, tmp_path: Path
) -> None:
    done = tmp_path / "done"
    order = {"command": ["sh", "-c", f"echo x >>'{done}'"]}
    wrong = {"command": ["sh", "-c", "exit 3"]}
    hub.refuse = (404, {"X-Error-Code": "RepoNotFound"})
    agent.create_fetch("bad", hub)
    agent.ask("start", "bad")
    agent.wait_for("bad", "failed")
    hub.refuse = None
    refused = agent.ask("afterwards", "bad", stdin=order, code=2)
    assert refused["error"] == "run bad is failed"

    agent.create_fetch("good", hub)
    agent.ask("start", "good")
    agent.wait_for("good", "succeeded")
    hub.stall["model.safetensors"] = list(STALLS)
    agent.create_fetch("next", hub)
    agent.ask("start", "next")
    refused = agent.ask("afterwards", "good", stdin=order, code=2)
    assert refused["error"] == "run next needs the host"
    agent.kill("next")
    assert not done.exists()

    # One that failed may be ordered again, one that was done may not.
    assert agent.ask("afterwards", "good", stdin=wrong) == {"code": 3, "why": None}
    missing = agent.ask("afterwards", "good", stdin={"command": ["/no/such"]})
    assert missing["code"] is None
    assert "No such file" in missing["why"]
    assert agent.ask("afterwards", "good", stdin=order) == {"code": 0, "why": None}
    assert "has had its" in agent.ask("afterwards", "good", stdin=order, code=2)["error"]
    assert done.read_text() == "x\n"


def test_what_a_pull_brings(agent: Agent, tmp_path: Path) -> None:
    elsewhere = tmp_path / "my results"
    run = agent.create("one", {"phases": []}, {"output_dir": str(agent.runs / "one/output")})
    files = {
        "train.log": b"log",
        "report.html": b"page",
        "before.jsonl": b"{}",
        "run.lock": b"",
        ".secret": b"",
        "inputs/data/rows.json": b"[]",
        "output/adapter_model.safetensors": b"a" * 3_000_000,
        "output/.tunesmith-owner.json": b"{}",
        "output/checkpoint-5/optimizer.pt": b"o",
        "output/bad-checkpoint-6/optimizer.pt": b"o",
        "merged/model.safetensors": b"m",
        "predict/generated_predictions.jsonl": b"{}",
    }
    for name, content in files.items():
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).write_bytes(content)
    answer = agent.ask("manifest", "one")
    usual = {
        "run.json",
        "config.yaml",
        "seals.json",
        "before.jsonl",
        "train.log",
        "output/adapter_model.safetensors",
        "predict/generated_predictions.jsonl",
    }
    assert answer["files"].keys() == usual
    assert (answer["state"], answer["busy"]) == ("queued", False)
    for name in usual & files.keys():
        assert answer["files"][name] == {"size": len(files[name]), "sha256": digest(files[name])}
    merged = agent.ask("manifest", "one", "--what", "merged")["files"]
    record = {"run.json", "config.yaml", "seals.json", "before.jsonl"}
    assert merged.keys() == record | {"merged/model.safetensors"}

    # The checksums are remembered, until a file changes.
    weights = run.path / "output/adapter_model.safetensors"
    stat = weights.stat()
    weights.write_bytes(b"b" * 3_000_000)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    name = "output/adapter_model.safetensors"
    assert agent.ask("manifest", "one")["files"][name] == answer["files"][name]
    os.utime(weights)
    assert agent.ask("manifest", "one")["files"][name]["sha256"] == digest(b"b" * 3_000_000)

    elsewhere.mkdir()
    (elsewhere / "adapter_model.safetensors").write_bytes(b"c")
    run.config_file.write_text(yaml.safe_dump({"output_dir": str(elsewhere)}))
    record = agent.ask("manifest", "one", "--what", "adapter")["files"][name]
    assert record["path"] == str(elsewhere / "adapter_model.safetensors")
    (run.path / ".hashes.json").write_text("{")
    assert agent.ask("manifest", "one")["files"].keys() == usual

    freed = agent.ask("remove", "one")
    assert freed["left"] == str(elsewhere)
    assert 3_000_000 < freed["freed"] < 3_010_000
    assert not [path.name for path in agent.runs.iterdir() if not path.name.startswith(".waiting")]
    assert (elsewhere / "adapter_model.safetensors").exists()


def test_gpu_figures_are_told_and_a_hanging_driver_hurts_nothing(
    agent: Agent, stalled: Hub, tmp_path: Path
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    program = programs / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA X, 1000, 24576, 97, [N/A]'\n")
    program.chmod(0o755)
    os.environ["PATH"], path = f"{programs}:{os.environ['PATH']}", os.environ["PATH"]
    try:
        agent.create_fetch("one", stalled)
        agent.ask("start", "one")
        agent.wait(lambda: agent.status("one").gpu, "the figures")
        figures = GpuFigures("NVIDIA X", 1000 * 1024 * 1024, 24 * 1024**3, 97, None)
        assert agent.status("one").gpu == (figures,)
        program.write_text("#!/bin/sh\nexec sleep 60\n")
        agent.create_fetch("two", stalled)
        agent.ask("start", "two")
        agent.wait_for("two", "running")
        before = agent.status("two").updated
        agent.wait(lambda: agent.status("two").updated > before + 2, "the status", 60)
        assert agent.status("two").gpu is None
    finally:
        os.environ["PATH"] = path


def test_a_watch_ends_when_it_was_asked_to(agent: Agent, stalled: Hub) -> None:
    agent.create_fetch("one", stalled)
    agent.ask("start", "one")
    lines = list(agent.watch("one", "--seconds", "0.5"))
    assert lines[-1]["status"]["state"] == "running"


def test_a_client_that_leaves_takes_nothing_along(agent: Agent, stalled: Hub) -> None:
    agent.create_fetch("one", stalled)
    process = subprocess.Popen(agent.argv("start", "one"), start_new_session=True)
    assert process.wait() == 0
    watching = subprocess.Popen(
        agent.argv("watch", "one"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert watching.stdout is not None
    assert watching.stderr is not None
    watching.stdout.readline()
    watching.stdout.close()
    assert watching.wait(timeout=60) == 1
    assert watching.stderr.read() == b""
    assert agent.status("one").state == "running"
