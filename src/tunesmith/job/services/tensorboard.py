"""TensorBoard over our runs: `python -m tunesmith.job.services.tensorboard RECORD`.

TensorBoard reads event files, which no training here writes. They are made from what each run
does write, events.jsonl, and go on growing with it; trainings of LLaMA Board have LLaMA-
Factory's trainer_log.jsonl instead. A run continued from a checkpoint repeats steps: there a
session start tells TensorBoard to forget what came after (event.proto, SessionLog).

It stands behind job/services/access.py, as by itself it has no login.
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
# Tag of each value; events.jsonl and trainer_log.jsonl name them differently.
_OF_LOG = {
    "train/loss": ("loss",),
    "train/learning_rate": ("learning_rate", "lr"),
    "train/grad_norm": ("grad_norm",),
    "train/tokens": ("total_tokens",),
    "eval/loss": ("eval_loss",),
}


def scalars(entry: Mapping[str, Any]) -> dict[str, float]:
    """Return the values by tag of one line of events.jsonl or trainer_log.jsonl."""
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
    """Return the step of a line that has scalars."""
    return int(entry["step"] if "step" in entry else entry["current_steps"])


def sources(runs: Path, saves: Path, run: str | None) -> Iterator[tuple[str, Path]]:
    """Yield name and log of every run; `run` is the folder of the only one wanted."""
    for file in sorted(runs.glob("*/events.jsonl")):
        if run is None or file.parent == Path(run):
            yield file.parent.name, file
    for file in sorted(saves.glob("*/*/*/trainer_log.jsonl")) if run is None else ():
        if not (file.parent / OURS).exists():  # those are runs, shown by links
            yield f"board/{file.parent.parent.parent.name}/{file.parent.name}", file


class Curve:
    """One run's way from its log into TensorBoard's event files."""

    def __init__(self, log: Path, write: Callable[[float, int, Mapping[str, float]], None]) -> None:
        self._tail = EventTail(log, 0)
        self._write = write
        self._last = -1

    def go_on(self, start_again: Callable[[float, int], None]) -> None:
        """Write what is new; `start_again` is called where steps repeat."""
        for _, line in self._tail.lines():
            try:
                entry = parse_json(line)
                values = scalars(entry)
            except (ValueError, TypeError, KeyError, AttributeError):
                continue  # damaged: the curve has a gap
            if not values:
                continue
            step, when = step_of(entry), float(entry.get("time") or time.time())
            # The loss after a step and its evaluation have the same step.
            if step < self._last:
                start_again(when, step)
            self._last = step
            self._write(when, step, values)


def _curve(log: Path, folder: Path) -> Callable[[], None]:
    """Return what brings the event files of one run up to date."""
    # Its folder of packages is on sys.path by now.
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
        curve.go_on(start_again)
        writer.flush()

    return update


def _nothing() -> None:
    """Stand for a log that cannot be read any further."""


def _follow(settings: Mapping[str, str], base: Path, folder: Path) -> None:
    """Look for new runs and new lines, for ever."""
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
    """Serve until the process is ended. Raises UsageError without a key."""
    record = ServiceRecord.read(record_file)
    gate = manager.gate(record_file, browser=True)
    settings = record.settings
    # Behind the environment's own packages, which must stay as they are.
    sys.path.append(settings["packages"])
    base = record_file.parent.parent
    folder = record_file.parent / "curves"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)

    from tensorboard import program  # type: ignore[import-not-found]

    def server(app: Any, flags: Any) -> Any:
        return program.create_port_scanning_werkzeug_server(before_wsgi(app, gate), flags)

    served = program.TensorBoard(server_class=server)
    words = ["--logdir", str(folder), "--host", LOOPBACK, "--port", str(record.port)]
    # Its quicker reader, where its package has one, has a port of its own that anybody may ask.
    words += ["--load_fast", "false"]
    served.configure(argv=["tensorboard", *words, "--reload_interval", "2"])
    served.launch()  # in a thread of its own
    _follow(settings, base, folder)


if __name__ == "__main__":
    sys.exit(manager.serve_record(serve))
