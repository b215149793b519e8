"""Environments: installs the locks of configs/stack.yml with uv.

uv is a pinned dependency of the control environment, so nothing has to be installed manually, and
both environments are built by the same version.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.core import disk, formats, isolated
from tunesmith.core.callbacks import OnText
from tunesmith.core.documents import JsonObject
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import fsync_folder, held, read_json, write_json
from tunesmith.core.mirrors import Mirror
from tunesmith.core.names import ENVIRONMENT_MARKER
from tunesmith.core.swap import exchange
from tunesmith.job.system.resources import cpu_count, memory_limit
from tunesmith.stack import bytecode, uv
from tunesmith.stack.definition import Extra, Flavour, Stack
from tunesmith.stack.environment_users import users_of

# Wheels in the cache, the environment and temporary files at the same time.
_INSTALL_ROOM = 2.2
# Memory of a compiling process, in bytes: some modules of sympy are large.
_PROCESS_BYTES = 400_000_000

# The verb that stops a process of a module.
_SERVICES = {
    "tunesmith.job.services.board": "webui",
    "tunesmith.job.services.api": "api",
    "tunesmith.job.services.tensorboard": "tensorboard",
}

# Modules that a training environment needs; a Python built without one of them fails late and in
# confusing ways.
_PROBE = "import bz2, ctypes, lzma, sqlite3, ssl, sys; print('%d.%d' % sys.version_info[:2])"


@dataclass(frozen=True)
class Environment:
    """An installed training environment."""

    path: Path
    flavour: Flavour

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.path / "bin" / "python"

    @property
    def packages(self) -> Path:
        """Its site-packages."""
        return next((self.path / "lib").glob("python3.*")) / "site-packages"

    @property
    def extras(self) -> Mapping[str, str]:
        """The extras that it has: name -> sha256 of the lock each was installed from."""
        try:
            found = read_json(self.path / ENVIRONMENT_MARKER).get("extras", {})
        except (FileNotFoundError, ValueError):
            return {}
        return {str(name): str(digest) for name, digest in dict(found).items()}

    def current(self) -> bool:
        """Whether it is complete and was built from the current lock."""
        try:
            marker = read_json(self.path / ENVIRONMENT_MARKER)
        except (FileNotFoundError, ValueError):
            return False
        return bool(marker.get("lock_sha256") == self.flavour.lock_sha256 and self.python.exists())


def install(
    stack: Stack,
    environment: Environment,
    project: Path,
    mirror: Mirror,
    tell: OnText = lambda _: None,
    extras: Sequence[Extra] = (),
) -> JsonObject | None:
    """Build the training environment from its hashed lock, with the bytecode that jobs need.

    It gets `extras` besides those it has. One that is current is not made again for them: they
    add packages and change none.

    Returns its versions, or None when it was already current, perhaps by another installation
    that was waited for (`tell` hears of it). It is built beside and takes its place whole, so
    that one that is not finished never counts; what killed installations left is deleted.
    Raises UsageError when the disk is too small, no Python fits, or
    somebody works with the environment that would be replaced; TunesmithError when uv fails.
    """
    wanted = _with_own(stack, environment, extras)
    missing = _lacking(environment, wanted)
    if environment.current() and not missing and not _leftovers(environment):
        return None
    environment.path.parent.mkdir(parents=True, exist_ok=True)

    def waiting(owner: str) -> None:
        tell(f"training environment: {owner} is installing {environment.path.name}; waiting")

    with held(environment.path.with_name(f".{environment.path.name}.lock"), waiting) as lock:
        for leftover in _leftovers(environment):
            shutil.rmtree(leftover)
        # Again: another installation may have been waited for.
        wanted = _with_own(stack, environment, extras)
        if environment.current():
            return _add(stack, environment, _lacking(environment, wanted), mirror, lock, tell)
        refuse_while_used(environment)
        needed = environment.flavour.size_bytes + sum(extra.size_bytes for extra in wanted)
        disk.require(
            environment.path,
            int(needed * _INSTALL_ROOM),
            f"installing the {environment.flavour.name} environment",
            hint="free space there, or set TUNESMITH_HOME to a folder on a larger disk",
        )
        what = " with ".join(filter(None, (environment.flavour.name, _names(wanted))))
        tell(f"training environment: installing {what} ({formats.size(needed)}) ...")
        folder = tempfile.mkdtemp(prefix=_beside(environment), dir=environment.path.parent)
        built = Environment(Path(folder), environment.flavour)
        try:
            versions = _build(stack, built, project, mirror, lock, wanted)
            # Again, since that took a while. Later processes load the new environment.
            refuse_while_used(environment)
            _take_place(built.path, environment.path)
        finally:
            # The replaced environment, or an unfinished one.
            shutil.rmtree(built.path, ignore_errors=True)
        return versions


def _with_own(stack: Stack, environment: Environment, asked: Sequence[Extra]) -> tuple[Extra, ...]:
    """Return the extras an environment has, as the stack has them now, and those asked for."""
    own = [stack.extras[name] for name in environment.extras if name in stack.extras]
    return tuple({extra.name: extra for extra in (*own, *asked)}.values())


def _lacking(environment: Environment, wanted: Sequence[Extra]) -> tuple[Extra, ...]:
    """Return the extras that an environment has not, or not from the lock as it is now."""
    there = environment.extras
    return tuple(extra for extra in wanted if there.get(extra.name) != extra.lock_sha256)


def _names(extras: Iterable[Extra]) -> str:
    return ", ".join(extra.name for extra in extras)


def _add(
    stack: Stack,
    environment: Environment,
    extras: Sequence[Extra],
    mirror: Mirror,
    lock: int,
    tell: OnText,
) -> JsonObject | None:
    """Add extras to an environment that is current; return its versions, or None without any.

    Runs may go on meanwhile: what they have loaded stays. Raises UsageError where a package
    would be replaced under one.
    """
    if not extras:
        return None
    if any(extra.name in environment.extras for extra in extras):
        refuse_while_used(environment)
    needed = sum(extra.size_bytes for extra in extras)
    disk.require(
        environment.path,
        int(needed * _INSTALL_ROOM),
        f"adding {_names(extras)} to the {environment.flavour.name} environment",
        hint="free space there, or set TUNESMITH_HOME to a folder on a larger disk",
    )
    tell(f"training environment: adding {_names(extras)} ({formats.size(needed)}) ...")
    _install_extras(stack, environment, extras, mirror, lock)
    make_bytecode(environment, stack)
    marker = read_json(environment.path / ENVIRONMENT_MARKER)
    added = {extra.name: extra.lock_sha256 for extra in extras}
    write_json(
        environment.path / ENVIRONMENT_MARKER, marker | {"extras": {**environment.extras, **added}}
    )
    versions: JsonObject = marker["versions"]
    return versions


def _install_extras(
    stack: Stack, environment: Environment, extras: Sequence[Extra], mirror: Mirror, lock: int
) -> None:
    if extras:
        sources = [name for extra in extras for name in extra.source_packages]
        _install(stack, environment, [extra.lock for extra in extras], sources, mirror, lock)


def _install(
    stack: Stack,
    environment: Environment,
    locks: Sequence[Path],
    sources: Sequence[str],
    mirror: Mirror,
    lock: int,
) -> None:
    """Install locks; uv holds `lock`, too."""
    uv.run(
        [
            *("pip", "install", "--python", str(environment.python)),
            # The lock is complete, so dependencies need not be resolved.
            *("--require-hashes", "--no-deps", "--only-binary", ":all:"),
            *(f"--no-binary={name}" for name in sources),
            *("--build-constraints", str(stack.build_constraints)),
            *(word for file in locks for word in ("--requirements", str(file))),
        ],
        mirror,
        inherited=lock,
    )


def refuse_while_used(environment: Environment) -> None:
    """Raise UsageError with the run or process that uses an environment."""
    users = users_of(environment.path) if environment.path.exists() else ()
    if runs := sorted({user.run for user in users if user.run}):
        raise UsageError(
            f"{environment.path} must be reinstalled, but run {runs[0]} is using it",
            [f"run {run}" for run in runs],
            hint=f"wait for it (`inv attach --run {runs[0]}`) or stop it "
            f"(`inv stop --run {runs[0]}`), then run `inv stack.install`",
        )
    if users:
        verb = next((verb for name, verb in _SERVICES.items() if name in users[0].command), None)
        pid = users[0].pid
        end = f"stop it with `inv {verb} --stop`" if verb else f"wait for it, or `kill {pid}`"
        raise UsageError(
            f"{environment.path} must be reinstalled, but process {users[0].pid} is using it",
            [f"process {user.pid}: {user.command[:200]}" for user in users],
            hint=f"{end}, then run `inv stack.install`",
        )


def _build(
    stack: Stack,
    environment: Environment,
    project: Path,
    mirror: Mirror,
    lock: int,
    extras: Sequence[Extra],
) -> JsonObject:
    """Build a relocatable environment; uv holds `lock`, too."""
    interpreter = find_python(stack.python) or stack.python
    # Relocatable: its programs find Python in their own folder.
    uv.run(
        ["venv", "--relocatable", "--python", interpreter, str(environment.path)], inherited=lock
    )
    flavour = environment.flavour
    _install(stack, environment, [flavour.lock], stack.source_packages, mirror, lock)
    _install_extras(stack, environment, extras, mirror, lock)
    # tunesmith itself, as on a host: the job half in this clone.
    (environment.packages / "tunesmith.pth").write_text(f"{project / 'src'}\n", encoding="utf-8")
    make_bytecode(environment, stack)
    versions = probe(environment)
    found = (versions["python"].rpartition(".")[0], versions["llamafactory"])
    if found != (stack.python, stack.llamafactory):
        raise TunesmithError(
            f"{environment.path}: Python and LLaMA-Factory are {found}, stack.yml says "
            f"{(stack.python, stack.llamafactory)}"
        )
    made = {"flavour": flavour.name, "lock_sha256": flavour.lock_sha256, "versions": versions}
    if extras:
        made["extras"] = {extra.name: extra.lock_sha256 for extra in extras}
    write_json(environment.path / ENVIRONMENT_MARKER, made)
    return versions


def _beside(environment: Environment) -> str:
    """Return the name prefix of the folders in which this environment is built."""
    return f".{environment.path.name}.building-"


def _leftovers(environment: Environment) -> list[Path]:
    return sorted(environment.path.parent.glob(f"{glob.escape(_beside(environment))}*"))


def _take_place(built: Path, path: Path) -> None:
    """Exchange a finished environment with the one at its final path."""
    if not path.exists():
        built.rename(path)
    elif not exchange(built, path):
        # Two steps: after a kill between them there is none, and the next installation rebuilds it.
        aside = built.with_name(f"{built.name}.replaced")
        path.rename(aside)
        built.rename(path)
        aside.rename(built)
    fsync_folder(path.parent)


def make_bytecode(environment: Environment, stack: Stack) -> None:
    """Compile what stack.yml does not exclude. Raises TunesmithError if it cannot be written."""
    processes = min(cpu_count(), max(1, memory_limit() // _PROCESS_BYTES))
    # -I and -S: no code of the environment or of ours is loaded, files are only read.
    argv = [str(environment.python), "-I", "-S", str(Path(bytecode.__file__))]
    argv += [str(environment.packages), str(processes), *stack.uncompiled]
    fault = "its bytecode could not be compiled"
    hint = "free space there, then run `inv stack.install` again"
    _output(environment, argv, fault, hint)


def probe(environment: Environment) -> JsonObject:
    """Return the versions the environment reports about itself (imports torch there)."""
    argv = isolated.argv(environment.python, "tunesmith.job.system.versions")
    fault = "the environment does not work"
    hint = f"delete {environment.path}, then run `inv stack.install`"
    versions: JsonObject = json.loads(_output(environment, argv, fault, hint))
    return versions


def _output(environment: Environment, argv: list[str], fault: str, hint: str) -> str:
    """Return the output of a command of the environment; raise TunesmithError if it fails."""
    done = subprocess.run(argv, cwd=isolated.NOWHERE, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        detail = done.stderr.strip().splitlines()[-8:]
        raise TunesmithError(f"{environment.path}: {fault}", detail, hint=hint)
    return done.stdout


def find_python(version: str) -> str | None:
    """Return a working interpreter of `version`, or None (uv then downloads one).

    Searches TUNESMITH_PYTHON, PATH, pyenv's versions and conda's environments, in this order. A
    pyenv shim on PATH may have no version behind it, so each candidate is run.
    """
    named = os.environ.get("TUNESMITH_PYTHON")
    candidates = [named] if named else _candidates(version)
    for candidate in candidates:
        try:
            done = subprocess.run(
                isolated.code(candidate, _PROBE), capture_output=True, text=True, check=False
            )
        except OSError:
            continue  # not there, or not a program
        if done.returncode == 0 and done.stdout.strip() == version:
            return candidate
    if named:
        raise UsageError(f"TUNESMITH_PYTHON={named} is not a working Python {version}")
    return None


def _candidates(version: str) -> list[str]:
    home = Path.home()
    found = [path] if (path := shutil.which(f"python{version}")) else []
    found += sorted(map(str, home.glob(f".pyenv/versions/{version}*/bin/python")))
    for conda in (os.environ.get("CONDA_PREFIX"), home / "miniconda3", home / "miniforge3"):
        if conda:
            found.append(f"{conda}/bin/python")
            found += sorted(map(str, Path(conda).glob("envs/*/bin/python")))
    return found
