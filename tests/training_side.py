"""pytest inside the training environment: an environment beside it with the same packages."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

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


def run(
    python: Path, root: Path, files: Sequence[Path], scratch: Path, environment: Mapping[str, str]
) -> dict[str, list[str]]:
    """Run files of tests in one process of that interpreter; return what failed in each.

    The answer has the file's stem and, for each of its tests, its name with the failure, or "" for
    one that passed. A skip is a failure: nothing is lacking there.
    """
    report = scratch / "report.xml"
    done = subprocess.run(
        [
            *(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header"),
            # Neither the settings nor the fixtures of the control side.
            *("-c", os.devnull, f"--rootdir={root}", f"--confcutdir={files[0].parent}"),
            *(f"--junit-xml={report}", f"--basetemp={scratch / 'files'}", *files),
        ],
        cwd=root,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(scratch / "hub"),
            "LLAMAFACTORY_VERBOSITY": "WARN",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": str(root / "tests"),
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert report.is_file(), (done.stdout + done.stderr)[-6000:]
    results = defaultdict(list)
    # By pytest of this machine, in a process of ours.
    for case in ElementTree.parse(report).iter("testcase"):
        where = f"{case.get('classname')}.{case.get('name')}"
        bad = [one for kind in ("failure", "error", "skipped") for one in case.findall(kind)]
        told = "\n".join(f"{one.get('message')}\n{one.text}" for one in bad)
        (stem,) = [file.stem for file in files if f".{file.stem}." in f".{where}."]
        results[stem].append(f"{case.get('name')}: {told}" if bad else "")
    assert results or done.returncode == 0, done.stdout + done.stderr
    return dict(results)
