"""The runs of a folder: listed, found by name, and shown though one of them is damaged.

Standard library and yaml only.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.swap import recover
from tunesmith.job.run.folder import RunFolder
from tunesmith.job.run.run_id import RunId, is_run_id
from tunesmith.job.run.schema import ListedRun, RunStatus

# What shows that a folder is a run, though one of them may be gone.
_MARKS = ("run.json", "status.json", "events.jsonl")


def folders(runs: Path) -> list[Path]:
    """Return the folders of runs, by name."""
    try:
        found = sorted(path for path in runs.iterdir() if not path.name.startswith("."))
    except FileNotFoundError:
        return []
    return [path for path in found if _is_run(path)]


def _is_run(folder: Path) -> bool:
    try:
        return any((folder / mark).is_file() for mark in _MARKS)
    except OSError:
        return True  # what cannot be looked into is shown as damaged


def find(runs: Path, run_id: str | None) -> RunFolder:
    """Return a run, by default the newest. Raises UsageError naming the newest ones."""
    wanted = None if run_id is None else RunId(run_id)
    recover(runs)
    found = folders(runs)
    if not found:
        raise UsageError(f"no runs in {runs}", hint="`inv train` makes one")
    if wanted is None:
        wanted = RunId(max(found, key=_asked_at).name)
    if runs / wanted in found:
        recover(runs / wanted)
        return RunFolder(runs / wanted)
    shown = ", ".join(folder.name for folder in found[-5:])
    raise UsageError(f"no run {run_id!r}; the newest are {shown} (`inv runs` lists all)")


def list_runs(runs: Path) -> list[ListedRun]:
    """Return status, created, title and path of every run, oldest first.

    One whose files cannot be read is listed as failed, class `damaged`.
    """
    recover(runs)
    found = []
    for folder in folders(runs):
        run = RunFolder(folder)
        if not is_run_id(folder.name):
            why = f"{folder}: its name is no run id; rename it: A-Z a-z 0-9 . _ -"
            found.append(_damaged(run, why))
            continue
        try:
            request = run.request()
            item = _listed(run.status(), request.created, request.title, folder)
            origins = dict.fromkeys(origin.written for origin in request.origins)
            found.append(replace(item, origins=tuple(origins)))
        except TunesmithError as error:
            found.append(_damaged(run, error.line))
        except OSError as error:
            why = f"{error.filename or folder}: cannot be read ({error.strerror})"
            found.append(_damaged(run, why))
    return sorted(found, key=lambda item: (item.created, item.run_id))


def _asked_at(folder: Path) -> float:
    """Return when a run was asked for: when run.json was written."""
    for mark in _MARKS:
        try:
            return (folder / mark).stat().st_mtime
        except OSError:
            continue
    return 0.0


def _damaged(run: RunFolder, why: str) -> ListedRun:
    status = RunStatus(run_id=run.run_id, state="failed", failure="damaged", message=why)
    return _listed(status, "", "(damaged)", run.path)


def _listed(status: RunStatus, created: str, title: str, folder: Path) -> ListedRun:
    return ListedRun(**vars(status), created=created, title=title, path=str(folder))
