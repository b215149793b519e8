"""Locks and environments: resolves configs/stack.yml with uv and installs the result.

uv is a pinned dependency of the control environment, so nothing has to be installed manually, and
both environments are built by the same version.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.core import disk, formats, isolated
from tunesmith.core.callbacks import OnText
from tunesmith.core.documents import JsonObject
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import fsync_folder, held, read_json, replacing, write_json
from tunesmith.core.mirrors import Mirror
from tunesmith.core.names import ENVIRONMENT_MARKER
from tunesmith.core.swap import exchange
from tunesmith.job.system.resources import cpu_count, memory_limit
from tunesmith.stack import bytecode
from tunesmith.stack.definition import DIGEST_PREFIX, Flavour, Stack
from tunesmith.stack.environment_users import users_of

# Wheels in the cache, the environment and temporary files at the same time.
_INSTALL_ROOM = 2.2
# Memory of a compiling process, in bytes: some modules of sympy are large.
_PROCESS_BYTES = 400_000_000
# What of uv's words an error shows.
_UV_LINES = 20

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
) -> JsonObject | None:
    """Build the training environment from its hashed lock, with the bytecode that jobs need.

    Returns its versions, or None when it was already current, perhaps by another installation
    that was waited for (`tell` hears of it). It is built beside and takes its place whole, so
    that one that is not finished never counts; what killed installations left is deleted.
    Raises UsageError when the disk is too small, no Python fits, or
    somebody works with the environment that would be replaced; TunesmithError when uv fails.
    """
    if environment.current() and not _leftovers(environment):
        return None
    environment.path.parent.mkdir(parents=True, exist_ok=True)

    def waiting(owner: str) -> None:
        tell(f"training environment: {owner} is installing {environment.path.name}; waiting")

    with held(environment.path.with_name(f".{environment.path.name}.lock"), waiting) as lock:
        for leftover in _leftovers(environment):
            shutil.rmtree(leftover)
        if environment.current():
            return None
        refuse_while_used(environment)
        disk.require(
            environment.path,
            int(environment.flavour.size_bytes * _INSTALL_ROOM),
            f"installing the {environment.flavour.name} environment",
            hint="free space there, or set TUNESMITH_HOME to a folder on a larger disk",
        )
        size = formats.size(environment.flavour.size_bytes)
        tell(f"training environment: installing {environment.flavour.name} ({size}) ...")
        folder = tempfile.mkdtemp(prefix=_beside(environment), dir=environment.path.parent)
        built = Environment(Path(folder), environment.flavour)
        try:
            versions = _build(stack, built, project, mirror, lock)
            # Again, since that took a while. Later processes load the new environment.
            refuse_while_used(environment)
            _take_place(built.path, environment.path)
        finally:
            # The replaced environment, or an unfinished one.
            shutil.rmtree(built.path, ignore_errors=True)
        return versions


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
    stack: Stack, environment: Environment, project: Path, mirror: Mirror, lock: int
) -> JsonObject:
    """Build a relocatable environment; uv holds `lock`, too."""
    interpreter = find_python(stack.python) or stack.python
    # Relocatable: its programs find Python in their own folder.
    _uv(["venv", "--relocatable", "--python", interpreter, str(environment.path)], inherited=lock)
    _uv(
        [
            *("pip", "install", "--python", str(environment.python)),
            # The lock is complete, so dependencies need not be resolved.
            *("--require-hashes", "--no-deps", "--only-binary", ":all:"),
            *(f"--no-binary={name}" for name in stack.source_packages),
            *("--build-constraints", str(stack.build_constraints)),
            *("--requirements", str(environment.flavour.lock)),
        ],
        mirror,
        inherited=lock,
    )
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
    flavour = environment.flavour
    write_json(
        environment.path / ENVIRONMENT_MARKER,
        {"flavour": flavour.name, "lock_sha256": flavour.lock_sha256, "versions": versions},
    )
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


def lock(stack: Stack, project: Path, mirror: Mirror) -> tuple[Path, ...]:
    """Resolve the stack into hashed locks: one per flavour, the control environment's, and that of
    TensorBoard's packages, which are installed beside a training environment."""
    written = []
    for flavour in stack.flavours.values():
        lines = "".join(f"{line}\n" for line in stack.inputs(flavour))
        with tempfile.TemporaryDirectory() as scratch:
            inputs = Path(scratch) / "requirements.in"
            inputs.write_text(lines, encoding="utf-8")
            arguments = ["--python-version", stack.python, "--python-platform", stack.platform]
            _compile([str(inputs)], arguments, flavour.lock, stack.inputs_digest(flavour), mirror)
        written.append(flavour.lock)
    manifest = str(project / "pyproject.toml")
    control = stack.path.parent / "locks" / "control.txt"
    arguments = ["--universal", "--python-version", stack.control_python.lstrip(">=")]
    arguments += ["--extra", "control", "--group", f"{manifest}:dev"]
    _compile([manifest], arguments, control, None, mirror)
    beside = stack.path.parent / "locks" / "tensorboard.txt"
    arguments = ["--python-version", stack.python, "--python-platform", stack.platform]
    for path in written:
        arguments += ["--constraint", str(path)]
    for name in sorted({name for path in written for name in _names(path)}):
        arguments += ["--no-emit-package", name]
    with tempfile.TemporaryDirectory() as scratch:
        inputs = Path(scratch) / "requirements.in"
        inputs.write_text("tensorboard\n", encoding="utf-8")
        _compile([str(inputs)], arguments, beside, None, mirror)
    return (*written, control, beside)


