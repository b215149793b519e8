"""A stand-in for the image's base, where no registry can be reached: Debian with CPython 3.10.

Ubuntu 22.04 of NVIDIA's base brings Python 3.10 as a package; Debian 12 has none, so the
CPython of this machine is copied in. All else is real.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

from replica import build
from replica.engine import docker, locked, state
from tunesmith.stack.definition import load_stack
from tunesmith.stack.environment import find_python

ROOT = Path(__file__).resolve().parents[2]
REPOSITORY = "tunesmith-image-base"

_LEFT_OUT = ("test", "idlelib", "tkinter", "turtledemo", "site-packages", "__pycache__")
_RECIPE = """\
FROM {base}
COPY python /usr/local/python
RUN echo /usr/local/python/lib > /etc/ld.so.conf.d/python.conf && ldconfig \\
    && ln -s /usr/local/python/bin/python{version} /usr/local/bin/python{version}
"""


def build_base() -> str:
    """Return the tag of the base, made where it is not there yet."""
    version = load_stack(ROOT / "configs" / "stack.yml").python
    interpreter = find_python(version)
    if interpreter is None:
        raise RuntimeError(f"no CPython {version} on this machine (TUNESMITH_PYTHON names one)")
    debian = build._base_tag()
    material = f"{debian} {interpreter} {_RECIPE} {_LEFT_OUT}"
    tag = f"{REPOSITORY}:{hashlib.sha256(material.encode()).hexdigest()[:12]}"
    with locked("build"):
        if not build._exists(debian):
            build._make_base(debian)
        if not build._exists(tag):
            _build(tag, debian, interpreter, version)
    return tag


def _build(tag: str, debian: str, interpreter: str, version: str) -> None:
    code = "import sys; print(sys.base_prefix)"
    asked = subprocess.run([interpreter, "-c", code], check=True, capture_output=True, text=True)
    prefix = Path(asked.stdout.strip())
    with tempfile.TemporaryDirectory(dir=state()) as scratch:
        context = Path(scratch)
        python = context / "python"
        (python / "bin").mkdir(parents=True)
        shutil.copy2(prefix / "bin" / f"python{version}", python / "bin")
        shutil.copytree(prefix / "include", python / "include")
        shutil.copytree(
            prefix / "lib" / f"python{version}",
            python / "lib" / f"python{version}",
            ignore=lambda _, names: {n for n in names if n in _LEFT_OUT or n.endswith(".a")},
            symlinks=True,
        )
        for shared in prefix.glob("lib/libpython*.so*"):
            shutil.copy2(shared, python / "lib", follow_symlinks=False)
        (context / "Dockerfile").write_text(_RECIPE.format(base=debian, version=version))
        docker("build", "--tag", tag, context)
