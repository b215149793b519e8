"""Runs as a list, their logs, and their removal."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from tunesmith.cli.console import console, say, write
from tunesmith.cli.target import on_option, target_of
from tunesmith.core import formats
from tunesmith.core.errors import TunesmithError
from tunesmith.core.printable import printable
from tunesmith.hosts import inventory
from tunesmith.job.run.codec import encode
from tunesmith.job.run.schema import RunStatus
from tunesmith.project import Project


def list_runs(root: Path, on: str, *, as_json: bool) -> None:
    """Print every run."""
    project = Project.at(root)
    names = ["local", *inventory.names(project.inventory)] if on == "all" else on.split(",")
    found = []
    silent = 0
    for name in names:
        try:
            found += target_of(project, name).runs()
        except TunesmithError as error:
            if len(names) == 1:
                raise
            # One host that is off must not hide the runs of the others.
            silent += 1
            console.print(error.render(), markup=False, soft_wrap=True, style="red")
    if as_json:
        say(json.dumps(encode(found), ensure_ascii=False, indent=2))
        return
    if not found:
        say("no runs yet; `inv train` or `make demo` makes one")
        return
    table = Table(box=None, pad_edge=False)
    # An id is there to be copied: it is never cut.
    table.add_column("run", no_wrap=True, overflow="ignore")
    for name in ("on", "state", "step", "loss", "phases"):
        # Neither is what a run does, and why, where there is room for little.
        table.add_column(name, overflow="fold" if name == "state" else "ellipsis")
    if any(run.origins for run in found):
        table.add_column("from", overflow="fold")
    for run in found:
        step = f"{run.step or 0}/{run.total_steps or '?'}"
        loss = f"{run.loss:.4f}" if run.loss is not None else ""
        cells = [run.run_id, run.on, _state(run), step, loss, _phases(run.phases)]
        table.add_row(*cells, *([", ".join(run.origins)] if run.origins else []))
    console.print(table)
    for run in found:
        if run.failure == "damaged":
            on = "" if run.on == "local" else f" on {run.on}"
            say(f"run {run.run_id}{on}: {run.message}")
    if silent:
        raise TunesmithError(f"{silent} of {len(names)} targets did not answer; see above")


def _state(run: RunStatus) -> str:
    """Return a run's state, with the failure or, while it is worked on, what has started it."""
    if run.failure:
        return f"{run.state} ({run.failure})"
    cause = run.cause if run.active else None
    # That somebody has asked for it is the usual case.
    if cause in (None, "user"):
        return run.state
    after = f": {run.retried}" if run.retried else ""
    return f"{run.state} ({cause}{after})"


def _phases(phases: Mapping[str, str]) -> str:
    """Return the phases in words; what has succeeded needs none beside its name."""
    return ", ".join(
        name if state == "succeeded" else f"{name} {state}" for name, state in phases.items()
    )


def logs(root: Path, on: str, run: str | None, *, follow: bool) -> None:
    """Print a run's log, and with `follow` what is added to it until the run ends."""
    target = target_of(Project.at(root), on)
    try:
        for look in target.watch(target.find(run), log=0):
            if look.lost is not None:
                sys.stderr.write(f"{printable(look.lost)}\n")
                continue
            write(look.log)
            if not follow and not look.more:
                return
    except KeyboardInterrupt:
        return


def remove(root: Path, on: str, run: str, *, dry: bool) -> None:
    """Delete a run."""
    target = target_of(Project.at(root), on)
    run_id = target.find(run)
    if dry:
        say(f"would delete run {run_id}{on_option(target)}")
        return
    say(f"run {run_id}: deleted, {formats.size(target.remove(run_id))} free again")