def _names(lock: Path) -> list[str]:
    """Return the packages of a lock."""
    return re.findall(r"(?m)^([A-Za-z0-9._-]+)==", lock.read_text(encoding="utf-8"))


def _compile(
    inputs: Sequence[str],
    arguments: Sequence[str],
    target: Path,
    digest: str | None,
    mirror: Mirror,
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        # A new file: uv would keep the pins of an existing one.
        output = Path(scratch) / "lock.txt"
        options = ["--generate-hashes", "--no-annotate", "--no-header"]
        _uv(["pip", "compile", *options, *arguments, "-o", str(output), *inputs], mirror)
        with replacing(target) as part:
            head = f"{DIGEST_PREFIX}{digest}\n" if digest else ""
            note = "# Made by `inv stack.lock`; do not edit.\n"
            part.write_text(head + note + output.read_text(encoding="utf-8"), encoding="utf-8")


def _uv(
    arguments: Sequence[str], mirror: Mirror | None = None, *, inherited: int | None = None
) -> None:
    """Run uv with each index of the mirror until one works.

    It holds the lock `inherited` while it lives, though we may be killed. Raises TunesmithError
    with its words when it fails with all of them.
    """
    from uv import find_uv_bin  # not in the image, which never builds environments

    environment = dict(os.environ)
    # Only our options apply, not those of an active environment or a project.
    environment.pop("VIRTUAL_ENV", None)
    environment["UV_NO_CONFIG"] = "1"
    own_index = environment.get("UV_DEFAULT_INDEX")
    indexes = (own_index,) if own_index or mirror is None else mirror.pypi_indexes
    said: list[str] = []
    for index in indexes:
        if index:
            environment["UV_DEFAULT_INDEX"] = index
        done = subprocess.run(
            # Who called shows how long it takes; a list of 145 packages says nothing more.
            [find_uv_bin(), "--quiet", *arguments],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
            pass_fds=() if inherited is None else (inherited,),
        )
        if done.returncode == 0:
            return
        said += done.stderr.splitlines()[-_UV_LINES:]
    raise TunesmithError(
        f"`uv {' '.join(arguments[:2])}` failed with exit code {done.returncode}",
        said,
        hint="if an index is slow or blocked, use `--mirror cn`",
    )
