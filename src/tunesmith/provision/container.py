"""Hosts whose training environment is a container of the image (`inv host.add --runner container`).

One container stands there and does nothing. Where another host has the interpreter of its conda
environment, this one has a script that runs Python inside the container, with tunesmith's
folder mounted under the same path. So runs, their supervisor, and the web services are the
same as on any host: the container is an environment, not a job.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import docker
from docker.errors import NotFound
from docker.models.containers import Container
from docker.types import DeviceRequest, Mount

from tunesmith.core import isolated
from tunesmith.core.callbacks import OnText
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import short_digest
from tunesmith.core.mirrors import mirror_file
from tunesmith.core.names import ENVIRONMENT_MARKER
from tunesmith.hosts import agent, replies
from tunesmith.hosts.answers import DIGEST, HOST_PATH, WORD, AnswerSource, parse_json
from tunesmith.hosts.probe.answer import Answer, Section
from tunesmith.hosts.probe.ask import ask
from tunesmith.hosts.probe.host import Places, User
from tunesmith.hosts.probe.installed import Environments
from tunesmith.hosts.probe.software import Engine
from tunesmith.hosts.remote import Remote
from tunesmith.image import engine, remote_engine, ship
from tunesmith.image.engine import SHM_SIZE
from tunesmith.job.run.replies import RunList
from tunesmith.project import Project
from tunesmith.stack.sources import app_digest

# What the container was made for, so that one that fits is kept.
_LABEL = "tunesmith.environment"
_ENVIRONMENT = "container"
# $1 base, $2 HF_HOME; the files' texts, one JSON string each, come on stdin with their modes.
_FOLDERS = """
umask 077
cd "$1" 2>/dev/null || mkdir -p "$1" && cd "$1" || exit 1
mkdir -p "envs/container/bin" data models uploads runs services "$2" && chmod 0700 .
"""


@dataclass(frozen=True)
class _There:
    """What a host says: tunesmith's folder, the hub's cache, and whose jobs the container runs."""

    host: str
    base: PurePosixPath
    hf_home: PurePosixPath
    user: str

    @property
    def name(self) -> str:
        """The container's name: one a user and folder."""
        return f"tunesmith-{short_digest([str(self.base), self.user])[:8]}"


def provision(
    project: Project, name: str, tell: OnText, *, mirror: str, flavour: str | None
) -> None:
    """Make the container and what belongs to it on the host; nothing where it is there.

    Raises UsageError when the host has no engine or not this clone's image, or when it is at
    work and would have to be stopped.
    """
    profile = project.mirror(mirror)
    if profile.ca_bundle:
        raise UsageError(
            f"--mirror {mirror}: `ca_bundle` is not copied into containers",
            hint="build the image with this mirror and provision with a named one",
        )
    remote = Remote(name, project.inventory)
    there, answer = _look(remote, Engine)
    ship.answered(answer)
    chosen = project.stack.flavour(flavour)
    with remote_engine.client(remote) as client:
        with engine.explained(f"{name}: its Docker engine", foreign=True):
            image = _image(client, project, name, engine.tag_of(chosen))
            found = _find(client, there.name)
            found_is = (found.status, found.labels) if found else None
            gpus = engine.has_nvidia(client)
        variables = dict(project.stack.variables) | {
            "HF_HOME": str(there.hf_home),
            "HF_ENDPOINT": profile.hf_endpoints[0],
        }
        wanted = short_digest([str(image.id), variables, profile.http_proxy])
        if profile.http_proxy:
            variables |= {"http_proxy": profile.http_proxy, "https_proxy": profile.http_proxy}
        if found_is and found_is[0] == "running" and found_is[1].get(_LABEL) == wanted:
            tell(f"{name}: in state (container {there.name})")
            return
        if found:
            _refuse_busy(remote, found)
        if not gpus:
            tell(f"{name}: the Docker engine has no NVIDIA runtime, so the CPU will do the work")
        _write(remote, there, _files(there, image.labels, variables, project, mirror))
        with engine.explained(f"{name}: container {there.name}"):
            if found:
                found.remove(force=True)
            made = client.containers.create(
                image.id,
                ["sleep", "infinity"],
                entrypoint=["tini", "--"],
                name=there.name,
                labels={_LABEL: wanted},
                user=there.user,
                working_dir=str(there.base),
                environment=variables,
                mounts=[
                    Mount(str(path), str(path), type="bind") for path in (there.base, there.hf_home)
                ],
                # Services listen on the host's loopback, where the tunnel ends.
                network_mode="host",
                shm_size=SHM_SIZE,
                restart_policy={"Name": "always"},
                device_requests=[DeviceRequest(count=-1, capabilities=[["gpu"]])] if gpus else None,
                **engine.HARDENED,
            )
            made.start()
    tell(f"{name}: container {there.name} of {engine.tag_of(chosen)}, folder {there.base}")


def reset(project: Project, name: str, tell: OnText) -> None:
    """Remove the container and what belongs to it; data, models, runs and HF_HOME stay."""
    remote = Remote(name, project.inventory)
    there, _ = _look(remote)
    with remote_engine.client(remote) as client:
        with engine.explained(f"{name}: its Docker engine", foreign=True):
            found = _find(client, there.name)
        if found:
            _refuse_busy(remote, found)
            with engine.explained(f"{name}: container {there.name}"):
                found.remove(force=True)
    remote.run(
        'cd "$1" && rm -rf envs/container services env.sh mirror.yml state.json',
        arguments=[str(there.base)],
    )
    tell(f"{name}: the container is gone; kept in {there.base}: data, base models, runs")


