"""The image on this machine's Docker engine as a target.

Run folders, base models and the hub's cache are this machine's, mounted where they lie, so
a run is the same folder under the same path whether the environment here or the image works
on it; what one began the other may continue.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from docker.errors import DockerException, NotFound
from docker.models.containers import Container
from docker.types import DeviceRequest, Mount

from tunesmith.core import documents, formats, isolated
from tunesmith.core.callbacks import OnText
from tunesmith.core.errors import TunesmithError, UsageError, printed_error
from tunesmith.image import engine
from tunesmith.image.engine import SHM_SIZE
from tunesmith.job.run.config import SEVERAL, names_in
from tunesmith.job.run.schema import Cause, FetchSpec
from tunesmith.plan.models import KEYS
from tunesmith.plan.plan import PATH_KEYS, Plan, RunLocation
from tunesmith.project import Project
from tunesmith.stack.sources import app_digest
from tunesmith.targets.folder import FolderTarget

# Where docker/Dockerfile puts things.
BASE = PurePosixPath("/opt/tunesmith")
RUN_LABEL, HOME_LABEL = "tunesmith.run", "tunesmith.home"
# Config keys whose folder a run writes into; the others are mounted read-only.
_WRITTEN = ("output_dir", "tokenized_path", "cache_dir")
# How this machine reaches the network; a container fetches base models, too. Tokens are not
# among them: `docker inspect` would show them. The hub's own file in HF_HOME is mounted.
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
_NETWORK = ("HF_ENDPOINT", *_PROXIES, *map(str.lower, _PROXIES))
# Files of certificate authorities, as OpenSSL and requests know them.
_AUTHORITIES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
_START_SECONDS = 120.0


class ContainerTarget(FolderTarget):
    """Runs jobs in containers of the image, one a run, as the calling user.

    TUNESMITH_IMAGE names another image than the one `inv image.build` makes. Raises
    UsageError when no engine answers or the image is not there.
    """

    name = "container"

    def __init__(self, project: Project, tell: OnText, flavour: str | None = None) -> None:
        super().__init__(project, flavour)
        self._tell = tell
        self._client = engine.connect()
        self._image = os.environ.get("TUNESMITH_IMAGE") or engine.tag_of(self._environment.flavour)
        self._labels = engine.find_image(self._client, self._image).labels

    def location(self, run_id: str) -> RunLocation:
        """Return where a run of this id lives; the interpreter is the image's."""
        name = self._project.stack.environment_name
        return replace(super().location(run_id), python=BASE / "envs" / name / "bin" / "python")

    def fetch_spec(self, name: str, revision: str | None, mirror: str | None) -> FetchSpec | None:
        """Return how the run fetches its base model, into this machine's store.

        Where there is a training environment here, None: then it is fetched here, and may
        come from a wheel too, which uv has to prove (the image has none).
        """
        if self._environment.current():
            return None
        return FetchSpec(
            name=str(Path(name).absolute()) if Path(name).is_dir() else name,
            revision=revision,
            mirror=mirror or "default",
            store=str(self._project.models),
            configs=str(BASE / "app" / "configs"),
        )

    def create(self, plan: Plan) -> None:
        """Make the plan's run folder.

        Raises UsageError when the image was made from other sources than this clone's: the
        two would not understand each other's runs.
        """
        if self._labels.get(engine.APP) != app_digest(self._project.root):
            raise UsageError(
                f"{self._image} has a different tunesmith version than this clone",
                hint="`inv image.build` rebuilds it, in seconds",
            )
        super().create(plan)

    def start(self, run_id: str, phases: Sequence[str], cause: Cause) -> None:
        """Start phases of a run in a container of its own; return when it is under way."""
        folder = self._folder(run_id)
        self._sweep()
        if folder.busy():
            raise UsageError(
                f"run {run_id} is being worked on",
                hint=f"`inv attach --on {self.name} --run {run_id}` follows it",
            )
        gpus = engine.has_nvidia(self._client)
        if not gpus:
            self._tell(
                "the Docker engine has no NVIDIA runtime: training on the CPU; with a GPU, "
                "install the NVIDIA container toolkit"
            )
        began = folder.log_file.stat().st_size if folder.log_file.exists() else 0
        with engine.explained(f"run {run_id}"):
            container = self._client.containers.create(
                self._image,
                ["job", "run", str(folder.path), *phases, "--cause", cause],
                name=f"tunesmith-{run_id}",
                labels={RUN_LABEL: run_id, HOME_LABEL: str(self._project.home)},
                user=f"{os.getuid()}:{os.getgid()}",
                working_dir=isolated.NOWHERE,
                environment=dict(self.location(run_id).env) | network(),
                mounts=self._mounts(run_id),
                shm_size=SHM_SIZE,
                device_requests=[DeviceRequest(count=-1, capabilities=[["gpu"]])] if gpus else None,
                **engine.HARDENED,
            )
            try:
                container.start()
            except DockerException:
                container.remove(force=True)
                raise
        self._wait(container, run_id, began)

    def stop(self, run_id: str) -> None:
        """Ask a run for a checkpoint and an end. Raises UsageError if none runs here."""
        container = self._container(run_id)
        if container is None:
            state = self.status(run_id).state
            raise UsageError(f"run {run_id} is not running in a container (state: {state})")
        # To its init, which passes it on; the supervisor has its own patience, `docker stop`
        # would end it after some seconds.
        with engine.explained(f"run {run_id}"):
            container.kill("SIGTERM")

    def interact(self, module: str, arguments: Sequence[str]) -> int:
        """Run a module of the job half in the user's terminal; return its exit code."""
        program = shutil.which("docker")
        if program is None:
            raise UsageError(
                "no docker command on PATH, which an interactive verb needs",
                hint="install Docker's command-line client",
            )
        argv = [program, "run", "--rm", "--interactive"]
        argv += ["--tty"] if sys.stdin.isatty() and sys.stdout.isatty() else []
        argv += ["--user", f"{os.getuid()}:{os.getgid()}", "--shm-size", SHM_SIZE]
        argv += ["--read-only", "--tmpfs", "/tmp:mode=1777", "--cap-drop", "ALL"]  # noqa: S108
        argv += ["--security-opt", "no-new-privileges"]
        argv += ["--gpus", "all"] if engine.has_nvidia(self._client) else []
        for key, value in self.variables().items():
            argv += ["--env", f"{key}={value}"]
        for folder, writable in self._folders().items():
            argv += ["--volume", f"{folder}:{folder}" + ("" if writable else ":ro")]
        python, *rest = isolated.argv("python", module, *arguments)
        argv += ["--entrypoint", python, self._image, *rest]
        environment = os.environ | {"DOCKER_HOST": engine.address()}
        return subprocess.run(argv, env=environment, check=False).returncode

    def _folders(self) -> dict[Path, bool]:
        """Return this machine's folders that every container sees: folder -> may write."""
        own = {self._project.home: True, self._project.hf_home: True}
        self._project.folder()
        self._project.hf_home.mkdir(parents=True, exist_ok=True)
        return own

    def _mounts(self, run_id: str) -> list[Mount]:
        wanted = self._folders()
        request, config = self.request(run_id), self.config(run_id)
        fetched = {"model_name_or_path": request.fetch.name if request.fetch else None}
        for values in (config, request.predict or {}, fetched):
            for folder, writable in input_folders(values).items():
                wanted[folder] = wanted.get(folder, False) or writable
        for found in request.data:
            file = Path(found.file)
            # Of a pulled run there is only a name.
            if found.rows is not None and file.is_absolute():
                wanted.setdefault(file.parent, False)
        mounts = [
            Mount(str(folder), str(folder), type="bind", read_only=not writable)
            for folder, writable in without_nested(wanted).items()
        ]
        files = sorted({value for key, value in network().items() if key in _AUTHORITIES})
        return mounts + [Mount(file, file, type="bind", read_only=True) for file in files]

    def _wait(self, container: Container, run_id: str, began: int) -> None:
        """Return when the run has its lock, or ended well. Raises what it refused with."""
        folder = self._folder(run_id)
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            container.reload()
            if container.status == "exited":
                code = container.attrs["State"]["ExitCode"]
                text = container.logs().decode("utf-8", "replace")
                container.remove()
                if code == 0:
                    return
                ended = f"run {run_id}: the container ended with exit code {code}"
                raise printed_error(text, code, ended)
            if folder.busy() and folder.status_file.exists():
                status = folder.last_status()
                owner = status.supervisor if status else None
                if owner and owner.hostname == str(container.id)[:12]:
                    return
            time.sleep(0.1)
        raise TunesmithError(
            f"run {run_id}: no supervisor after {formats.duration(_START_SECONDS)}",
            hint=f"`docker logs {container.name}` may say why",
        )

    def _container(self, run_id: str) -> Container | None:
        labels = [f"{RUN_LABEL}={run_id}", f"{HOME_LABEL}={self._project.home}"]
        with engine.explained(f"run {run_id}"):
            found = self._client.containers.list(filters={"label": labels})
        return found[0] if found else None

    def _sweep(self) -> None:
        """Remove containers of runs that have ended; what is worth keeping is in the folder."""
        filters: dict[str, Any] = {
            "label": f"{HOME_LABEL}={self._project.home}",
            "status": "exited",
        }
        for container in self._client.containers.list(all=True, filters=filters):
            try:
                container.remove()
            except NotFound:
                continue  # another client was faster


