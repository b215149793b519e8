"""The sha256 of files while they are written, instead of reading them again at the end."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from tunesmith.core.errors import TunesmithError

_PIECE = 1 << 18  # bytes per read: still in the CPU's cache when they are hashed


class StreamingHash:
    """Hashes files in order while tasks write them, never ahead of the written bytes.

    `files` are (path, open descriptor, final size in bytes). `ends[i]` is the number of bytes,
    over all files in order, that are written once tasks 0 to i have ended.
    """

    def __init__(self, files: Sequence[tuple[Path, int, int]], ends: Sequence[int]) -> None:
        self._files, self._ends = files, ends
        self._ended: set[int] = set()  # tasks that ended before one with a lower number
        self._next = 0  # the lowest number of a task that has not ended
        # Bytes that may be read, counted over all files; None: the merge has failed.
        self._written: SimpleQueue[int | None] = SimpleQueue()

    def __enter__(self) -> StreamingHash:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hash")
        self._hashes = self._pool.submit(self._follow)
        return self

    def __exit__(self, *_: object) -> None:
        self._written.put(None)
        self._pool.shutdown()

    def task_done(self, number: int) -> None:
        """Record that a task has ended; tasks may end in any order."""
        self._ended.add(number)
        before = self._next
        while self._next in self._ended:
            self._ended.remove(self._next)
            self._next += 1
        if self._next > before:
            self._written.put(self._ends[self._next - 1])

    def hashes(self) -> dict[Path, str]:
        """Return the sha256 of every file, after the last task has ended."""
        self._written.put(sum(size for _, _, size in self._files))
        return self._hashes.result()

    def _follow(self) -> dict[Path, str]:
        hashes: dict[Path, str] = {}
        buffer = memoryview(bytearray(_PIECE))
        before, upto = 0, 0
        for file, out, size in self._files:
            digest, at = hashlib.sha256(), 0
            while at < size:
                some = min(len(buffer), upto - before - at, size - at)
                if some <= 0:
                    written = self._written.get()
                    if written is None:
                        return {}
                    upto = written
                    continue
                count = os.preadv(out, [buffer[:some]], at)
                if not count:
                    raise TunesmithError(f"{file}: became shorter while it was written")
                digest.update(buffer[:count])
                at += count
            hashes[file] = digest.hexdigest()
            before += size
        return hashes
