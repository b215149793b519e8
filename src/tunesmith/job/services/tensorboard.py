"""TensorBoard over our runs: `python -m tunesmith.job.services.tensorboard RECORD`.

TensorBoard reads event files, which our trainings do not write. They are generated from each run's
events.jsonl and updated while it grows; trainings of LLaMA Board have LLaMA-Factory's
trainer_log.jsonl instead. A run continued from a checkpoint repeats steps: a session start then
tells TensorBoard to discard later steps (event.proto, SessionLog).

It runs behind job/services/access.py because it has no login of its own.
"""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tunesmith.job.run.events import EventTail
from tunesmith.job.run.stored import parse_json
from tunesmith.job.services import manager
from tunesmith.job.services.access import before_wsgi
from tunesmith.job.services.board import OURS
from tunesmith.job.services.records import LOOPBACK, ServiceRecord

_LOOK_SECONDS = 2.0
# Tag of each value, under the names of events.jsonl and trainer_log.jsonl.
_OF_LOG = {
    "train/loss": ("loss",),
    "train/learning_rate": ("learning_rate", "lr"),
    "train/grad_norm": ("grad_norm",),
    "train/tokens": ("total_tokens",),
    "eval/loss": ("eval_loss",),
}


def scalars(entry: Mapping[str, Any]) -> dict[str, float]:
    """Return the values of one line of events.jsonl or trainer_log.jsonl, by tag."""
    if entry.get("event") == "eval":
        return {"eval/loss": float(entry["loss"])}
    if entry.get("event", "log") != "log":
        return {}
    values = {}
    for tag, names in _OF_LOG.items():
        value = next((entry[name] for name in names if entry.get(name) is not None), None)
        if isinstance(value, (int, float)) and math.isfinite(value):
            values[tag] = float(value)
    return values


def step_of(entry: Mapping[str, Any]) -> int:
    """Return the step of a line with scalars."""
    return int(entry["step"] if "step" in entry else entry["current_steps"])


def sources(runs: Path, saves: Path, run: str | None) -> Iterator[tuple[str, Path]]:
    """Yield name and log of every run, or only of the run in folder `run`."""
    for file in sorted(runs.glob("*/events.jsonl")):
        if run is None or file.parent == Path(run):
            yield file.parent.name, file
    for file in sorted(saves.glob("*/*/*/trainer_log.jsonl")) if run is None else ():
        if not (file.parent / OURS).exists():  # those are links to our runs
            yield f"board/{file.parent.parent.parent.name}/{file.parent.name}", file


class Curve:
    """Copies one run's log to TensorBoard's event files."""

    def __init__(self, log: Path, write: Callable[[float, int, Mapping[str, float]], None]) -> None:
        self._tail = EventTail(log, 0)
        self._write = write
        self._last = -1

    def update(self, start_again: Callable[[float, int], None]) -> None:
        """Write new lines; `start_again` is called when steps repeat."""
        for _, line in self._tail.lines():
            try:
                entry = parse_json(line)
                values = scalars(entry)
            except (ValueError, TypeError, KeyError, AttributeError):
                continue  # damaged: the curve gets a gap
            if not values:
                continue
            step, when = step_of(entry), float(entry.get("time") or time.time())
            # The loss of a step and its evaluation have the same step.
            if step < self._last:
                start_again(when, step)
            self._last = step
            self._write(when, step, values)


def _curve(log: Path, folder: Path) -> Callable[[], None]:
    """Return a function that updates the event files of one run."""
    # Its packages' folder is on sys.path by now.
    from tensorboard.compat.proto import (  # type: ignore[import-not-found]
        event_pb2,
        summary_pb2,
    )
    from tensorboard.summary.writer.event_file_writer import (  # type: ignore[import-not-found]
        EventFileWriter,
    )

    writer = EventFileWriter(str(folder))

    def write(when: float, step: int, values: Mapping[str, float]) -> None:
        shown = [summary_pb2.Summary.Value(tag=k, simple_value=v) for k, v in values.items()]
        summary = summary_pb2.Summary(value=shown)
        writer.add_event(event_pb2.Event(wall_time=when, step=step, summary=summary))

    def start_again(when: float, step: int) -> None:
        started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        writer.add_event(event_pb2.Event(wall_time=when, step=step, session_log=started))

    curve = Curve(log, write)

    def update() -> None:
        curve.update(start_again)
        writer.flush()

    return update


def _nothing() -> None:
    """Replace the update of a log that cannot be read any more."""


def _follow(settings: Mapping[str, str], base: Path, folder: Path) -> None:
    """Look for new runs and new lines, forever."""
    curves: dict[str, Callable[[], None]] = {}
    while True:
        saves = base / "board" / "saves"
        for name, log in sources(Path(settings["runs"]), saves, settings.get("run")):
            if name not in curves:
                curves[name] = _curve(log, folder / name)
            try:
                curves[name]()
            except ValueError as damaged:
                print(damaged)
                curves[name] = _nothing
        time.sleep(_LOOK_SECONDS)


def serve(record_file: Path) -> None:
    """Serve until the process ends. Raises UsageError without a key."""
    record = ServiceRecord.read(record_file)
    gate = manager.gate(record_file, browser=True)
    settings = record.settings
    # After the environment's own packages, which take precedence.
    sys.path.append(settings["packages"])
    base = record_file.parent.parent
    folder = record_file.parent / "curves"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)

    from tensorboard import program  # type: ignore[import-not-found]

    def server(app: Any, flags: Any) -> Any:
        return program.create_port_scanning_werkzeug_server(before_wsgi(app, gate), flags)

    served = program.TensorBoard(server_class=server)
    argv = ["--logdir", str(folder), "--host", LOOPBACK, "--port", str(record.port)]
    # Its fast reader, if the package has one, opens another port without access control.
    argv += ["--load_fast", "false"]
    served.configure(argv=["tensorboard", *argv, "--reload_interval", "2"])
    served.launch()  # in a thread of its own
    _follow(settings, base, folder)


if __name__ == "__main__":
    sys.exit(manager.serve_record(serve))
