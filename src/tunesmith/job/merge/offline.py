"""Merge a pulled run without a training environment.

`python -m tunesmith.job.merge.offline RUN` needs Python and NumPy, a few blocks of memory, and
RUN/bundle (job/merge/bundle.py). NumPy's sums may differ from PyTorch's in the last bit; how often
depends on the CPU. In bfloat16 some ten thousand of 1.5 billion elements are rounded to the other
neighbour, in float32 a few in a hundred differ in their last bits. MANIFEST.json records it
(`arithmetic`: numpy).
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunesmith.core.errors import TunesmithError
from tunesmith.core.files import write_json
from tunesmith.job.merge import phase as merge_phase
from tunesmith.job.run import integrity
from tunesmith.job.run.codec import encode
from tunesmith.job.run.events import mend_events
from tunesmith.job.run.folder import RunFolder, acquire
from tunesmith.job.system import disk
from tunesmith.job.system.resources import peak_memory

_PHASE = "merge"


def main(argv: list[str]) -> int:
    """Merge; print the summary as JSON, or an error of one line."""
    # Two workers already multiply blocks; more threads would only need memory.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    run = RunFolder(Path(argv[0]))
    try:
        # Held until exit: this process continues if its client is killed.
        acquire(run)
        summary = _merge(run)
    except TunesmithError as error:
        print(error.render(), file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if not disk.refused(error):
            raise
        print(disk.explain(error, run.path).render(), file=sys.stderr)
        return 1
    print(json.dumps(summary))
    return 0


def _merge(run: RunFolder) -> dict[str, Any]:
    """Merge, and write the events and the status that a supervisor would write."""
    request = run.request()
    integrity.check_here(run.path, _PHASE)
    mend_events(run.events_file)
    began, state = time.monotonic(), "failed"
    run.emit("run_started", phases=[_PHASE], cause="user")
    run.emit("phase_started", phase=_PHASE, attempt=1)
    try:
        summary = merge_phase.run(run.path, request, _report) | {"peak_memory": peak_memory()}
        state = "succeeded"
        run.emit("summary", phase=_PHASE, **summary)
    finally:
        seconds = round(time.monotonic() - began, 2)
        run.emit("phase_ended", phase=_PHASE, state=state, seconds=seconds)
        run.emit("run_ended", state=state, failure=None)
    record_merge(run)
    return summary


def record_merge(run: RunFolder) -> None:
    """Set the status to merged; an existing proof belongs to another merged model."""
    status = run.status()
    phases = {p: s for p, s in status.phases.items() if p != "proof"} | {_PHASE: "succeeded"}
    status = replace(status, state="succeeded", phase=_PHASE, phases=phases)
    status = replace(status, failure=None, message="", detail=())
    write_json(run.status_file, encode(status))


def _report(event: str, **values: Any) -> None:
    if event == "changed":
        what = f"{values['what']}: {values['from']} -> {values['to']} ({values['why']})"
        print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
