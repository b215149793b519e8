"""A lock that installs in seconds, for the tests that provision many times.

uv, packaging and PyYAML are the real wheels of the locks; what takes gigabytes is a stand-in
that answers `llamafactory-cli version` and has modules to compile. The index is served by
the mirror of the replica host itself. tests/host/test_provision.py installs the real lock.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from replica.engine import docker, locked, state
from replica.replica import MIRROR, Replica, mirror_content
from replica_fixtures import HostProject
from tests.playbook.rented import wheel
from tunesmith.core.files import sha256_of

# What of the locks is installed as it is.
_REAL = ("packaging", "pyyaml")
_STAND_INS = ("llamafactory", "torch", "transformers")
# `launcher` is what a job of LLaMA-Factory imports first.
_MODULES = ("__init__", "launcher")
# Bytes: the disk may be small, too.
_SIZE = 200_000_000


@dataclass(frozen=True)
class SmallLock:
    """The folder of the index, and the lines of the lock."""

    index: Path
    lines: str


def small_lock(root: Path) -> SmallLock:
    """Return the lock; its wheels are fetched once and kept beside the replicas' disks."""
    locks = root / "configs" / "locks"
    cu128, control = ((locks / name).read_text() for name in ("cu128.txt", "control.txt"))
    folder = state() / "small-lock"
    with locked("small-lock"):
        folder.mkdir(exist_ok=True)
        lines = [_block(cu128, name) for name in _REAL]
        for block in (*lines, _block(control, "uv")):
            _fetch(folder, block)
        version = yaml.safe_load((root / "configs/stack.yml").read_text())["training"][
            "llamafactory"
        ]
        code = f"def main():\n    print('Welcome to LLaMA Factory, version {version}')\n"
        for name in _STAND_INS:
            file = folder / f"{name}-{version}-py3-none-any.whl"
            # Made anew each time, the same bytes: one of before may lack a module.
            wheel(folder, name, version, {f"{name}/{module}.py": code for module in _MODULES})
            lines.append(f"{name}=={version} --hash=sha256:{sha256_of(file)}\n")
        for file in folder.glob("*.whl"):
            page = folder / file.name.partition("-")[0].lower() / "index.html"
            page.parent.mkdir(exist_ok=True)
            page.write_text(f'<a href="../{file.name}">{file.name}</a>\n')
    return SmallLock(folder, "".join(lines))


def use(project: HostProject, lock: SmallLock, *replicas: Replica) -> None:
    """Let the clone of a test provision the small lock, from the mirrors of these hosts."""
    configs = project.project.root / "configs"
    for flavour in project.project.stack.flavours.values():
        flavour.lock.write_text(lock.lines)
    stack = configs / "stack.yml"
    text = re.sub(r"size_bytes: [68]_\d00_000_000", f"size_bytes: {_SIZE}", stack.read_text())
    stack.write_text(re.sub(r"spare_bytes: .*", f"spare_bytes: {_SIZE}", text))
    mirror = mirror_content(pypi_indexes=[f"{MIRROR}/simple"])
    project.mirror.write_text(yaml.safe_dump(mirror), encoding="utf-8")
    for replica in replicas:
        serve(lock, replica)


def serve(lock: SmallLock, replica: Replica) -> None:
    """Put the index on a host's mirror; a rebuilt host has lost it."""
    docker("cp", f"{lock.index}/.", f"{replica.container}:/srv/mirror/simple")


def _block(lock: str, name: str) -> str:
    found = re.search(rf"(?ms)^{name}==.*?[^\\]$\n", lock)
    assert found, f"{name} is not in the lock"
    return found[0]


def _fetch(folder: Path, block: str) -> None:
    name, version = re.match(r"([a-z]+)==(\S+)", block).groups()  # type: ignore[union-attr]
    if any(folder.glob(f"[{name[0]}{name[0].upper()}]{name[1:]}-{version}-*.whl")):
        return
    lines = folder / "wanted.txt"
    lines.write_text(block)
    argv = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    argv += ["--disable-pip-version-check", "--only-binary", ":all:", "--python-version", "3.10"]
    argv += ["--dest", str(folder), "--requirement", str(lines)]
    subprocess.run(argv, check=True)
