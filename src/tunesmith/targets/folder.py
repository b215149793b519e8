"""Runs in folders of this machine, whatever works on them."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path

import yaml

from tunesmith.basemodel.judge import Machine
from tunesmith.basemodel.store import ModelFolder
from tunesmith.core import disk, documents
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import read_json, write_json, write_text
from tunesmith.job.run import foreign, inputs, listing, seals
from tunesmith.job.run import watch as watching
from tunesmith.job.run.codec import encode
from tunesmith.job.run.events import Event, EventTail
from tunesmith.job.run.folder import OWNER_FILE, RunFolder, acquire
from tunesmith.job.run.removal import delete_all, take_away
from tunesmith.job.run.run_id import RunId
from tunesmith.job.run.schema import FetchSpec, FileRecord, ListedRun, RunRequest, RunStatus
from tunesmith.plan import model_check
from tunesmith.plan.plan import Plan, RunLocation
from tunesmith.plan.target import RunUpdate
from tunesmith.project import Project
from tunesmith.stack.environment import Environment
from tunesmith.targets import adoption


class FolderTarget:
    """What all targets have in common whose runs are folders below .tunesmith/runs/.

    A pulled run lies there, too (PullDestination).
    """

    name: str
    shared = False

    def __init__(self, project: Project, flavour: str | None = None) -> None:
        self._project = project
        self._flavour = flavour

    @functools.cached_property
    def _environment(self) -> Environment:
        # Not before a job is started: to look at runs and to end one, none is needed.
        return self._project.environment(self._flavour)

    def location(self, run_id: str) -> RunLocation:
        """Return where a run of this id lives, or would live."""
        run = self._project.runs / RunId(run_id)
        return RunLocation(run, self._environment.python, self.variables())

    def variables(self) -> dict[str, str]:
        """Return the variables of jobs here."""
        flavour = self._environment.flavour
        lock = {"TUNESMITH_LOCK": flavour.name, "TUNESMITH_LOCK_SHA256": flavour.lock_sha256}
        return {**self._project.stack.variables, "HF_HOME": str(self._project.hf_home), **lock}

    def remote_path(self, _run_id: str, _name: str, path: Path) -> str:
        """Return the path as it is."""
        return str(path)

    def extras(self) -> Collection[str]:
        """Return the names of the extras that the environment has."""
        return self._environment.extras.keys()

    def adding(self, extra: str) -> str:
        """Return how the environment gets an extra."""
        if os.environ.get("TUNESMITH_ENVIRONMENT"):
            # In the image, which stays as it was built; these are words for a clone.
            return f"build the image with it, in a clone: inv image.build --with {extra}"
        return f"run `inv stack.install --with {extra}`"

    def room(self) -> tuple[str, int]:
        """Return where runs are kept, and the free bytes there."""
        runs = self._project.runs
        return str(disk.nearest(runs)), disk.free_bytes(runs)

    def machine(self) -> Machine | None:
        """Return the memory of this machine and of its GPUs."""
        return model_check.this_machine()

    def fetch_spec(
        self, _name: str, _revision: str | None, _mirror: str | None
    ) -> FetchSpec | None:
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
        folder = RunFolder(Path(plan.location.run))
        if plan.config is not None and "output_dir" in plan.config:
            refuse_foreign_output(Path(str(plan.config["output_dir"])), folder.path)
        if folder.path.exists():
            raise _exists(folder)
        checked = _checked(plan)
        request = inputs.recorded(plan.request, plan.config, checked)
        self._project.folder("runs")
        try:
            folder.path.mkdir(mode=0o700)
        except FileExistsError:
            raise _exists(folder) from None
        if plan.config is not None:
            body = yaml.safe_dump(dict(plan.config), allow_unicode=True, sort_keys=True)
            write_text(folder.config_file, body)
        write_json(folder.request_file, encode(request))
        seals.seal(folder.path, "create", seals.REQUEST)
        # What was only read by the check is compared before its first use.
        inputs.remember(folder.path, request, request.inputs, apart=checked)
        inputs.remember_model(folder.path, request.model)

    def renew(self, plan: Plan) -> None:
        """Give a run the plan's request. Raises UsageError while somebody works on it."""
        folder = self._folder(plan.run_id)
        # Hashed before: nothing of request.data, which is what the training has read.
        lock = acquire(folder)
        try:
            request = inputs.recorded(plan.request, None, plan.known)
            with seals.rewriting(folder.path, "renew", folder.request_file.name):
                write_json(folder.request_file, encode(request))
            inputs.remember(folder.path, request, inputs.lacking(plan.request, None), plan.known)
        finally:
            lock.release()

    def request(self, run_id: str) -> RunRequest:
        """Return what was asked: run.json."""
        return self._folder(run_id).request()

    def config(self, run_id: str) -> documents.Config:
        """Return the config of the training; empty when the run has none."""
        run = self._folder(run_id)
        return run.config() if run.config_file.exists() else {}

    def status(self, run_id: str) -> RunStatus:
        """Return the status as status.json has it."""
        return self._folder(run_id).status()

    def events(self, run_id: str, offset: int) -> tuple[list[Event], int]:
        """Return the events from byte `offset` on, and the offset behind them."""
        tail = EventTail(self._folder(run_id).events_file, offset)
        return tail.new(), tail.offset

    def watch(self, run_id: str, events: int = 0, log: int | None = None) -> Iterator[RunUpdate]:
        """Yield an update whenever something changed, and every few seconds, until it is over."""
        run = self._folder(run_id)
        for line in watching.watch(run, events, -1 if log is None else log):
            yield RunUpdate(
                line.status,
                line.events,
                line.events_offset,
                line.log,
                max(line.log_offset, 0),
                more=line.more,
            )

    def runs(self) -> list[ListedRun]:
        """Return the status of every run, oldest first."""
        for folder in listing.folders(self._project.runs):
            with contextlib.suppress(TunesmithError, OSError):  # damaged: the list shows it
                foreign.ensure(RunFolder(folder))
        return [replace(run, on=self.name) for run in listing.list_runs(self._project.runs)]

    def results(self, run_id: str) -> Path:
        """Return the run's folder."""
        return self._folder(run_id).path

    def remove(self, run_id: str) -> int:
        """Delete a run; return the bytes that became free. Refuses one that is worked on."""
        deleted = self._project.folder("deleted")
        freed = take_away(self._folder(run_id), deleted / f"{run_id}.{os.getpid()}")
        delete_all(deleted)
        return freed

    def adopt_pulled_run(self, run_id: str, fetch: Callable[[str], ModelFolder]) -> None:
        """Let a pulled run be used here, with the base model that `fetch` returns by its name."""
        adoption.adopt_pulled_run(self._project, self.variables, run_id, fetch)

    def _folder(self, run_id: str) -> RunFolder:
        return RunFolder(self._project.run_folder(run_id))


def _exists(folder: RunFolder) -> UsageError:
    return UsageError(f"run {folder.run_id} exists already", hint="`inv runs` lists it")


def _checked(plan: Plan) -> dict[Path, FileRecord]:
    """Return size and sha256 of the files that were read whole for the plan, and of those that
    other runs or a fetch have sealed."""
    return dict(plan.known) | {
        path: FileRecord(path.stat().st_size, found.sha256)
        for found in plan.request.data
        if found.sha256 and (path := Path(found.file)).is_file()
    }


def refuse_foreign_output(output: Path, run: Path) -> None:
    """The supervisor checks this under its lock too; here it is said before a run is made."""
    if run in output.parents or not output.is_dir() or not any(output.iterdir()):
        return
    owner_file = output / OWNER_FILE
    owner = (
        f"belongs to run {read_json(owner_file)['run_id']}" if owner_file.is_file() else "has files"
    )
    raise UsageError(
        f"{output}: this output folder {owner}",
        hint="choose another with `output_dir=PATH`, or leave the key out",
    )
