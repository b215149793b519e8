"""A run's folder, taken away by one of all who ask for it. Standard library and yaml only."""

from __future__ import annotations

import shutil
from pathlib import Path

from tunesmith.core.errors import UsageError
from tunesmith.core.files import locked
from tunesmith.job.run.folder import RunFolder, acquire


def take_away(run: RunFolder, place: Path) -> int:
    """Move a run nobody works in to `place`, of the same disk; return the bytes it holds alone.

    Out of sight first: a deletion that is cut short leaves no half a run behind. Raises
    UsageError when somebody works in the run, or another command has taken it away.
    """
    with locked(run.path):
        if not run.path.is_dir():
            raise UsageError(f"run {run.run_id} is gone: another command has deleted it")
        lock = acquire(run)
        try:
            held = sum(
                path.stat().st_size
                for path in run.path.rglob("*")
                # An input that is still in the folder of uploads frees nothing.
                if path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1
            )
            run.path.rename(place)
        finally:
            lock.release()
    return held


def delete_all(folder: Path) -> None:
    """Delete what was taken away into `folder`, by this command or one that was killed.

    One at a time: who comes second waits, and finds it done.
    """
    with locked(folder / "all"):
        for place in list(folder.iterdir()):
            shutil.rmtree(place)
