"""A run followed to its end, and what its end leads to: report, pull, power-off."""

from __future__ import annotations

import os
from pathlib import Path

from tunesmith.cli.console import console, say
from tunesmith.cli.follow import Detached, follow
from tunesmith.cli.target import on_option
from tunesmith.core import formats
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.job.run.events import Summary
from tunesmith.job.run.folder import RunFolder
from tunesmith.job.run.manifest import PARTS
from tunesmith.plan import start
from tunesmith.plan.options import THEN
from tunesmith.plan.plan import Plan
from tunesmith.plan.target import PowerControl, PullSource, Target
from tunesmith.project import Project
from tunesmith.targets.capability import require


def finish(project: Project, target: Target, run_id: str, offset: int = 0) -> None:
    """Follow a run; when it has succeeded, write its report and do what was asked to follow."""
    await_end(target, run_id, offset)
    request = target.request(run_id)
    then = [word for word in request.then or () if word in THEN]
    if "pull" in then and isinstance(target, PullSource):
        pull_run(target, run_id, PARTS)
    else:
        write_page(target.results(run_id))
    if isinstance(target, PowerControl):
        _leave(target, target, run_id, then)


def work_on(target: Target, plan: Plan) -> Summary:
    """Start a plan's phases, follow them, and return the last phase's summary."""
    run_id = plan.run_id
    offset = target.events(run_id, 0)[1] if target.exists(run_id) else 0
    start.start_on_run(target, plan)
    await_end(target, run_id, offset)
    events, _ = target.events(run_id, offset)
    summary = next((event for event in reversed(events) if isinstance(event, Summary)), None)
    if summary is None:
        raise TunesmithError(
            f"run {run_id}: its last phase left no summary in events.jsonl",
            hint=f"`inv logs{on_option(target)} --run {run_id}` shows why",
        )
    return summary


def await_end(target: Target, run_id: str, offset: int) -> None:
    """Follow a run to its end. Raises TunesmithError when it failed; leaves on Ctrl-C."""
    ended = follow(target, run_id, console, offset)
    on = on_option(target)
    if isinstance(ended, Detached):
        say(
            f"\nthe run goes on; `inv attach{on} --run {run_id}` follows it, "
            f"`inv stop{on} --run {run_id}` ends it"
        )
        raise SystemExit(os.EX_OK)
    if ended.state == "failed":
        log = target.results(run_id) / "train.log"
        raise TunesmithError(f"run {run_id} failed: {ended.message}", [f"log: {log}"])
    if ended.state == "stopped":
        say(f"run {run_id}: stopped at step {ended.step}; {ended.message}")
        raise SystemExit(os.EX_OK)


def pull_run(target: Target, run_id: str, parts: tuple[str, ...]) -> Path:
    folder = require(target, PullSource).pull(run_id, parts)
    size = sum(record.size for record in RunFolder(folder).copied().files.values())
    say(f"pulled: {folder} ({formats.size(size)}, every file as on {target.name})")
    if "report" in parts:
        # Of the data that came: the host's own page stays there.
        write_page(folder)
    return folder


def write_page(folder: Path) -> None:
    if (folder / "config.yaml").is_file():
        from tunesmith.report.page import write_report

        say(f"report: {write_report(folder)}")


def _leave(target: Target, power: PowerControl, run_id: str, then: list[str]) -> None:
    """Power the machine off when that was asked for; else say what leaving it alone costs."""
    rental = power.rental()
    if "poweroff" in then and "pull" in then:
        say(f"{target.name}: powering off")
        try:
            power.power_off(run_id)
        except UsageError as error:
            say(f"{target.name} stays on: {error.line}")
            return
        say(f"{target.name}: off; {rental.note}")
    elif "poweroff" in then:
        say(f"{target.name}: powers itself off; {rental.note}")
    elif "pull" not in then:
        say(f"fetch it: inv pull --on {target.name} --run {run_id}")
    if rental.release_days:
        say(
            f"{rental.platform} deletes an instance and its disk {rental.release_days} days after "
            "power-off"
        )


def check_after(target: Target, then: tuple[str, ...]) -> None:
    """Refuse what cannot follow a run on this target, before it is started."""
    if "pull" in then:
        require(target, PullSource)
    if "poweroff" in then:
        require(target, PowerControl).poweroff_command()
