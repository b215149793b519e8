"""A folder of somebody else's: files that leave a mark when a program takes them for its own."""

from __future__ import annotations

from pathlib import Path

# What Python or a library may look for in a folder that is on its path, or that it stands in.
MODULES = (
    "yaml",
    "json",
    "runpy",
    "typing",
    "sitecustomize",
    "usercustomize",
    "torch",
    "numpy",
    "transformers",
    "datasets",
    "llamafactory",
    "accelerate",
    "huggingface_hub",
    "requests",
    "matplotlib_trap",
    "tasks",
)
PACKAGES = ("tunesmith", "tunesmith/job", "tunesmith/dataset")
PROGRAMS = ("git", "ssh", "rsync", "uv", "nvidia-smi", "gcc", "lscpu", "python", "python3.10")


def lay(folder: Path, mark: Path) -> None:
    """Fill `folder`; whoever runs any of it writes the name of what ran into the file `mark`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in MODULES:
        (folder / f"{name}.py").write_text(_marking(mark, name))
    for name in PACKAGES:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(_marking(mark, name))
    (folder / "trap.pth").write_text(f"import os; open({str(mark)!r}, 'a').write('pth ')\n")
    (folder / "matplotlibrc").write_text("backend: module://matplotlib_trap\n")
    for name in PROGRAMS:
        (folder / name).write_text(f"#!/bin/sh\nprintf '%s ' {name} >>'{mark}'\nexit 1\n")
        (folder / name).chmod(0o755)
    git = folder / ".git"
    (git / "objects").mkdir(parents=True)
    (git / "refs").mkdir()
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "config").write_text(f"[core]\n\tfsmonitor = \"echo fsmonitor >>'{mark}'; false\"\n")


def _marking(mark: Path, name: str) -> str:
    return f"open({str(mark)!r}, 'a').write({name + ' '!r})\n"


def sprung(mark: Path) -> str:
    """Return the names of what ran; empty when nothing did."""
    return mark.read_text() if mark.exists() else ""
