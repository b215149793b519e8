"""pytest inside the training environment: an environment beside it with the same packages."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path

# What pytest consists of: pure Python, of the control environment's version. What it needs
# besides has the training environment itself.
_PYTEST = ("pytest", "_pytest", "py", "pluggy", "iniconfig")
_ASK = "import sysconfig; print(sysconfig.get_path('purelib'))"


def overlay(python: Path, root: Path, folder: Path) -> Path:
    """Make an environment in `folder` and return its interpreter.

    It has the packages of the environment of `python`, pytest, and tunesmith from the repository
    at `root`, even where Python is told to look at nothing else (-I).
    """
    subprocess.run([python, "-m", "venv", "--without-pip", folder], check=True)
    made = folder / "bin" / "python"
    there, here = (
        subprocess.run([p, "-Ic", _ASK], check=True, capture_output=True, text=True).stdout.strip()
        for p in (python, made)
    )
    (Path(here) / "tunesmith.pth").write_text(f"{root / 'src'}\n{there}\n", encoding="utf-8")
    for name in _PYTEST:
        found = importlib.util.find_spec(name)
        assert found is not None and found.origin is not None, name
        origin = Path(found.origin)
        own = origin.parent if origin.name == "__init__.py" else origin
        (Path(here) / own.name).symlink_to(own)
    return made


def run(python: Path, root: Path, file: Path, **environment: str) -> None:
    """Run the tests of a file by that interpreter; AssertionError with their output."""
    done = subprocess.run(
        [
            *(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header"),
            # Neither the settings nor the fixtures of the control side.
            *("-c", os.devnull, f"--rootdir={root}", f"--confcutdir={file.parent}", file),
        ],
        cwd=root,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root / "tests"), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
