"""The sha256 of files that are being written: read as they grow, not once more at their end."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from tunesmith.core.errors import TunesmithError

_PIECE = 1 << 18  # bytes read at once: they are still in the processor's cache when hashed


class Followed:
    """Hashes files one after another while tasks write them, never ahead of what is there.

    `files` are paths with an open descriptor and the size they will have; `ends` says of each
    task, in the order of the files' bytes, how many bytes of all files are there when it and
    those before it have ended.
    """

    def __init__(self, files: Sequence[tuple[Path, int, int]], ends: Sequence[int]) -> None:
        self._files, self._ends = files, ends
        self._ended: set[int] = set()
        self._next = 0
        self._reached: SimpleQueue[int | None] = SimpleQueue()

    def __enter__(self) -> Followed:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hash")
        self._found = self._pool.submit(self._follow)
        return self

    def __exit__(self, *_: object) -> None:
        self._reached.put(None)
        self._pool.shutdown()

    def done(self, number: int) -> None:
        """Say that a task has ended, in any order."""
        self._ended.add(number)
        was = self._next
        while self._next in self._ended:
            self._ended.remove(self._next)
            self._next += 1
        if self._next > was:
            self._reached.put(self._ends[self._next - 1])

    def hashes(self) -> dict[Path, str]:
        """Return the sha256 of every file, all tasks being done."""
        self._reached.put(sum(size for _, _, size in self._files))
        return self._found.result()

    def _follow(self) -> dict[Path, str]:
        found: dict[Path, str] = {}
        buffer = memoryview(bytearray(_PIECE))
        before, upto = 0, 0
        for file, out, size in self._files:
            digest, at = hashlib.sha256(), 0
            while at < size:
                some = min(len(buffer), upto - before - at, size - at)
                if some <= 0:
                    told = self._reached.get()
                    if told is None:
                        return {}  # the merge has failed
                    upto = told
                    continue
                count = os.preadv(out, [buffer[:some]], at)
                if not count:
                    raise TunesmithError(f"{file}: became shorter while it was written")
                digest.update(buffer[:count])
                at += count
            found[file] = digest.hexdigest()
            before += size
        return found
