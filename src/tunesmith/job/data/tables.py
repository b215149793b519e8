"""`python -m tunesmith.job.data.tables FILE ...`: CSV, Parquet, Arrow and text files as JSON Lines.

The files, all of one type, are loaded as LLaMA-Factory 0.9.3 loads them (data/loader.py):
by datasets' own builder, which infers one type a column. So what comes out, and what is
refused, is what the training would see. Lines are {"columns": {name: type}}, then a
{"row": {...}} each, or {"error": {"message", "fix", "line"}}.

A value that JSON cannot hold is an object of one key that names its type: no string either
way, which is all the rules ask.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# LLaMA-Factory's FILEEXT2TYPE (extras/constants.py).
_TYPES = {".csv": "csv", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}
_AT_ONCE = 1000


def main(files: list[str]) -> int:
    """Print the rows of the files; what their reader refuses is printed too, not raised."""
    for line in lines(files):
        print(line)
    return 0


def lines(files: list[str]) -> Iterator[str]:
    """Yield the lines; see the module."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import datasets

    datasets.disable_progress_bars()
    kind = _TYPES[Path(files[0]).suffix]
    # Beside nothing of the user's: the cache that the loading leaves is deleted.
    with tempfile.TemporaryDirectory(prefix="tunesmith-rows-") as cache:
        try:
            table = datasets.load_dataset(kind, data_files=files, split="train", cache_dir=cache)
        except Exception as error:  # noqa: BLE001 (whatever it is, the training ends with it)
            yield json.dumps({"error": asdict(explain(error, kind))}, ensure_ascii=False)
            return
        columns = {name: str(kind) for name, kind in table.features.items()}
        yield json.dumps({"columns": columns}, ensure_ascii=False)
        for start in range(0, len(table), _AT_ONCE):
            batch = table[start : start + _AT_ONCE]
            names = list(batch)
            for values in zip(*batch.values(), strict=True):
                row = dict(zip(names, values, strict=True))
                yield json.dumps({"row": row}, ensure_ascii=False, default=_named)


def _named(value: Any) -> dict[str, str]:
    return {type(value).__name__: str(value)[:80]}


@dataclass(frozen=True)
class TableError:
    """Why a file cannot be read as a table; `line` counts from 1, None where it is not known."""

    message: str
    fix: str
    line: int | None = None


def explain(error: BaseException, kind: str) -> TableError:
    """Return what an exception of the loading says to whoever made the file."""
    causes = [error]
    while (below := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(below)
    texts = [f"{type(cause).__name__}: {cause}" for cause in causes]
    every = "\n".join(texts)
    if width := re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", every):
        message = f"{width[3]} fields where the head has {width[1]}"
        fix = 'put a field with a comma in quotes "..."'
        return TableError(message, fix, int(width[2]))
    if opened := re.search(r"EOF inside string starting at row (\d+)", every):
        fix = 'close the quote; write "" for a quote inside a field'
        line = int(opened[1]) + 1
        return TableError("a quote is not closed", fix, line)
    if "EmptyDataError" in every:
        fix = "write a head with the columns and one row a line"
        return TableError("the file is empty", fix, 1)
    if "corresponds to no data" in every:
        return TableError("there are no rows", "write at least one row")
    if (
        "Parquet file size" in every
        or "Parquet magic bytes" in every
        or "not a parquet file" in every.lower()
    ):
        return TableError("no Parquet file", "is it cut off? copy it again")
    first = next((text for text in reversed(texts) if ": " in text), texts[-1])
    reason = " ".join(first.split())[:300]
    return TableError(
        f"LLaMA-Factory's reader of {kind} stops: {reason}",
        "one column has one type in all rows and files; mend or convert the file",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
