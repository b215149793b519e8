"""How a Python of ours is started: with no import path that somebody else can write to.

`python -m` and `python -c` put the current folder first on `sys.path`: a `yaml.py` in a run
folder that came from a host would run. PYTHONPATH and the user's site-packages do it for a
folder that is named there. `-I` leaves all three out; tunesmith itself is found by the
environment's `tunesmith.pth`. It ignores every PYTHON* variable, so what a process needs of
them is said by `options`. Standard library, Python 3.10.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath

FLAGS = ("-I",)
UNBUFFERED = ("-u",)
# A current folder that only an administrator writes to, for a process that has no need of one.
NOWHERE = "/"
# Of the variables that Python reads, those that say where code comes from.
_IMPORTS = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONUSERBASE", "PYTHONPLATLIBDIR")


def argv(
    python: str | PurePath, module: str, *words: str, options: Sequence[str] = ()
) -> list[str]:
    """Return the command that runs a module; `options` are Python's own, as `UNBUFFERED`."""
    return [str(python), *FLAGS, *options, "-m", module, *words]


def code(python: str | PurePath, text: str, *words: str) -> list[str]:
    """Return the command that runs a text."""
    return [str(python), *FLAGS, "-c", text, *words]


def variables(of: Mapping[str, str]) -> dict[str, str]:
    """Return an environment for our processes and for what those start without `-I`.

    Left out are the variables that bring code from elsewhere, and entries of PATH that mean the
    current folder: a `git` or an `ssh` that lies there is not the one that was meant.
    """
    kept = {key: value for key, value in of.items() if key not in _IMPORTS}
    return kept | {"PATH": programs(of.get("PATH", os.defpath)), "PYTHONNOUSERSITE": "1"}


def programs(path: str) -> str:
    """Return a PATH without the entries that are no absolute folder (empty: the current one)."""
    return os.pathsep.join(one for one in path.split(os.pathsep) if Path(one).is_absolute())
