"""Makes bytecode of an environment's modules, but of those that no job imports.

    python stack/bytecode.py SITE_PACKAGES PROCESSES PATTERN...

A PATTERN says what is left out, as a path below any folder: `tests/*` is every folder `tests`
with all that is below it. With `!` before it, it takes back what earlier ones left out. Python
makes that bytecode itself when somebody imports such a module. What is there and up to date
stays. Standard library only: an installation on a host sends this file and runs it there.
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

# Modules a process takes at a time.
_CHUNK = 16


def wanted(folder: Path, left_out: Sequence[str]) -> Iterator[Path]:
    """Yield the modules below a folder that no pattern leaves out."""
    rules = [rule(pattern) for pattern in left_out]
    start = len(str(folder)) + 1
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__"]
        inside = f"{place}/"[start:]
        for name in files:
            if name.endswith(".py") and is_wanted(inside + name, rules):
                yield Path(place, name)


def rule(pattern: str) -> tuple[bool, re.Pattern[str]]:
    """Return whether a pattern takes back, and what it matches."""
    back = pattern.startswith("!")
    return back, re.compile("(?:.*/)?" + fnmatch.translate(pattern[back:]))


def is_wanted(path: str, rules: Sequence[tuple[bool, re.Pattern[str]]]) -> bool:
    """Whether no rule leaves a path out, or a later one takes it back."""
    for back, matching in reversed(rules):
        if matching.match(path):
            return back
    return True


def make_bytecode(module: Path) -> None:
    """Make one module's bytecode where it has none that is up to date.

    One that is no Python of this version (a template, say) stays without. Raises OSError when it
    cannot be written.
    """
    target = Path(importlib.util.cache_from_source(str(module)))
    if target.is_file() and _head(target) == _head_of(module):
        return
    # Whoever imports it is told by Python.
    with contextlib.suppress(py_compile.PyCompileError):
        py_compile.compile(str(module), str(target), doraise=True)


def _head(bytecode: Path) -> bytes:
    with bytecode.open("rb") as stream:
        return stream.read(16)


def _head_of(module: Path) -> bytes:
    """Return how bytecode begins that goes with the file as it is (PEP 552)."""
    there = module.stat()
    sizes = (0, int(there.st_mtime) & 0xFFFFFFFF, there.st_size & 0xFFFFFFFF)
    return importlib.util.MAGIC_NUMBER + struct.pack("<III", *sizes)


def make_all(folder: Path, processes: int, left_out: Sequence[str]) -> None:
    """Make the bytecode of all modules wanted."""
    modules = list(wanted(folder, left_out))
    # What their authors might mend is no news here.
    warnings.simplefilter("ignore")
    with Pool(processes) as pool:
        for _ in pool.imap_unordered(make_bytecode, modules, _CHUNK):
            pass


if __name__ == "__main__":
    make_all(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
