"""A training environment with one thing in it replaced by a stand-in.

Processes of ours take code from their environment alone (tunesmith.core.isolated), so a stand-in
has to be in one: this is an environment made of links into the real one, whose `sitecustomize` runs
the file that the variable STANDIN names.
"""

from __future__ import annotations

from pathlib import Path

STANDIN = "TUNESMITH_TEST_STANDIN"
_HOOK = f"""import os
if os.environ.get("{STANDIN}"):
    with open(os.environ["{STANDIN}"]) as file:
        exec(compile(file.read(), file.name, "exec"), {{"__name__": "standin"}})
"""


def overlaid(python: Path, folder: Path) -> Path:
    """Return the interpreter of an environment in `folder` that has all the packages of another."""
    real = python.absolute().parent.parent
    (packages,) = real.glob("lib/python3*/site-packages")
    own = folder / packages.relative_to(real)
    own.mkdir(parents=True)
    (own / "all.pth").write_text(f"import site; site.addsitedir({str(packages)!r})\n")
    (own / "sitecustomize.py").write_text(_HOOK)
    (folder / "bin").mkdir()
    for program in (real / "bin").iterdir():
        (folder / "bin" / program.name).symlink_to(program.resolve())
    home = python.resolve().parent
    (folder / "pyvenv.cfg").write_text(f"home = {home}\ninclude-system-site-packages = false\n")
    return folder / "bin" / python.name
