"""The current folder of a run's workers: new, ours alone, and outside of the run folder.

A run folder may have come from a host, and libraries take more from their current folder than
Python's modules: matplotlib its settings, numba its own, git (which trackers call) its hooks. So
no worker stands in it. What a library leaves in its current folder (wandb, swanlab and others
keep their records there) is the run's: it is moved into the run folder when the work ends.
Standard library.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tunesmith.core import isolated
from tunesmith.job.run.folder import RunFolder

# Beside the run folders, so that moving is renaming; no run's id begins with a dot.
_FOLDER = ".work"
# Name in the run folder of what was left, before the time.
LEFT = "left-"


@contextlib.contextmanager
def of(run: RunFolder) -> Iterator[Path]:
    """Give an empty folder that only this user can enter, for as long as the run is worked on.

    Whoever enters holds the run's lock. What an earlier supervisor could not put away (kill -9,
    power loss) is put away first. Where no folder can be made (a full or read-only disk) it is
    `isolated.NOWHERE`: the work may still be done, and says itself when it may not.
    """
    home = run.path.parent / _FOLDER
    with contextlib.suppress(FileNotFoundError):
        for folder in sorted(home.glob(f"{_escaped(run.run_id)}@*")):
            _put_away(folder, run)
    try:
        home.mkdir(mode=0o700, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=f"{run.run_id}@", dir=home))
    except OSError:
        yield Path(isolated.NOWHERE)
        return
    try:
        yield place
    finally:
        _put_away(place, run)


def _put_away(folder: Path, run: RunFolder) -> None:
    """Remove an empty folder; move one with something in it into the run folder, whole.

    One that cannot be moved now (a read-only disk) stays for the next time.
    """
    with contextlib.suppress(OSError):
        folder.rmdir()
        return
    name = LEFT + time.strftime("%Y%m%d-%H%M%S")
    for number in range(100):
        # A name that is taken, by a link too, is never written into: rename(2) refuses.
        with contextlib.suppress(OSError):
            folder.rename(run.path / (f"{name}-{number}" if number else name))
            return


def _escaped(name: str) -> str:
    """Return a name for `glob`, which takes some of its characters for patterns."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
