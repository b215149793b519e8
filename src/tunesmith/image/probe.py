"""Runs inside an image to measure it: prints installed packages and sizes as JSON.

Standard library only: it is run as `python -c`, whatever tunesmith version the image has.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGES = next(Path(path) for path in sys.path if path.endswith("site-packages"))


def cuda() -> str | None:
    """Return torch's CUDA version without importing torch, which takes seconds."""
    text = (PACKAGES / "torch/version.py").read_text()
    found = re.search(r"^cuda.*= '([0-9.]+)'", text, re.MULTILINE)
    return found[1] if found else None


def packages() -> Iterator[tuple[str, str, str | None]]:
    for found in importlib.metadata.distributions():
        about = found.metadata
        yield about["Name"], found.version, about["License-Expression"] or about["License"]


def system() -> list[list[str]]:
    form = "${binary:Package}\t${Version}\t${Architecture}\n"
    argv = ["dpkg-query", "-W", "-f", form]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    return [line.split("\t") for line in done.stdout.splitlines()]


def release() -> list[str]:
    lines = Path("/etc/os-release").read_text().splitlines()
    values = dict(line.split("=", 1) for line in lines if "=" in line)
    return [values["ID"].strip('"'), values.get("VERSION_ID", "").strip('"')]


def sizes() -> dict[str, int]:
    """Return the bytes of each folder and top-level file of site-packages."""
    found: dict[str, int] = {}
    for folder, _, files in os.walk(PACKAGES):
        for file in (Path(folder) / name for name in files):
            top = file.relative_to(PACKAGES).parts[0]
            found[top] = found.get(top, 0) + file.lstat().st_size
    return found


answer: dict[str, Any]
if sys.argv[1:] == ["sizes"]:
    answer = dict(sizes())
else:
    answer = {
        "python": ".".join(map(str, sys.version_info[:3])),
        "cuda": cuda(),
        "packages": list(packages()),
        "system": system(),
        "os": release(),
    }
sys.stdout.write(json.dumps(answer))
