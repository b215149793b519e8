"""Power a host off after a run, once, and see that it is off."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence

from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.hosts import agent
from tunesmith.hosts.remote import Remote
from tunesmith.job.run.codec import encode
from tunesmith.job.run.replies import CommandOrder, CommandResult

# From a power-off to the end of SSH.
_OFF_SECONDS = 60.0


def power_off(remote: Remote, run_id: str, command: Sequence[str]) -> None:
    """Run `command` on the host after a run that has succeeded, and wait until it is off.

    Raises UsageError when it must stay on (another run needs it, or this was done after this run
    before); TunesmithError when it was told to power off and is still there.
    """
    if not _answers(remote):
        raise TunesmithError(
            f"{remote.name} does not answer and was not told to power off",
            hint=f"when it is back, `inv attach --on {remote.name} --run {run_id}` does it",
        )
    done = CommandResult(0)
    problem = "it still answers"
    order = encode(CommandOrder(tuple(command)))
    try:
        done = agent.call(
            remote, "afterwards", run_id, reply=CommandResult, stdin=order, timeout=90
        )
    except UsageError:
        raise
    except TunesmithError as error:
        # As a rule: the connection went with the host.
        problem = error.line
    if done.code != 0:
        problem = done.why or f"`{shlex.join(command)}` ended with {done.code}"
    deadline = time.monotonic() + (_OFF_SECONDS if done.code == 0 else 0)
    while _answers(remote):
        if time.monotonic() > deadline:
            raise TunesmithError(
                f"{remote.name} is not off, and costs money: {problem}",
                hint="power it off in the console",
            )
        time.sleep(1)


def _answers(remote: Remote) -> bool:
    try:
        remote.run(":", timeout=10)
    except TunesmithError:
        return False
    return True
