"""The working folder of a run's workers: new, private, and outside the run folder.

A run folder may have been pulled from a host, and libraries read more from the current folder than
Python modules: matplotlib and numba their settings, git (which trackers call) its hooks. So no
worker runs in it. Files that a library writes to its current folder (wandb, swanlab and others
keep their records there) belong to the run: they are moved to the run folder when the work ends.
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

# Beside the run folders, so that a move is a rename; no run id begins with a dot.
_FOLDER = ".work"
# Prefix, before the time, of the folder in the run folder with these files.
LEFT = "left-"


@contextlib.contextmanager
def of(run: RunFolder) -> Iterator[Path]:
    """Yield an empty folder that only this user can enter, while the run is worked on.

    The caller holds the run's lock. Remains of an earlier supervisor (kill -9, power loss) are
    moved first. If no folder can be created (a full or read-only disk), it is `isolated.NOWHERE`:
    the work may still succeed, and reports by itself if it cannot.
    """
    home = run.path.parent / _FOLDER
    with contextlib.suppress(FileNotFoundError):
        for folder in sorted(home.glob(f"{_escaped(run.run_id)}@*")):
            _put_away(folder, run)
    try:
        home.mkdir(mode=0o700, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{run.run_id}@", dir=home))
    except OSError:
        yield Path(isolated.NOWHERE)
        return
    try:
        yield folder
    finally:
        _put_away(folder, run)


def _put_away(folder: Path, run: RunFolder) -> None:
    """Remove the folder if it is empty, otherwise move it into the run folder.

    If it cannot be moved now (a read-only disk), it stays for the next time.
    """
    with contextlib.suppress(OSError):
        folder.rmdir()
        return
    name = LEFT + time.strftime("%Y%m%d-%H%M%S")
    for number in range(100):
        # An existing name, even a link, is never written into: rename(2) refuses.
        with contextlib.suppress(OSError):
            folder.rename(run.path / (f"{name}-{number}" if number else name))
            return


def _escaped(name: str) -> str:
    """Return a name escaped for `glob`, which treats some characters as patterns."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
