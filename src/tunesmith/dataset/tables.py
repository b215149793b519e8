"""Rows of CSV, Parquet, Arrow and text files, read by the training environment."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from tunesmith.core import isolated
from tunesmith.core.documents import JsonObject
from tunesmith.core.errors import TunesmithError
from tunesmith.dataset.reading import Tables


def tables_of(python: Path, environment: Mapping[str, str]) -> Tables:
    """Return the reader that the training environment's interpreter is.

    Starting it takes seconds and a check reads a file more than once, so what it said of the
    last files is kept in a temporary file and said again while they are unchanged. The reader
    raises TunesmithError when the interpreter fails for a reason of its own; faults of files
    come as records.
    """
    kept: dict[tuple[tuple[str, int, int], ...], IO[bytes]] = {}

    def read(files: Sequence[Path]) -> Iterator[JsonObject]:
        stats = [(file, file.stat()) for file in files]
        key = tuple((str(file), stat.st_mtime_ns, stat.st_size) for file, stat in stats)
        if key not in kept:
            for spool in kept.values():
                spool.close()
            kept.clear()
            spool = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the reader
            _spool(python, environment, files, spool)
            kept[key] = spool
        kept[key].seek(0)
        for line in kept[key]:
            yield json.loads(line)

    return read


def _spool(
    python: Path, environment: Mapping[str, str], files: Sequence[Path], spool: IO[bytes]
) -> None:
    paths = [str(file.absolute()) for file in files]
    done = subprocess.run(
        isolated.argv(python, "tunesmith.job.data.tables", *paths),
        stdout=spool,
        stderr=subprocess.PIPE,
        cwd=isolated.NOWHERE,
        env={**os.environ, **environment},
        check=False,
    )
    if done.returncode != 0:
        told = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise TunesmithError(
            f"{files[0]}: the training environment could not read it (exit code {done.returncode})",
            told[-5:],
            hint="reinstall the environment with `inv stack.install`",
        )
