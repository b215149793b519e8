"""This machine as a target: the training environment under .tunesmith/."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from tunesmith.errors import TunesmithError, UsageError
from tunesmith.files import read_json, write_json, write_text
from tunesmith.job import adopted, listing
from tunesmith.job import watch as watching
from tunesmith.job.run_id import RunId
from tunesmith.job.rundir import OWNER_FILE, EventTail, RunFolder
from tunesmith.plan import Place, Plan
from tunesmith.project import Project
from tunesmith.targets.base import Look


class LocalTarget:
    """Runs jobs on this machine, detached, in folders below .tunesmith/runs/."""

    name = "local"
    shared = False

    def __init__(self, project: Project, flavour: str | None = None) -> None:
        self._project = project
        self._environment = project.environment(flavour)

    def place(self, run_id: str) -> Place:
        """Return where a run of this id lives, or would live."""
        return Place(self._project.runs / RunId(run_id), self._environment.python, self.variables())

    def variables(self) -> dict[str, str]:
        """Return the variables of jobs here."""
        flavour = self._environment.flavour
        lock = {"TUNESMITH_LOCK": flavour.name, "TUNESMITH_LOCK_SHA256": flavour.lock_sha256}
        return {**self._project.stack.variables, "HF_HOME": str(self._project.hf_home), **lock}

    def seen(self, _run_id: str, _name: str, path: Path) -> str:
        """Return the path as it is."""
        return str(path)

    def room(self) -> tuple[str, int]:
        """Return where runs are kept, and the free bytes there."""
        runs = self._project.runs
        existing = next(p for p in (runs, *runs.parents) if p.exists())
        return str(existing), shutil.disk_usage(existing).free

    def fetch_order(
        self, _name: str, _revision: str | None, _mirror: str | None
    ) -> dict[str, Any] | None:
        """Return None: base models are fetched before the run is made."""
        return None

    def find(self, run_id: str | None) -> str:
        """Return the id of a run that exists, by default the newest one's."""
        return RunId(self._project.run_folder(run_id).name)

    def exists(self, run_id: str) -> bool:
        """Return whether there is such a run."""
        return (self._project.runs / RunId(run_id) / "run.json").is_file()

    def create(self, plan: Plan) -> None:
        """Make the plan's run folder with its request and config; it must not exist yet."""
        folder = RunFolder(Path(plan.place.run))
        if plan.config is not None and "output_dir" in plan.config:
            refuse_foreign_output(Path(str(plan.config["output_dir"])), folder.path)
        folder.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.path.mkdir()
        except FileExistsError:
            raise UsageError(f"run {folder.run_id} is there already; `inv runs` lists it") from None
        if plan.config is not None:
            body = yaml.safe_dump(dict(plan.config), allow_unicode=True, sort_keys=True)
            write_text(folder.config_file, body)
        write_json(folder.request_file, plan.request)

    def renew(self, plan: Plan) -> None:
        """Give a run the plan's request. Raises UsageError while somebody works on it."""
        run_id = plan.run_id
        folder = self._folder(run_id)
        if folder.busy():
            # The lock would refuse it too, but only after the request was rewritten.
            raise UsageError(
                f"run {run_id} is being worked on; wait for it (`inv attach --run {run_id}`) or "
                f"end it (`inv stop --run {run_id}`)"
            )
        write_json(folder.request_file, plan.request)

    def request(self, run_id: str) -> dict[str, Any]:
        """Return what was asked: run.json."""
        return self._folder(run_id).request()

    def config(self, run_id: str) -> dict[str, Any]:
        """Return the config of the training; empty when the run has none."""
        run = self._folder(run_id)
        return run.config() if run.config_file.exists() else {}

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

    def watch(self, run_id: str, events: int = 0, log: int | None = None) -> Iterator[Look]:
        """Yield a look whenever something changed, and every few seconds, until it is over."""
        run = self._folder(run_id)
        for line in watching.watch(run, events, -1 if log is None else log):
            yield Look(
                line.status,
                tuple(line.events),
                line.events_offset,
                line.log,
                max(line.log_offset, 0),
                more=line.more,
            )

    def runs(self) -> list[dict[str, Any]]:
        """Return the status of every run, oldest first."""
        for folder in listing.folders(self._project.runs):
            with contextlib.suppress(TunesmithError):  # damaged: the list shows it
                adopted.ensure(RunFolder(folder))
        return [run | {"on": self.name} for run in listing.list_runs(self._project.runs)]

    def results(self, run_id: str) -> Path:
        """Return the run's folder."""
        return self._folder(run_id).path

    def remove(self, run_id: str) -> int:
        """Delete a run; return the bytes that became free. Refuses one that is worked on."""
        folder = self._folder(run_id)
        if folder.busy():
            raise UsageError(f"run {run_id} is being worked on; `inv stop --run {run_id}` ends it")
        size = sum(p.stat().st_size for p in folder.path.rglob("*") if p.is_file())
        # Out of sight first: a deletion that is cut short leaves no half a run behind, and the
        # next one sweeps up.
        doomed = self._project.home / "removed"
        doomed.mkdir(exist_ok=True)
        folder.path.rename(doomed / run_id)
        shutil.rmtree(doomed)
        return size

    def interact(self, module: str, arguments: Sequence[str]) -> int:
        """Run a module of the job half in the user's terminal; return its exit code."""
        argv = [str(self._environment.python), "-m", module, *arguments]
        return subprocess.run(argv, env=self._variables(), check=False).returncode

    def _folder(self, run_id: str) -> RunFolder:
        return RunFolder(self._project.run_folder(run_id))

    def _variables(self) -> dict[str, str]:
        return {**os.environ, **self.variables()}

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


def refuse_foreign_output(output: Path, run: Path) -> None:
    """The supervisor checks this under its lock too; here it is said before a run is made."""
    if run in output.parents or not output.is_dir() or not any(output.iterdir()):
        return
    owner_file = output / OWNER_FILE
    owner = (
        f"belongs to run {read_json(owner_file)['run_id']}" if owner_file.is_file() else "has files"
    )
    raise UsageError(
        f"{output}: this output folder {owner}; choose another with `output_dir=PATH`, or leave "
        "the key out"
    )
