"""Merge a pulled run where there is no training environment: `python -m tunesmith.job.here RUN`.

Needs Python and NumPy, a few blocks of memory, and RUN/around (job/kit.py). Sums are NumPy's: of
a model of 1.5 billion numbers some ten thousand are rounded to the other neighbour in bfloat16
than PyTorch's are. MANIFEST.json says so (`arithmetic`: numpy).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tunesmith.errors import TunesmithError
from tunesmith.job import merge
from tunesmith.job.resources import peak_memory
from tunesmith.job.rundir import RunFolder, acquire


def main(argv: list[str]) -> int:
    """Merge; print the summary as JSON, on errors one line for people."""
    # Blocks are multiplied by two workers already; more threads only take memory.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    run = RunFolder(Path(argv[0]))
    try:
        # Held to the exit: a client that was ended leaves this process at work.
        acquire(run)
        summary = merge.run(run.path, run.request(), _tell)
    except TunesmithError as error:
        print(error.render(), file=sys.stderr)
        return error.exit_code
    print(json.dumps(summary | {"peak_memory": peak_memory()}))
    return 0


def _tell(event: str, **values: Any) -> None:
    if event == "changed":
        what = f"{values['what']}: {values['from']} -> {values['to']} ({values['why']})"
        print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
