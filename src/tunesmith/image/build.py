"""Build the image: a plan (argv, labels, secrets), and the docker command that executes it.

The SDK has only the classic builder, so BuildKit is used through the docker command: buildx, or
the built-in builder of clients before 23.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith import __version__
from tunesmith.core import disk, formats, isolated
from tunesmith.core.callbacks import OnText
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import sha256_of
from tunesmith.core.mirrors import Mirror
from tunesmith.core.printable import one_line
from tunesmith.image import engine
from tunesmith.project import Project
from tunesmith.stack.definition import Flavour, driver_requirement
from tunesmith.stack.sources import app_digest, image_digest

# Clients before this version have a built-in BuildKit client; later ones need buildx.
_BUILDX_SINCE = 23
_DOCKER_HUB = "https://registry-1.docker.io"
# The environment, and wheels that are downloaded while others are unpacked.
_BUILD_ROOM = 1.3
# BuildKit's plain output: `#12 [image 4/9] RUN ...` where a step begins.
_STEP = re.compile(r"#\d+ (\[.+)")
_LAST_LINES = 12


@dataclass(frozen=True)
class Builder:
    """A docker command that can build with BuildKit."""

    argv: tuple[str, ...]
    env: Mapping[str, str]


@dataclass(frozen=True)
class ImagePlan:
    """A build: `argv` contains everything but the content of secrets."""

    tag: str
    flavour: Flavour
    base: str
    argv: tuple[str, ...]
    secrets: Mapping[str, str]
    room_bytes: int

    def render(self) -> str:
        """Return the plan as text."""
        lines = [f"image    {self.tag}", f"base     {self.base}"]
        lines += [f"lock     {self.flavour.lock} ({self.flavour.lock_sha256[:12]})"]
        lines += [f"disk     {formats.size(self.room_bytes)} while it is built"]
        lines += [f"command  docker {shlex.join(self.argv)}"]
        return "\n".join(lines)


def plan_build(
    project: Project,
    flavour: str | None,
    mirror: Mirror,
    base: str | None,
    *,
    toolkit: bool = False,
) -> ImagePlan:
    """Return the plan of `image.build`. Pure except for reading the repository.

    `base` (BASE_IMAGE) replaces the stack's base image; without it the stack's is pulled from the
    mirror's first registry, by the same digest. Raises UsageError for an unknown flavour or a
    missing certificate file of a mirror.
    """
    stack = project.stack
    chosen = stack.flavour(flavour)
    tag = engine.tag_of(chosen) + ("-toolkit" if toolkit else "")
    image = base or at_registry(stack.image_base, mirror.docker_registries)
    arguments = {
        # Stored in the image's config, which makes the image itself a cache.
        "BUILDKIT_INLINE_CACHE": "1",
        "BASE_IMAGE": image,
        "FLAVOUR": chosen.name,
        "REQUIRE": driver_requirement(chosen),
    }
    if toolkit:
        arguments["CUDA"] = chosen.cuda
    secrets = {"mirror": _mirror_settings(mirror)}
    if mirror.ca_bundle is not None:
        if not mirror.ca_bundle.is_file():
            raise UsageError(f"{mirror.ca_bundle}: no such file; mirror {mirror.name} names it")
        secrets["ca"] = mirror.ca_bundle.read_text(encoding="utf-8")
    argv = ["build", "--file", str(project.root / "docker" / "Dockerfile"), "--tag", tag]
    argv += ["--target", "toolkit" if toolkit else "image"]
    for key, value in arguments.items():
        argv += ["--build-arg", f"{key}={value}"]
    if mirror.http_proxy:
        # BuildKit keeps these two out of the image's history by itself.
        argv += ["--build-arg", f"http_proxy={mirror.http_proxy}"]
        argv += ["--build-arg", f"https_proxy={mirror.http_proxy}"]
    for key, value in labels(project, chosen, image).items():
        argv += ["--label", f"{key}={value}"]
    room = int(chosen.size_bytes * _BUILD_ROOM)
    return ImagePlan(tag, chosen, image, (*argv, str(project.root)), secrets, room)


def build(plan: ImagePlan, log: Path, step: OnText) -> str:
    """Carry a plan out; return the image's id.

    The docker command's output goes to the file `log`; `step` hears what it begins to do. Raises
    UsageError when no engine or builder is there or the engine's disk is too small,
    TunesmithError when the build fails.
    """
    client = engine.connect()
    tool = builder()
    built = _built(client, plan.tag)
    _check_room(client.info().get("DockerRootDir", ""), plan, built)
    with tempfile.TemporaryDirectory(prefix="tunesmith-build-") as scratch:
        argv = [*tool.argv, *plan.argv]
        if built:
            # Its layers are the cache after the builder's own was emptied (`inv image.prune`).
            argv += ["--cache-from", plan.tag]
        for name, content in plan.secrets.items():
            file = Path(scratch) / name
            file.write_text(content, encoding="utf-8")
            argv += ["--secret", f"id={name},src={file}"]
        environment = {**os.environ, **tool.env, "DOCKER_HOST": engine.address()}
        run_logged(plan.tag, argv, environment, log, step)
    return str(engine.find_image(client, plan.tag).id)


def run_logged(
    tag: str, argv: Sequence[str], environment: Mapping[str, str], log: Path, step: OnText
) -> None:
    """Run a build to its end, its output in `log`; `step` hears of each step it begins.

    Raises TunesmithError with the end of what it said when it fails.
    """
    last: deque[str] = deque(maxlen=_LAST_LINES)
    with (
        log.open("w", encoding="utf-8") as kept,
        subprocess.Popen(
            argv,
            # For terminals BuildKit draws over its own lines.
            env={**environment, "BUILDKIT_PROGRESS": "plain"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                kept.write(line)
                if line.strip():
                    last.append(one_line(line))
                if begun := _STEP.match(line):
                    step(one_line(begun[1]))
        except BaseException:
            process.terminate()  # Ctrl-C, above all
            raise
    if process.returncode != 0:
        raise TunesmithError(
            f"{tag}: the build failed with exit code {process.returncode}; all it said is in {log}",
            list(last),
            hint="if an index is slow or blocked, use `--mirror cn`",
        )


def _built(client: object, tag: str) -> bool:
    try:
        engine.find_image(client, tag)  # type: ignore[arg-type]
    except UsageError:
        return False
    return True


def builder() -> Builder:
    """Return the first docker command on PATH that can build with BuildKit.

    Raises UsageError if there is none.
    """
    programs = []
    for program in _on_path("docker"):
        output = _output(program, "--version")
        # Debian's client supports buildx only with an extra package.
        if _output(program, "buildx", "version"):
            return Builder((program, "buildx"), {})
        if 18 <= engine.version_of(output) < _BUILDX_SINCE:
            return Builder((program,), {"DOCKER_BUILDKIT": "1"})
        programs.append(program)
    if not programs:
        raise UsageError(
            "there is no docker command on PATH",
            hint="install Docker (docs.docker.com/engine/install)",
        )
    raise UsageError(
        f"{', '.join(programs)}: no BuildKit (docker buildx is missing)",
        hint="install it with `sudo apt-get install docker-buildx-plugin` (Debian: docker-buildx)",
    )


def at_registry(base: str, registries: tuple[str, ...]) -> str:
    """Return the name of Docker Hub's image `base` at a mirror's first registry.

    The digest stays, so whatever the registry is, the bytes are the same.
    """
    first = registries[0] if registries else _DOCKER_HUB
    if first == _DOCKER_HUB:
        return base
    return f"{first.partition('://')[2]}/{base}"


def labels(project: Project, flavour: Flavour, base: str) -> dict[str, str]:
    """Return the image's labels: OCI's, and the digests of its inputs.

    The time is that of the commit, so that a rebuild changes nothing.
    """
    name, _, digest = base.partition("@")
    found = {
        engine.TITLE: engine.REPOSITORY,
        "org.opencontainers.image.version": __version__,
        "org.opencontainers.image.licenses": "Apache-2.0",
        "org.opencontainers.image.base.name": name,
        engine.STACK: sha256_of(project.stack.path),
        engine.LOCK: flavour.lock_sha256,
        engine.APP: app_digest(project.root),
        engine.SOURCES: image_digest(project.root),
        engine.FLAVOUR: flavour.name,
    }
    if digest:
        found["org.opencontainers.image.base.digest"] = digest
    commit = _output("git", "-C", str(project.root), "log", "-1", "--format=%H %cI")
    if commit:
        found["org.opencontainers.image.revision"], _, created = commit.partition(" ")
        found["org.opencontainers.image.created"] = created
    return found


def _mirror_settings(mirror: Mirror) -> str:
    """Return the sh assignments that the Dockerfile's scripts read."""
    lines = {"PYPI_INDEXES": mirror.pypi_indexes, "APT_MIRRORS": mirror.apt}
    return "".join(f"{key}={shlex.quote(' '.join(value))}\n" for key, value in lines.items())


def _check_room(folder: str, plan: ImagePlan, built: bool) -> None:
    """Refuse a first build that the engine's disk cannot hold (where it is this machine's)."""
    path = Path(folder)
    if built or not folder or not path.is_dir() or not os.access(path, os.R_OK):
        return
    disk.require(
        path,
        plan.room_bytes,
        f"building {plan.tag}",
        hint="free space with `inv image.prune` or `docker system prune`",
    )


def _on_path(program: str) -> Iterator[str]:
    seen = set()
    path_variable = isolated.programs(os.environ.get("PATH", os.defpath))
    for folder in path_variable.split(os.pathsep):
        path = shutil.which(program, path=folder)
        if path and (real := os.path.realpath(path)) not in seen:
            seen.add(real)
            yield path


def _output(*argv: str) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
