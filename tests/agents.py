"""A host's runs as a client sees them: the agent as a process, one call a question."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from event_rows import event_rows
from hubserver import Hub
from tunesmith.core import isolated
from tunesmith.job.run.codec import decode
from tunesmith.job.run.folder import RunFolder
from tunesmith.job.run.schema import RunStatus


class Agent:
    """Asks `python -m tunesmith.job.supervisor.agent` about the runs of one folder."""

    def __init__(self, python: Path, home: Path, configs: Path) -> None:
        self.python = python
        self.home = home
        self.runs = home / "runs of a host"
        self.configs = configs

    def argv(self, *words: str) -> list[str]:
        return isolated.argv(
            self.python, "tunesmith.job.supervisor.agent", "--runs", str(self.runs), *words
        )

    def ask(self, *words: str, stdin: Any = None, code: int = 0) -> dict[str, Any]:
        """Return the last line of the answer; the exit code must be `code`."""
        text = "" if stdin is None else json.dumps(stdin)
        done = subprocess.run(self.argv(*words), input=text, capture_output=True, text=True)
        assert done.returncode == code, (words, done.stdout, done.stderr)
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        assert ("error" in answer) == (code != 0)
        return answer

    def watch(self, run_id: str, *words: str, seconds: float = 300) -> Iterator[dict[str, Any]]:
        """Yield the lines of a watch; an early end of the loop ends the process too."""
        process = subprocess.Popen(
            self.argv("watch", run_id, *words), stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        limit = threading.Timer(seconds, process.kill)
        limit.start()
        try:
            for line in process.stdout:
                yield json.loads(line)
        finally:
            limit.cancel()
            process.kill()
            process.wait()

    def create(
        self, run_id: str, request: dict[str, Any], config: dict[str, Any] | None = None
    ) -> RunFolder:
        about = {"run_id": run_id, "created": run_id, "title": f"run {run_id}", "limits": {}}
        order = {"run_id": run_id, "request": about | request, "config": config}
        self.ask("create", stdin=order)
        return self.folder(run_id)

    def create_fetch(self, run_id: str, hub: Hub | str, **request: Any) -> RunFolder:
        """Make a run that fetches org/tiny from a hub; a hub that stalls keeps it at work."""
        url = hub if isinstance(hub, str) else hub.url
        mirror = self.home / "test.yml"
        addresses = {"hf_endpoints": [url], "apt": [], "docker_registries": []}
        for key in ("pypi_indexes", "conda_channels", "miniforge_urls"):
            addresses[key] = ["https://nowhere.invalid"]
        mirror.write_text(yaml.safe_dump(addresses))
        config = request.pop("config", {"model_name_or_path": "org/tiny"})
        order = {
            "name": "org/tiny",
            "revision": None,
            "mirror": str(mirror),
            "configs": str(self.configs),
            "store": str(self.home / f"models of {run_id}"),
            "allow_pickle": False,
        }
        # A folder each: what one has fetched, another must not find.
        variables = {"HF_HOME": str(self.home / f"hf of {run_id}"), "HF_HUB_OFFLINE": "1"}
        base = {"phases": ["fetch"], "fetch": order, "env": variables}
        return self.create(run_id, base | request, config)

    def folder(self, run_id: str) -> RunFolder:
        return RunFolder(self.runs / run_id)

    def status(self, run_id: str) -> RunStatus:
        return decode(RunStatus, self.ask("show", run_id)["status"])

    def events(self, run_id: str, name: str) -> list[dict[str, Any]]:
        return [e for e in event_rows(self.folder(run_id).events_file) if e["event"] == name]

    def wait(self, done: Callable[[], object], what: str, seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < deadline, f"{what}: not in {seconds} s"
            time.sleep(0.02)

    def wait_for(self, run_id: str, state: str, seconds: float = 180) -> RunStatus:
        """Wait until a run has this state; return its status."""
        folder = self.folder(run_id)
        self.wait(lambda: folder.status().state == state, f"{run_id} {state}", seconds)
        if state not in ("running", "queued"):
            self.wait(lambda: not folder.busy(), "the lock")
        return folder.status()

    def kill(self, run_id: str) -> None:
        """End a run's supervisor and all that it started, as the death of PID 1 does it."""
        folder = self.folder(run_id)
        self.halt(*self.processes(run_id))  # so that none can act on another's end
        for pid in self.processes(run_id):
            os.kill(pid, signal.SIGKILL)
        self.wait(lambda: not folder.busy(), "the lock after kill -9", 60)

    def halt(self, *pids: int) -> None:
        """Send SIGSTOP and wait until it has taken effect: of two signals that are still on
        their way the lower number comes first, so that a SIGTERM could overtake it."""
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        for pid in pids:
            self.wait(lambda pid=pid: _halted(pid), f"the halt of process {pid}")

    def processes(self, run_id: str) -> list[int]:
        """Return the pids of a run's supervisor and of all below it, parents first."""
        owner = self.folder(run_id).status().supervisor
        assert owner is not None
        return _tree(owner.pid)

    def end_all(self) -> None:
        """End what a test has left at work."""
        for file in self.runs.glob("*/run.json"):
            folder = RunFolder(file.parent)
            if folder.busy() and folder.status().supervisor:
                self.kill(folder.run_id)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _halted(pid: int) -> bool:
    """Whether a process does nothing more. One that waits for its vfork's child (D) cannot even
    be stopped while that child is."""
    if _state(pid) != "D":
        return _state(pid) in "TXZ"
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return True
    return any(_state(int(child)) == "T" for child in children)


def _state(pid: int) -> str:
    # The command name stands in parentheses and may hold spaces and parentheses itself.
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "X"


def _tree(pid: int) -> list[int]:
    """Return a process and all below it, parents first."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += _tree(int(child))
    return found
