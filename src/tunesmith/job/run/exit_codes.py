"""How a worker says by its exit code that it ended in good order; any other end is a crash."""

from __future__ import annotations

# After a checkpoint, because somebody asked for a stop.
STOPPED = 20
# After a `failure` event with its class.
FAILED = 21
