"""A run of a host, downloaded and, when asked, merged here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tunesmith.cli.base_model import base_model_location, fetch_base_model
from tunesmith.cli.console import moving, say
from tunesmith.cli.outcome import pull_run, work_on
from tunesmith.cli.target import target_of
from tunesmith.core import isolated
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.hosts.remote import SSH_FAILED
from tunesmith.job.run.manifest import PARTS, USUAL
from tunesmith.plan import build
from tunesmith.plan.options import words_of
from tunesmith.plan.target import PullDestination, PullSource, Target
from tunesmith.project import Project
from tunesmith.targets.capability import require


def pull(
    root: Path,
    on: str,
    run: str | None,
    what: str,
    *,
    merge_here: bool = False,
    mirror: str = "",
    dry: bool = False,
) -> None:
    """Bring a run, or parts of it (PARTS), from a host under .tunesmith/runs/.

    `merge_here`: bring what a merge needs instead of the merged model, and merge; `mirror` is
    that of the base model.
    """
    project = Project.at(root)
    if merge_here:
        # One that is unknown is told before the host works.
        project.mirror(mirror or "default")
    elif mirror:
        raise UsageError(
            f"--mirror {mirror}: a pull comes from {on} itself",
            hint="--mirror is for the base model of --merge-here",
        )
    target = target_of(project, on)
    source = require(target, PullSource)
    parts = words_of(what) or (USUAL if merge_here else PARTS)
    if unknown := [part for part in parts if part not in PARTS]:
        raise UsageError(
            f"--what {unknown[0]}: no such part", hint=f"--what takes {', '.join(PARTS)}"
        )
    if merge_here and ("adapter" not in parts or "merged" in parts):
        raise UsageError(
            f"--what {what}: --merge-here downloads the adapter and makes the rest",
            hint="leave --what out",
        )
    run_id = target.find(run)
    if merge_here or dry:
        # Before the host works for a pull that would be refused.
        source.check_pull(run_id)
    if merge_here:
        build.check_trained(target, run_id)
    if dry:
        say(f"would pull {', '.join(parts)} of run {run_id} from {target.name}")
        if merge_here:
            name = str(target.request(run_id).needed_model().name)
            place = base_model_location(project, name, mirror or "default")
            say(f"would merge its adapter with {place}")
        return
    if merge_here:
        _make_bundle(target, run_id)
    pull_run(target, run_id, parts)
    if merge_here:
        _merge_here(project, run_id, mirror or "default")


def _make_bundle(target: Target, run_id: str) -> None:
    """Let the host write all of the merged model but its weights."""
    say(f"{target.name}: exporting config and tokenizer")
    run = str(target.location(run_id).run)
    code = target.interact("tunesmith.job.merge.bundle", ["--run", run])
    if code == SSH_FAILED:
        raise TunesmithError(
            f"{target.name}: the connection was lost",
            hint="the same command resumes where it stopped",
        )
    if code:
        raise SystemExit(code)  # it has said why itself


def _merge_here(project: Project, run_id: str, mirror: str) -> None:
    """Merge a pulled run with the base model of this machine, which is fetched if need be.

    With the training environment it is merged and proven as on the host, without one by NumPy.
    """
    target = target_of(project, "local")
    require(target, PullDestination).adopt_pulled_run(
        run_id, lambda name: fetch_base_model(project, name, mirror, None)
    )
    if project.environment().current():
        work_on(target, build.plan_merge(project, target, run_id, ()))
    else:
        say("no training environment here: merging with NumPy, result not verified")
        run = project.run_folder(run_id).absolute()
        argv = isolated.argv(sys.executable, "tunesmith.job.merge.offline", str(run))
        with moving("merging"):
            code = subprocess.run(
                argv, cwd=isolated.NOWHERE, check=False, stdout=subprocess.DEVNULL
            ).returncode
        if code:
            raise SystemExit(code)
    say(f"merged model: {project.run_folder(run_id) / 'merged'}")
