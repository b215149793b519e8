"""This machine as a target: the training environment under .tunesmith/."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

from tunesmith.core import isolated
from tunesmith.core.errors import printed_error
from tunesmith.hosts.remote import Remote
from tunesmith.job.run.schema import Cause
from tunesmith.job.supervisor import launch
from tunesmith.services.service import ServiceAccess
from tunesmith.targets.folder import FolderTarget
from tunesmith.targets.services import LocalServices, lacks_environment


class LocalTarget(FolderTarget):
    """Runs jobs on this machine, detached."""

    name = "local"

    def start(self, run_id: str, phases: Sequence[str], cause: Cause) -> None:
        """Start phases of a run, detached; return when it is under way."""
        done = self._job("start", run_id, *phases, "--cause", cause)
        if done.returncode != 0:
            raise printed_error(done.stderr, done.returncode, f"run {run_id}: it did not start")

    def stop(self, run_id: str) -> None:
        """Ask a run for a checkpoint and an end."""
        launch.stop(self._folder(run_id).path)

    def interact(self, module: str, arguments: Sequence[str]) -> int:
        """Run a module of the job half in the user's terminal; return its exit code."""
        argv = isolated.argv(self._environment.python, module, *arguments)
        return subprocess.run(
            argv, cwd=isolated.NOWHERE, env=self._variables(), check=False
        ).returncode

    def ports(self) -> Remote | None:
        """Return None: its ports are this machine's."""
        return None

    def services(self, *, ending: bool = False) -> ServiceAccess:
        """Return the way to the web services here. Raises UsageError without an environment."""
        return LocalServices(self._project, self._environment)

    def _variables(self) -> dict[str, str]:
        return isolated.variables(os.environ) | dict(self.variables())

    def _job(self, verb: str, run_id: str, *more: str) -> subprocess.CompletedProcess[str]:
        if not self._environment.current():
            raise lacks_environment(self._environment)
        words = (verb, str(self._folder(run_id).path), *more)
        return subprocess.run(
            isolated.argv(self._environment.python, "tunesmith.job", *words),
            cwd=isolated.NOWHERE,
            env=self._variables(),
            capture_output=True,
            text=True,
            check=False,
        )
