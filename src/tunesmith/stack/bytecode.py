"""Compiles the bytecode of an environment's modules, except those that no job imports.

    python stack/bytecode.py SITE_PACKAGES PROCESSES PATTERN...

A PATTERN excludes modules, as a path below any folder: `tests/*` is every folder `tests` with
everything below it. With `!` in front, it includes what earlier ones excluded. Python compiles
excluded modules itself on import. Up-to-date bytecode is kept. Standard library only: an
installation on a host sends this file and runs it there.
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib.util
import os
import py_compile
import re
import struct
import sys
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing import Pool
from pathlib import Path

# Modules per task.
_CHUNK = 16


def wanted(folder: Path, left_out: Sequence[str]) -> Iterator[Path]:
    """Yield the modules below a folder that no pattern excludes."""
    rules = [rule(pattern) for pattern in left_out]
    start = len(str(folder)) + 1
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__"]
        inside = f"{parent}/"[start:]
        for name in files:
            if name.endswith(".py") and is_wanted(inside + name, rules):
                yield Path(parent, name)


def rule(pattern: str) -> tuple[bool, re.Pattern[str]]:
    """Return whether a pattern includes again, and its expression."""
    back = pattern.startswith("!")
    return back, re.compile("(?:.*/)?" + fnmatch.translate(pattern[back:]))


def is_wanted(path: str, rules: Sequence[tuple[bool, re.Pattern[str]]]) -> bool:
    """Whether no rule excludes a path, or a later one includes it again."""
    for back, matching in reversed(rules):
        if matching.match(path):
            return back
    return True


def make_bytecode(module: Path) -> None:
    """Compile one module unless its bytecode is up to date.

    Files that are not valid Python of this version (such as templates) are skipped. Raises OSError
    if the bytecode cannot be written.
    """
    target = Path(importlib.util.cache_from_source(str(module)))
    if target.is_file() and _head(target) == _head_of(module):
        return
    # An import of it would report the error.
    with contextlib.suppress(py_compile.PyCompileError):
        py_compile.compile(str(module), str(target), doraise=True)


def _head(bytecode: Path) -> bytes:
    with bytecode.open("rb") as stream:
        return stream.read(16)


def _head_of(module: Path) -> bytes:
    """Return the header of up-to-date bytecode of a file (PEP 552)."""
    status = module.stat()
    sizes = (0, int(status.st_mtime) & 0xFFFFFFFF, status.st_size & 0xFFFFFFFF)
    return importlib.util.MAGIC_NUMBER + struct.pack("<III", *sizes)


def make_all(folder: Path, processes: int, left_out: Sequence[str]) -> None:
    """Compile all included modules."""
    modules = list(wanted(folder, left_out))
    # Warnings about other people's code are of no use here.
    warnings.simplefilter("ignore")
    with Pool(processes) as pool:
        for _ in pool.imap_unordered(make_bytecode, modules, _CHUNK):
            pass


if __name__ == "__main__":
    make_all(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
