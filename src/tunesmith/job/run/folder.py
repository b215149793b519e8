"""The run folder: the one place where a run lives.

Everything a client knows about a run it reads from here, so any laptop that can read
the folder can follow the run. The supervisor writes status.json, the supervisor and
its worker append to events.jsonl (whole lines, so lines never mix), and one
lock says who works in the folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tunesmith.core.errors import UsageError
from tunesmith.core.files import locked, read_json, write_json
from tunesmith.job.run import events
from tunesmith.job.run.process import Identity, identify
from tunesmith.job.run.schema import Adjustments, CopyRecord, RunRequest, RunStatus
from tunesmith.job.run.stored import DamagedError, read_mapping, read_record
from tunesmith.job.system import disk

PHASES = ("check", "fetch", "before", "train", "after", "merge", "proof", "predict")
OWNER_FILE = ".tunesmith-owner.json"
# In the copy of a run that lives on a host: from where, and what was copied.
COPY_FILE = "pulled.json"
# In such a copy: what came as it was, beside what was made of it. Nothing is ever started from it.
HOST_FOLDER = "host"
MERGED = "merged"
REFUSED = "merged.refused"
MANIFEST = "MANIFEST.json"


@dataclass(frozen=True)
class RunFolder:
    """Names of the files of one run. Making one touches nothing."""

    path: Path

    @property
    def run_id(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def request_file(self) -> Path:
        """What was asked: written before the start; the fetch phase adds where the model lies."""
        return self.path / "run.json"

    @property
    def config_file(self) -> Path:
        """The flat LLaMA-Factory config of the train phase."""
        return self.path / "config.yaml"

    @property
    def status_file(self) -> Path:
        """Where the run stands, replaced atomically."""
        return self.path / "status.json"

    @property
    def events_file(self) -> Path:
        """What happened, one JSON object a line, append-only."""
        return self.path / "events.jsonl"

    @property
    def heartbeat_file(self) -> Path:
        """The newest step, at most once a second; bounded however long the run is."""
        return self.path / "heartbeat.json"

    @property
    def adjustments_file(self) -> Path:
        """Config keys the supervisor changed after a failure, kept over restarts."""
        return self.path / "adjustments.json"

    @property
    def log_file(self) -> Path:
        """All output of all phases."""
        return self.path / "train.log"

    @property
    def lock_file(self) -> Path:
        """Held by the supervisor and its worker while either lives."""
        return self.path / "run.lock"

    @property
    def reserve_file(self) -> Path:
        """Room that the supervisor keeps for its last words (job/system/disk.py)."""
        return self.path / ".reserve"

    @property
    def output(self) -> Path:
        """LLaMA-Factory's output_dir."""
        return self.path / "output"

    def settled(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return a config with `output_dir` as an absolute path: a relative one is below RUN,
        whatever the current folder of a process is."""
        if config.get("output_dir"):
            return config | {"output_dir": str(self.path.absolute() / str(config["output_dir"]))}
        return config

    def request(self) -> RunRequest:
        """Return run.json. Raises UsageError when the folder is no run, or run.json is damaged."""
        try:
            request = read_record(self.request_file, RunRequest, self._rm)
        except FileNotFoundError:
            raise UsageError(
                f"{self.path}: no run here (run.json is missing)",
                hint="`inv runs` lists the runs",
            ) from None
        if request.run_id not in ("", self.run_id):
            why = f"it is run {ascii(request.run_id)[:90]}, in the folder of run {self.run_id}"
            raise DamagedError(self.request_file, why, self._rm)
        self._refuse_foreign()
        return replace(request, run_id=self.run_id)

    def config(self) -> dict[str, Any]:
        """Return config.yaml, `settled`. Raises FileNotFoundError where there is none, DamagedError
        for one that cannot be read."""
        remedy = f"write the config of the training there again, or {self._rm}"
        value = read_mapping(self.config_file, remedy)
        self._refuse_foreign()
        return self.settled(value)

    def adjustments(self) -> Adjustments:
        """Return the config keys that were changed after a failure; none where none was.

        Raises DamagedError for a file that cannot be read.
        """
        file = self.adjustments_file
        remedy = f"without it (`rm {shlex.quote(str(file))}`) the config's own keys hold"
        try:
            return read_record(file, Adjustments, remedy)
        except FileNotFoundError:
            return Adjustments()

    def copied(self) -> CopyRecord:
        """Return pulled.json: the host, and what came of the run.

        Raises FileNotFoundError for a run that is no copy, DamagedError for a damaged one.
        """
        remedy = f"{self._rm}, and `inv pull --on HOST --run {self.run_id}` brings it again"
        return read_record(self.path / COPY_FILE, CopyRecord, remedy)

    @property
    def _rm(self) -> str:
        return f"`inv rm --run {self.run_id}` deletes the run"

    def _refuse_foreign(self) -> None:
        """A host's own request and config are data, never something to work by."""
        if self.is_copy and not (self.path / HOST_FOLDER / self.request_file.name).is_file():
            raise UsageError(
                f"run {self.run_id} is as its host wrote it, and not used like this",
                hint="`inv runs` makes it a run of this machine",
            )

    def status(self) -> RunStatus:
        """Return status.json as a reader should see it.

        A status that says running while nobody holds the lock belongs to a supervisor
        that died without a word (kill -9, power loss): it is shown as failed, class
        `killed`, and can be resumed. For a damaged one there is what the events tell, with
        failure `damaged`.
        """
        status, damage = self._read_status()
        if not status.active or self.busy() or (self.is_copy and damage is None):
            return status
        # The last status is written before the lock is given back: one that ended between
        # our reading and our look at the lock has left it by now.
        status, damage = self._read_status()
        if not status.active or not self.status_file.exists():
            return status
        if damage:
            return replace(status, state="failed")
        message = f"the run ended without a word; `inv resume --run {self.run_id}` continues it"
        return replace(status, state="failed", failure="killed", message=message)

    def last_status(self) -> RunStatus | None:
        """Return what was last written of the run, whoever lives; None where nothing was."""
        return self._read_status()[0] if self.status_file.exists() else None

    def _read_status(self) -> tuple[RunStatus, str | None]:
        """Return status.json, or what stands for it, and why it is damaged."""
        remedy = "shown is what events.jsonl tells; whatever works on the run next writes it anew"
        try:
            status = read_record(self.status_file, RunStatus, remedy)
        except FileNotFoundError:
            return RunStatus(run_id=self.run_id, state="queued"), None
        except DamagedError as error:
            told = events.status_from(events.read_events(self.events_file), self.run_id)
            return replace(told, failure="damaged", message=error.message), error.why
        return replace(status, run_id=self.run_id, message=status.message or ""), None

    @property
    def is_copy(self) -> bool:
        """Whether the run lives on a host, and this is what was copied of it."""
        return (self.path / COPY_FILE).is_file()

    def busy(self) -> bool:
        """Whether a supervisor or worker holds the lock now."""
        try:
            descriptor = os.open(self.lock_file, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def owner(self) -> Identity | None:
        """Return who works in it, as its lock tells; None when nobody does, or it does not."""
        if not self.busy():
            return None
        try:
            return Identity.from_json(read_json(self.lock_file))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def emit(self, event: str, **fields: Any) -> None:
        """Append one event. Raises OSError when the disk refuses it."""
        disk.append(self.events_file, events.line_of(event, fields))


@dataclass
class RunLock:
    """The right to work in a run folder; one holder at a time.

    `descriptor` is passed to the worker, which keeps the lock alive when the supervisor
    is killed: a second trainer cannot start beside an orphan.
    """

    descriptor: int
    owner: Identity = field(default_factory=identify)

    def release(self) -> None:
        """Give the lock back (an exit does it too)."""
        os.close(self.descriptor)


def acquire(run: RunFolder) -> RunLock:
    """Take the run's lock.

    Raises UsageError naming the owner when another process works in the folder.
    """
    descriptor = os.open(run.lock_file, os.O_RDWR | os.O_CREAT, 0o644)
    if not _flock(descriptor):
        owner = os.pread(descriptor, 4096, 0).decode() or "an unnamed process"
        os.close(descriptor)
        try:
            owner = str(Identity.from_json(json.loads(owner)))
        except (ValueError, KeyError, TypeError):
            owner = "another process that is just starting"
        raise UsageError(
            f"run {run.run_id}: {owner} works in it; follow it with "
            f"`inv attach --run {run.run_id}` or end it with `inv stop --run {run.run_id}`"
        )
    lock = RunLock(descriptor)
    disk.label(descriptor, json.dumps(lock.owner.to_json()))
    return lock


def _flock(descriptor: int) -> bool:
    """Take the lock if no one works under it. A reader that asks `busy` holds it for a moment
    too, so one refusal is no answer."""
    for _ in range(10):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.02)
        else:
            return True
    return False


def claim_output(run: RunFolder, output: Path) -> None:
    """Mark `output` as this run's output folder.

    Raises UsageError when it belongs to another run or holds files of unknown origin:
    training into it could delete or mix up somebody's result.
    """
    owner_file = output / OWNER_FILE
    output.parent.mkdir(parents=True, exist_ok=True)
    with locked(output):
        _claim(run, output, owner_file)


def _claim(run: RunFolder, output: Path, owner_file: Path) -> None:
    if output.is_dir():
        try:
            owner = read_json(owner_file)
        except FileNotFoundError:
            if any(output.iterdir()):
                raise UsageError(
                    f"{output}: this output folder already has files in it; choose another with "
                    "`output_dir=PATH`, or leave the key out"
                ) from None
            owner = {"run_id": run.run_id}
        if owner["run_id"] != run.run_id:
            raise UsageError(
                f"{output}: this output folder belongs to run {owner['run_id']}; choose another "
                f"with `output_dir=PATH`, or continue that run: "
                f"`inv resume --run {owner['run_id']}`"
            )
    output.mkdir(parents=True, exist_ok=True)
    if not owner_file.exists():
        write_json(owner_file, {"run_id": run.run_id, "run": str(run.path)})