def _look(remote: Remote, *more: type[Section]) -> tuple[_There, Answer]:
    answer = ask(remote, User, Places, Environments, *more, timeout=120)
    user, places = answer.of(User), answer.of(Places)
    if user.uid is None or user.gid is None or not places.base or not places.hf_cache:
        raise TunesmithError(f"{remote.name}: it does not say where tunesmith's folder is")
    foreign = [
        environment.path
        for environment in answer.of(Environments).whole
        if PurePosixPath(environment.path).name != _ENVIRONMENT
    ]
    if foreign:
        raise UsageError(
            f"{remote.name} has a conda environment ({foreign[0]})",
            hint=f"remove it with `inv host.reset --on {remote.name}`, or keep using it with "
            f"`inv host.add {remote.name} ... --runner conda`",
        )
    base, hf_home = PurePosixPath(places.base), PurePosixPath(places.hf_cache)
    return _There(remote.name, base, hf_home, f"{user.uid}:{user.gid}"), answer


def _image(client: docker.DockerClient, project: Project, name: str, tag: str) -> Any:
    try:
        image = engine.find_image(client, tag)
    except UsageError:
        raise UsageError(
            f"{name} has no image {tag}", hint=f"send it with `inv image.ship --on {name}`"
        ) from None
    if image.labels.get(engine.APP) != app_digest(project.root):
        raise UsageError(
            f"{name}: {tag} there runs a different tunesmith version",
            hint=f"update it with `inv image.build`, then `inv image.ship --on {name}`",
        )
    return image


def _find(client: docker.DockerClient, name: str) -> Container | None:
    try:
        return client.containers.get(name)
    except NotFound:
        return None


def _refuse_busy(remote: Remote, found: Container) -> None:
    """A container that is made anew takes its runs with it, and what the Board trains."""
    if found.status != "running":
        return
    if folder := _trained_in_board(remote, found):
        raise UsageError(
            f"{remote.name}: LLaMA Board is training {folder} in the container that must be "
            "replaced",
            hint=f"stop both with `inv webui --on {remote.name} --stop`, then run this again",
        )
    for run in agent.call(remote, "runs", reply=RunList).runs:
        if run.active:
            raise UsageError(
                f"{remote.name}: run {run.run_id} is using the container that must be replaced",
                hint=f"`inv stop --on {remote.name} --run {run.run_id}`, then run this again",
            )


def _trained_in_board(remote: Remote, found: Container) -> str | None:
    """Return the folder of a training that was started in the Board, or None."""
    asked = AnswerSource(remote.name, f"container {found.name}")
    config = found.attrs.get("Config")
    folder = config.get("WorkingDir") if isinstance(config, dict) else None
    base = HOST_PATH.read(asked.at("WorkingDir"), folder)
    argv = isolated.argv(
        "python", "tunesmith.job.services.manager", "--base", base, "wait", "webui"
    )
    with engine.explained(f"{remote.name}: container {found.name}"):
        code, output = found.exec_run(argv)
    assert isinstance(output, bytes)  # as it was not asked for as a stream
    lines = output[-(1 << 20) :].decode("utf-8", "replace").splitlines()
    if code != 0 or not lines:
        raise TunesmithError(
            f"{remote.name}: container {found.name} does not say whether LLaMA Board trains in "
            f"it (exit code {code})",
            lines[-3:],
            hint=f"remove it with `ssh {remote.name} docker rm -f {found.name}`",
        )
    training = replies.Service("wait").read(asked, parse_json(asked, lines[-1])).get("training")
    return str(training["folder"]) if training else None


def _files(
    there: _There,
    labels: Mapping[str, str],
    variables: Mapping[str, str],
    project: Project,
    mirror: str,
) -> dict[str, tuple[str, str]]:
    """Return what lies in the folder: name -> (mode, text). The last one says it is whole."""
    asked_of_image = AnswerSource(there.host, "its image's labels")
    flavour = WORD.read(asked_of_image, labels.get(engine.FLAVOUR))
    lock = DIGEST.read(asked_of_image, labels.get(engine.LOCK))
    name = project.stack.environment_name
    python = f"/opt/tunesmith/envs/{name}/bin/python"
    exports = "".join(f"export {k}={shlex.quote(v)}\n" for k, v in sorted(variables.items()))
    marker = {"flavour": flavour, "lock_sha256": lock}
    asked = {
        "app": short_digest(app_digest(project.root)),
        "flavour": flavour,
        "mirror": mirror,
        "runner": "container",
    }
    fingerprint = ",".join(f"{key}={value}" for key, value in asked.items())
    script = (
        "#!/bin/sh\n# Python of the container that `inv provision` made.\n"
        "[ -t 0 ] && [ -t 1 ] && tty=-t || tty=\n"
        f'exec docker exec -i $tty --workdir "$PWD" {there.name} {python} "$@"\n'
    )
    return {
        "mirror.yml": ("0600", mirror_file(mirror, project.root / "configs/mirrors").read_text()),
        "env.sh": ("0644", exports),
        f"envs/{_ENVIRONMENT}/bin/python": ("0755", script),
        f"envs/{_ENVIRONMENT}/{ENVIRONMENT_MARKER}": ("0644", json.dumps(marker) + "\n"),
        "state.json": ("0644", json.dumps({"fingerprint": fingerprint}) + "\n"),
    }


def _write(remote: Remote, there: _There, files: Mapping[str, tuple[str, str]]) -> None:
    script = _FOLDERS
    for name, (mode, text) in files.items():
        script += (
            f"printf %s {shlex.quote(text)} >{name}.part && chmod {mode} {name}.part && "
            f"mv {name}.part {name} || exit 1\n"
        )
    done = remote.run(script, arguments=[str(there.base), str(there.hf_home)])
    if done.returncode != 0:
        raise TunesmithError(
            f"{remote.name}: {there.base} cannot be written", done.stderr.splitlines()[-3:]
        )