def network() -> dict[str, str]:
    """Return this machine's variables that a container needs to reach what we reach."""
    found = {key: os.environ[key] for key in _NETWORK if os.environ.get(key)}
    files = {key: os.environ[key] for key in _AUTHORITIES if os.environ.get(key)}
    return found | {key: file for key, file in files.items() if Path(file).is_file()}


def input_folders(values: documents.Config) -> dict[Path, bool]:
    """Return the folders that a config's paths need: folder -> is it written to.

    Only what is there is mounted; a path that will be made is represented by its parent.
    """
    found: dict[Path, bool] = {}
    for key in (*PATH_KEYS, *_WRITTEN, *KEYS):
        value = values.get(key)
        for name in names_in(value) if key in SEVERAL else [value]:
            if not isinstance(name, str) or not Path(name).is_absolute():
                continue
            path, writable = Path(name), key in _WRITTEN
            existing = next(p for p in (path, *path.parents) if p.exists())
            folder = existing if existing.is_dir() else existing.parent
            found[folder] = found.get(folder, False) or writable
    return found


def without_nested(folders: Mapping[Path, bool]) -> dict[Path, bool]:
    """Leave out a folder that lies in another one with the same right, or a larger one."""
    return {
        folder: writable
        for folder, writable in sorted(folders.items())
        if not any(
            other in folder.parents and (theirs or not writable)
            for other, theirs in folders.items()
        )
    }
