"""The run folder: the one place where a run lives.

Everything a client knows about a run it reads from here, so any laptop that can read
the folder can follow the run. The supervisor writes status.json, the supervisor and
its worker append to events.jsonl (one write() a line, so lines never mix), and one
lock says who works in the folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.errors import UsageError
from tunesmith.files import read_json, write_json
from tunesmith.job.identity import Identity, identify

STATES = ("queued", "running", "succeeded", "failed", "stopped")
PHASES = ("fetch", "before", "train", "after", "merge", "proof", "predict")
OWNER_FILE = ".tunesmith-owner.json"
# In the copy of a run that lives on a host: from where, and what was copied.
COPY_FILE = "pulled.json"


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
    def output(self) -> Path:
        """LLaMA-Factory's output_dir."""
        return self.path / "output"

    def settled(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return a config with `output_dir` as an absolute path: a relative one is below RUN,
        whatever the current folder of a process is."""
        if config.get("output_dir"):
            return config | {"output_dir": str(self.path.absolute() / str(config["output_dir"]))}
        return config

    def request(self) -> dict[str, Any]:
        """Return run.json. Raises UsageError when the folder is not a run."""
        try:
            value = read_json(self.request_file)
        except FileNotFoundError:
            raise UsageError(
                f"{self.path}: no run here (run.json is missing); `inv runs` lists the runs"
            ) from None
        if not isinstance(value, dict):
            raise UsageError(f"{self.request_file}: not a JSON object; the run cannot be continued")
        return value

    def status(self) -> dict[str, Any]:
        """Return status.json as a reader should see it.

        A status that says running while nobody holds the lock belongs to a supervisor
        that died without a word (kill -9, power loss): it is shown as failed, class
        `killed`, and can be resumed.
        """
        try:
            status: dict[str, Any] = read_json(self.status_file)
        except FileNotFoundError:
            return {"run_id": self.run_id, "state": "queued", "phases": {}, "failure": None}
        if status["state"] not in ("running", "queued") or self.busy() or self.is_copy:
            return status
        # The last status is written before the lock is given back: one that ended between
        # our reading and our look at the lock has left it by now.
        status = read_json(self.status_file)
        if status["state"] in ("running", "queued"):
            status |= {
                "state": "failed",
                "failure": "killed",
                "message": "the run ended without a word; "
                f"`inv resume --run {self.run_id}` continues it",
            }
        return status

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

    def emit(self, event: str, **fields: Any) -> None:
        """Append one event. NaN and Infinity are written as JavaScript names them."""
        line = (
            json.dumps({"time": time.time(), "event": event, **fields}, ensure_ascii=False) + "\n"
        )
        descriptor = os.open(self.events_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


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
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(lock.owner.to_json()).encode(), 0)
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


class EventTail:
    """Reads a growing events.jsonl piece by piece; only whole lines are taken."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self._path = path
        self.offset = offset
        self.cut = False

    def new(self, limit: int = -1) -> list[dict[str, Any]]:
        """Return the events written since the last call, in order.

        With `limit` about that many bytes of them, at least one whole line; `cut` then says
        whether the limit was met. Raises ValueError naming the byte when a whole line is
        not a JSON object.
        """
        try:
            with self._path.open("rb") as stream:
                stream.seek(self.offset)
                content = stream.read(limit)
                self.cut = 0 <= limit <= len(content)
                if self.cut and b"\n" not in content:
                    content += stream.readline()
        except FileNotFoundError:
            return []
        events = []
        for line in content.split(b"\n")[:-1]:
            # A power loss can leave a hole of zero bytes where a line should be.
            text = line.strip(b"\0 ")
            value = _parse_event(text, self._path, self.offset) if text else None
            self.offset += len(line) + 1
            if value is not None:
                events.append(value)
        return events


def _parse_event(line: bytes, path: Path, offset: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}: the line at byte {offset} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: the line at byte {offset} is not a JSON object")  # noqa: TRY004
    return value


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return all events of a file in order; a torn last line (power loss) is left out."""
    return EventTail(path).new()


def mend_events(path: Path) -> None:
    """Cut a torn last line off, so that the next event starts on a line of its own."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as stream:
            stream.truncate(whole)
