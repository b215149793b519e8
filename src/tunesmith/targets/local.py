"""This machine as a target: the training environment under .tunesmith/."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tunesmith.errors import TunesmithError, UsageError
from tunesmith.files import write_json, write_text
from tunesmith.job.rundir import EventTail, RunFolder
from tunesmith.plan import Place, Plan
from tunesmith.project import Project


class LocalTarget:
    """Runs jobs on this machine, detached, in folders below .tunesmith/runs/."""

    name = "local"

    def __init__(self, project: Project, flavour: str | None = None) -> None:
        self._project = project
        self._environment = project.environment(flavour)

    def place(self, run_id: str) -> Place:
        """Return where a run of this id lives, or would live."""
        flavour = self._environment.flavour
        lock = {"TUNESMITH_LOCK": flavour.name, "TUNESMITH_LOCK_SHA256": flavour.lock_sha256}
        variables = {**self._project.stack.variables, "HF_HOME": str(self._project.hf_home), **lock}
        return Place(self._project.runs / run_id, self._environment.python, variables)

    def create(self, plan: Plan) -> None:
        """Make the plan's run folder with its request and config; it must not exist yet."""
        folder = RunFolder(plan.place.run)
        folder.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.path.mkdir()
        except FileExistsError:
            raise UsageError(f"run {folder.run_id} is there already; `inv runs` lists it") from None
        if plan.config is not None:
            body = yaml.safe_dump(dict(plan.config), allow_unicode=True, sort_keys=True)
            write_text(folder.config_file, body)
        write_json(folder.request_file, plan.request)

    def start(self, run_id: str, phases: Sequence[str]) -> None:
        """Start phases of a run, detached; return when it is under way."""
        done = self._job("start", run_id, *phases)
        if done.returncode != 0:
            first, *detail = done.stderr.strip().splitlines() or ["the run did not start"]
            kind = UsageError if done.returncode == UsageError.exit_code else TunesmithError
            raise kind(first, [line.strip() for line in detail])

    def stop(self, run_id: str) -> None:
        """Ask a run for a checkpoint and an end."""
        done = self._job("stop", run_id)
        if done.returncode != 0:
            raise UsageError(done.stderr.strip())

    def status(self, run_id: str) -> dict[str, Any]:
        """Return the status as status.json has it."""
        return self._folder(run_id).status()

    def events(self, run_id: str, offset: int) -> tuple[list[dict[str, Any]], int]:
        """Return the events from byte `offset` on, and the offset behind them."""
        tail = EventTail(self._folder(run_id).events_file, offset)
        return tail.new(), tail.offset

    def log(self, run_id: str, offset: int) -> tuple[str, int]:
        """Return the log from byte `offset` on, and the offset behind it."""
        try:
            with self._folder(run_id).log_file.open("rb") as log:
                log.seek(offset)
                content = log.read()
        except FileNotFoundError:
            return "", offset
        return content.decode("utf-8", "replace"), offset + len(content)

    def runs(self) -> list[dict[str, Any]]:
        """Return the status of every run, oldest first."""
        found = []
        for file in self._project.runs.glob("*/run.json"):
            request = json.loads(file.read_text(encoding="utf-8"))
            status = RunFolder(file.parent).status()
            shown = {"created": request["created"], "title": request["title"], "on": self.name}
            found.append(status | shown | {"path": str(file.parent)})
        return sorted(found, key=lambda run: (run["created"], run["run_id"]))

    def results(self, run_id: str) -> Path:
        """Return a local folder with the run's results."""
        return self._folder(run_id).path

    def interact(self, module: str, arguments: Sequence[str]) -> int:
        """Run a module of the job half in the user's terminal; return its exit code."""
        argv = [str(self._environment.python), "-m", module, *arguments]
        return subprocess.run(argv, env=self._variables(), check=False).returncode

    def _folder(self, run_id: str) -> RunFolder:
        return RunFolder(self._project.run_folder(run_id))

    def _variables(self) -> dict[str, str]:
        return {**os.environ, **self.place("-").env}

    def _job(self, verb: str, run_id: str, *phases: str) -> subprocess.CompletedProcess[str]:
        if not self._environment.current():
            raise UsageError(
                f"{self._environment.path}: no finished training environment; `inv stack.install` "
                "makes it"
            )
        argv = [str(self._environment.python), "-m", "tunesmith.job", verb]
        argv += [str(self._folder(run_id).path), *phases]
        variables = self._variables()
        return subprocess.run(argv, env=variables, capture_output=True, text=True, check=False)
