"""A phase that takes steps without a model: steps_worker.py supervise RUN | ... RUN PHASE.

`supervise` is the product's own supervisor; the worker that it starts is the product's too, with
this module's `run` in the place of the phase: so a run takes seconds, and no torch.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_STEP_SECONDS = 0.05


class Stopped(Exception):
    """As the one of the train phase."""


def run(run_dir: Path, _request: object, emit: Callable[..., None]) -> dict[str, Any]:
    """Take `steps` steps, as run.json says; then write `result` bytes, if any, as a result."""
    request = json.loads((run_dir / "run.json").read_text())

    def stop(_signum: int, _frame: object) -> None:
        raise Stopped

    signal.signal(signal.SIGTERM, stop)
    total = int(request["steps"])
    for step in range(1, total + 1):
        time.sleep(_STEP_SECONDS)
        print(f"step {step} of {total}")
        # Long enough that the rest of a file's last block is soon used up.
        emit("log", phase="fetch", step=step, total_steps=total, loss=1 / step, pad="x" * 800)
        emit.heartbeat(  # type: ignore[attr-defined]
            {
                "pid": os.getpid(),
                "step": step,
                "total_steps": total,
                "step_seconds": _STEP_SECONDS,
                "paused": False,
                "time": time.time(),
            }
        )
    if request.get("result"):
        (run_dir / "result").write_bytes(b"x" * int(request["result"]))
    return {"steps": total}


def main() -> int:
    """Be the supervisor or its worker."""
    from tunesmith.job.run import streams
    from tunesmith.job.supervisor import supervisor, worker

    if sys.argv[1] == "supervise":
        # What the supervisor starts its workers with.
        sys.executable = os.environ["STEPS_WORKER"]
        return supervisor.supervise(Path(sys.argv[2]))
    streams.outlive_disk()
    worker._PHASES["fetch"] = ("steps_worker", {})
    return worker.main(sys.argv[-2:])


if __name__ == "__main__":
    sys.exit(main())
