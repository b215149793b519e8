"""`python -m tunesmith.job run|start RUN [PHASE ...]`: work on a run folder.

run    work here, in the foreground, until the phases are done (the image's way)
start  start the same in a session of its own and return when it has the run's lock
stop   ask the supervisor of RUN for a checkpoint and an end

--cause says why it is started: the run's events, status and log name it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tunesmith.core.errors import TunesmithError
from tunesmith.job.run import streams
from tunesmith.job.run.schema import CAUSES
from tunesmith.job.supervisor.launch import start, stop
from tunesmith.job.supervisor.supervisor import supervise
from tunesmith.job.system import disk


def main() -> int:
    """Parse the command line, do it, and return the exit code (2: misuse)."""
    parser = argparse.ArgumentParser(prog="python -m tunesmith.job", description=__doc__)
    parser.add_argument("verb", choices=("run", "start", "stop"))
    parser.add_argument("run", type=Path)
    parser.add_argument("phases", nargs="*")
    parser.add_argument("--cause", choices=CAUSES, default="user")
    arguments = parser.parse_args()
    streams.outlive_disk()
    try:
        if arguments.verb == "run":
            return supervise(arguments.run, arguments.phases or None, arguments.cause)
        if arguments.verb == "start":
            start(arguments.run, arguments.phases, arguments.cause)
        else:
            stop(arguments.run)
    except TunesmithError as error:
        print(error.render(), file=sys.stderr, flush=True)
        return error.exit_code
    except OSError as error:
        if not disk.refused(error):
            raise
        print(disk.explain(error, arguments.run).render(), file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
