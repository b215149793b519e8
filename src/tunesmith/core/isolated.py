"""Starting our Python processes without an import path that others can write to.

`python -m` and `python -c` put the current folder first on `sys.path`: a `yaml.py` in a run
folder pulled from a host would run. PYTHONPATH and the user's site-packages add further folders.
`-I` omits all three; the environment's `tunesmith.pth` makes tunesmith importable. `-I` also
ignores every PYTHON* variable, so a process that needs one gets it through `options`. Standard
library, Python 3.10.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath

FLAGS = ("-I",)
UNBUFFERED = ("-u",)
# A working folder that only an administrator can write to, for processes that need none.
NOWHERE = "/"
# The variables of Python that add code locations.
_IMPORTS = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONUSERBASE", "PYTHONPLATLIBDIR")


def argv(
    python: str | PurePath, module: str, *words: str, options: Sequence[str] = ()
) -> list[str]:
    """Return the command that runs a module; `options` are Python's own, such as `UNBUFFERED`."""
    return [str(python), *FLAGS, *options, "-m", module, *words]


def code(python: str | PurePath, text: str, *words: str) -> list[str]:
    """Return the command that runs a program given as text."""
    return [str(python), *FLAGS, "-c", text, *words]


def variables(of: Mapping[str, str]) -> dict[str, str]:
    """Return environment variables for our processes and for programs they start without `-I`.

    Variables that add code locations are removed, and so are PATH entries that mean the current
    folder: a `git` or `ssh` found there would not be the intended one.
    """
    allowed = {key: value for key, value in of.items() if key not in _IMPORTS}
    return allowed | {"PATH": programs(of.get("PATH", os.defpath)), "PYTHONNOUSERSITE": "1"}


def programs(path: str) -> str:
    """Return a PATH without entries that are not absolute (an empty one is the current folder)."""
    return os.pathsep.join(one for one in path.split(os.pathsep) if Path(one).is_absolute())
