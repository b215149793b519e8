"""The web services of a host and of this machine: `services.service.ServiceAccess` for each."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path, PurePath

from tunesmith.core import files as core_files
from tunesmith.core import formats, isolated
from tunesmith.core.callbacks import OnText
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.hosts import transfer
from tunesmith.hosts.layout import Layout
from tunesmith.hosts.remote import Remote
from tunesmith.project import Project
from tunesmith.services import service
from tunesmith.services.service import Body, Folders, Registry, ServiceState, answer_of
from tunesmith.stack.environment import Environment
from tunesmith.stack.sources import app_digest


class HostServices:
    """A provisioned host, with conda or a container of the image.

    Raises UsageError when it has other sources than we: those may only end things.
    """

    def __init__(
        self, project: Project, remote: Remote, layout: Layout, *, ending: bool = False
    ) -> None:
        self.name = remote.name
        self.remote: Remote | None = remote
        self.mends = f"`inv provision --on {self.name}`"
        self._remote = remote
        self._project = project
        self._layout = layout
        other = layout.app != core_files.short_digest(app_digest(project.root))
        if layout.app and other and not ending:
            raise UsageError(
                f"{self.name} runs a different tunesmith version than this clone",
                hint=f"update it: `inv provision --on {self.name}`",
            )
        self.folders = Folders(layout.base, layout.data, layout.models, layout.runs)

    def ask(
        self, verb: str, *words: str, body: Body | None = None, timeout: float = 60
    ) -> ServiceState:
        """Ask tunesmith.job.services.manager there, by one SSH command."""
        script = '. "$1" && cd "$2" || exit 1\nshift 2\nexec "$@"\n'
        words = ("--base", str(self._layout.base), verb, *words)
        argv = isolated.argv(self._layout.python, "tunesmith.job.services.manager", *words)
        done = self._remote.run(
            script,
            arguments=[str(self._layout.variables), str(self._layout.base), *argv],
            # Inside the connection: keys and tokens must not stand in a process list.
            stdin=None if body is None else json.dumps(body),
            timeout=timeout,
        )
        return answer_of(self, verb, done)

    def stage_data(self, tell: OnText) -> Registry:
        """Upload the files that the local dataset_info.json names; nothing is deleted there."""
        entries, files, missing = service.registered(self._project.root / "data")
        if missing:
            tell(f"data: not here, so not uploaded: {', '.join(missing)}")
        if files:
            size = sum(path.stat().st_size for path in files.values())
            tell(f"data: {len(files)} files ({formats.size(size)}); uploading what changed")
            transfer.upload(self._remote, files, str(self.folders.data), tell)
        return entries

    def stage_packages(self, folder: Path, tell: OnText) -> PurePath:
        """Upload a folder of packages; one of this name that arrived whole is taken as it is."""
        there = self.folders.base / "services" / folder.name
        whole = there / ".whole"
        if self._remote.run('[ -e "$1" ]', arguments=[str(whole)]).returncode != 0:
            files = {
                path.relative_to(folder).as_posix(): path
                for path in folder.rglob("*")
                if path.is_file()
            }
            size = sum(path.stat().st_size for path in files.values())
            tell(f"uploading {folder.name} ({formats.size(size)})")
            transfer.upload(self._remote, files, str(there), tell)
            self._remote.run(': >"$1"', arguments=[str(whole)])
        return there


class LocalServices:
    """This machine. Raises UsageError when it has no training environment."""

    name = "local"
    mends = "`inv stack.install`"

    def __init__(self, project: Project, environment: Environment) -> None:
        self.remote: Remote | None = None
        self._project = project
        self._environment = environment
        if not environment.current():
            raise lacks_environment(environment)
        self.folders = Folders(
            project.folder(), project.root / "data", project.models, project.runs
        )

    def ask(
        self, verb: str, *words: str, body: Body | None = None, timeout: float = 60
    ) -> ServiceState:
        """Ask tunesmith.job.services.manager here."""
        words = ("--base", str(self._project.home), verb, *words)
        argv = isolated.argv(self._environment.python, "tunesmith.job.services.manager", *words)
        variables = {"HF_HOME": str(self._project.hf_home), **self._project.stack.variables}
        try:
            done = subprocess.run(
                argv,
                input="" if body is None else json.dumps(body),
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
                cwd=self._project.root,
                env={**os.environ, **variables},
            )
        except subprocess.TimeoutExpired:
            raise TunesmithError(
                f"local: no answer after {timeout:g} s: this machine is overloaded",
                hint="give the same command again",
            ) from None
        return answer_of(self, verb, done)

    def stage_data(self, tell: OnText) -> Registry:
        """Nothing to bring: the Board looks into the clone's own data folder."""
        return {}

    def stage_packages(self, folder: Path, tell: OnText) -> PurePath:
        """Nothing to bring: the folder is here."""
        return folder


def lacks_environment(environment: Environment) -> UsageError:
    """Return the error for a machine whose training environment is not there, or half made."""
    return UsageError(
        f"{environment.path}: no finished training environment", hint="`inv stack.install` makes it"
    )
