"""The packages of TensorBoard, which the training environment does not contain.

They are installed locally from a separate lock into a separate folder, and copied to a host with
rsync: a host needs no package index for them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from uv import find_uv_bin

from tunesmith.core.errors import TunesmithError
from tunesmith.core.files import locked, sha256_of
from tunesmith.project import Project


def lock_of(project: Project) -> Path:
    """Return the hashed lock."""
    return project.root / "configs" / "locks" / "tensorboard.txt"


def folder_name(project: Project) -> str:
    """Return the name of the folder of this lock's packages, here and on a host."""
    return f"tensorboard-{sha256_of(lock_of(project))[:16]}"


def install(project: Project, mirror: str) -> Path:
    """Return the folder of the packages below .tunesmith/packages/, created if missing.

    For the training environment's Python and platform (stack.yml), whatever this machine is.
    Raises TunesmithError if no index of the mirror has them.
    """
    folder = project.folder("packages") / folder_name(project)
    with locked(folder):
        return folder if folder.is_dir() else _fetch(project, folder, mirror)


def _fetch(project: Project, folder: Path, mirror: str) -> Path:
    part = folder.with_name(f".{folder.name}.{os.getpid()}")
    stack = project.stack
    argv = [find_uv_bin(), "pip", "install", "--quiet", "--target", str(part), "--no-deps"]
    argv += ["--require-hashes", "--only-binary", ":all:", "--python", sys.executable]
    argv += ["--python-version", stack.python, "--python-platform", stack.platform]
    argv += ["--requirements", str(lock_of(project))]
    output = ""
    try:
        for index in project.mirror(mirror).pypi_indexes:
            variables = {**os.environ, "UV_NO_CONFIG": "1", "UV_DEFAULT_INDEX": index}
            done = subprocess.run(argv, env=variables, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                part.rename(folder)
                return folder
            output = done.stderr
    finally:
        shutil.rmtree(part, ignore_errors=True)
    raise TunesmithError(
        "TensorBoard's packages could not be fetched; `inv tensorboard --mirror cn` asks other "
        "indexes",
        output.splitlines()[-3:],
    )
