"""Brings hosts to the state of configs/stack.yml with Ansible. The one user of ansible-runner.

Everything ansible-playbook needs lies in a work folder of ours (0700), which is deleted
afterwards; after a kill, by the next run, together with what is left of the processes.
Secrets reach Ansible as the path of a file there, never as an argument or a variable.
What is kept is the log in `.tunesmith/provision/<time>/`, with secrets taken out.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import ansible_runner  # type: ignore[import-untyped]

from tunesmith.core import formats
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.mirrors import mirror_file
from tunesmith.core.processes import end_all, resident_bytes, with_argument
from tunesmith.hosts import inventory as inventories
from tunesmith.project import Project
from tunesmith.provision import events
from tunesmith.provision.drift import fingerprint, record_script, wanted_of
from tunesmith.provision.events import HostResult, Step
from tunesmith.stack.sources import app_digest, write_app_archive

# How long ansible-playbook may take to end its workers after Ctrl-C, in seconds.
_GRACE = 10.0
# What a process of ansible-playbook may have in use; it needs 60 to 150 MB. It keeps all that a
# host answers until the task ends, without a limit of its own.
_MOST_MEMORY = 450_000_000
_LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class ProvisionOptions:
    """What to bring to a host.

    `mirror` is a profile's name or a file, `flavour` None lets the host decide, `toolkit`
    adds nvcc. `token` is the Hugging Face token to leave there. `check` changes nothing and
    tells what would be; `diff` shows the lines of files that change. `distrusted` names, by
    host, what has to be made again whatever its finish marker says (drift.State).
    """

    mirror: str = "default"
    flavour: str | None = None
    toolkit: bool = False
    token: str | None = None
    check: bool = False
    diff: bool = False
    distrusted: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Provisioned:
    """What became of each host. `log` is the folder with Ansible's output and events."""

    hosts: tuple[HostResult, ...]
    log: Path
    seconds: float
    interrupted: bool = False

    @property
    def good(self) -> bool:
        """Whether all hosts came to the end."""
        return not self.interrupted and all(host.good for host in self.hosts)


def provision(
    project: Project,
    names: Sequence[str],
    asked: ProvisionOptions,
    progress: Callable[[Step], None],
    *,
    playbook: Path | None = None,
) -> Provisioned:
    """Run the playbook that makes hosts training machines; those that fail do not stop others.

    Raises UsageError for an unknown host, mirror or flavour, TunesmithError when another
    command is at work on one of the hosts or Ansible could not begin.
    """
    mirror = project.mirror(asked.mirror)
    wanted = wanted_of(project, mirror, flavour=asked.flavour, toolkit=asked.toolkit)
    variables: dict[str, Any] = {
        "stack_file": str(project.stack.path),
        "mirror_file": str(mirror_file(asked.mirror, project.mirrors)),
        "app_digest": app_digest(project.root),
        "cuda_toolkit": asked.toolkit,
        "state_fingerprint": fingerprint(wanted),
        "distrusted": {name: list(what) for name, what in asked.distrusted.items()},
    }
    if asked.flavour:
        variables["cuda_flavour"] = asked.flavour

    def furnish(work: Path) -> dict[str, Any]:
        archive = work / "app.tar.gz"
        write_app_archive(project.root, archive)
        record = work / "record.sh"
        record.write_text(record_script(), encoding="utf-8")
        files = {"app_archive": str(archive), "record_script": str(record)}
        if asked.token is not None:
            token = work / "token"
            _write_private(token, asked.token)
            files["hf_token_file"] = str(token)
        return variables | files

    return _play(
        project,
        playbook or project.root / "ansible" / "playbooks" / "provision.yml",
        names,
        furnish,
        progress,
        options=[*(["--check"] if asked.check else []), *(["--diff"] if asked.diff else [])],
        secrets=[asked.token] if asked.token else [],
    )


def reset(
    project: Project,
    names: Sequence[str],
    progress: Callable[[Step], None],
    *,
    playbook: Path | None = None,
) -> Provisioned:
    """Remove from hosts what provisioning installed; data, models and runs stay."""
    variables = {"stack_file": str(project.stack.path)}
    return _play(
        project,
        playbook or project.root / "ansible" / "playbooks" / "reset.yml",
        names,
        lambda _work: variables,
        progress,
    )


def _play(
    project: Project,
    playbook: Path,
    names: Sequence[str],
    furnish: Callable[[Path], Mapping[str, Any]],
    progress: Callable[[Step], None],
    *,
    options: Sequence[str] = (),
    secrets: Sequence[str] = (),
) -> Provisioned:
    for name in names:
        inventories.find(project.inventory, name)
    home = project.folder("provision")
    with _locked_hosts(home, names), _work_folder(home) as work:
        (work / "env").mkdir()
        # As they are: Ansible would template what an extra variable says.
        _write_private(work / "env" / "extravars", inventories.variables(furnish(work)))
        log = _log_folder(home)
        with events.Recorder(names, log, progress, secrets) as recorder:
            code, interrupted = _run(project, playbook, names, work, options, recorder)
    if recorder.stats is None and not interrupted:
        raise TunesmithError(
            f"ansible-playbook ended with exit code {code} before any host was done; the log is "
            f"{log / events.OUTPUT}",
            recorder.last_lines,
        )
    return Provisioned(recorder.results(project.inventory), log, recorder.seconds, interrupted)


def _run(
    project: Project,
    playbook: Path,
    names: Sequence[str],
    work: Path,
    options: Sequence[str],
    recorder: events.Recorder,
) -> tuple[int, bool]:
    """Run ansible-playbook to its end; return its exit code and whether it was interrupted."""
    with _Interrupt(work, recorder) as interrupt:
        runner = ansible_runner.run(
            private_data_dir=str(work),
            project_dir=str(playbook.parent),
            playbook=str(playbook),
            inventory=str(project.inventory / "hosts.yml"),
            limit=",".join(names),
            cmdline=shlex.join(options) or None,
            envvars=_environment(project, work),
            # Seconds between two looks at `cancel_callback`.
            settings={"pexpect_timeout": 0.2, "suppress_output_file": True},
            quiet=True,
            event_handler=recorder.event,
            cancel_callback=interrupt.must_end_now,
        )
        if interrupt.flooded:
            raise TunesmithError(
                f"{', '.join(names)}: a host sends more than a task can have to say: "
                f"ansible-playbook grew beyond {formats.size(_MOST_MEMORY)} and was killed",
                hint="check each host alone with `inv host.check --on NAME`",
            )
        recorder.check()
        return int(runner.rc), interrupt.asked


def _environment(project: Project, work: Path) -> dict[str, str]:
    return {
        "ANSIBLE_CONFIG": str(project.root / "ansible" / "ansible.cfg"),
        # Its temporary files hold what is copied to hosts: they go with the work folder.
        "ANSIBLE_HOME": str(work / "ansible"),
        # ansible-runner switches host keys off unless this says otherwise.
        "ANSIBLE_HOST_KEY_CHECKING": "True",
        "ANSIBLE_NOCOLOR": "1",
        # .venv/bin is not on PATH when `inv` is called by its path.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
    }


class _Interrupt:
    """Turns Ctrl-C, and a terminal that closes, into an orderly end of ansible-playbook.

    It ends its workers itself when it gets SIGINT; ansible-runner would kill it alone and
    leave the workers and their ssh behind.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self, work: Path, recorder: events.Recorder) -> None:
        self._argument = str(work)
        self._recorder = recorder
        self._before: dict[signal.Signals, Any] = {}
        self._deadline: float | None = None
        self._looked = 0.0
        self.asked = False
        self.flooded = False

    def __enter__(self) -> _Interrupt:
        self._before = {number: signal.signal(number, self._heard) for number in self._SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        end_all(with_argument(self._argument), grace=2.0)

    def _heard(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True

    def must_end_now(self) -> bool:
        """Pass the wish on, once; after the time of grace say that it was not heard.

        At once where a host's output swells the processes that read it.
        """
        self.flooded = self.flooded or self._swollen()
        if self.flooded:
            return True
        if not self.asked:
            return False
        if self._deadline is None:
            self._deadline = time.monotonic() + _GRACE
            if self._recorder.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._recorder.pid, signal.SIGINT)
                return False
        return self._recorder.pid is None or time.monotonic() > self._deadline

    def _swollen(self) -> bool:
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return False
        self._looked = time.monotonic()
        return any(resident_bytes(pid) > _MOST_MEMORY for pid in with_argument(self._argument))


@contextlib.contextmanager
def _locked_hosts(home: Path, names: Sequence[str]) -> Iterator[None]:
    """Let one command of this clone work on a host at a time; the kernel frees the locks."""
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    locks = home / "locks"
    locks.mkdir(exist_ok=True)
    with contextlib.ExitStack() as held:
        for name in sorted(set(names)):
            stream = held.enter_context((locks / name).open("a+", encoding="utf-8"))
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                stream.seek(0)
                raise TunesmithError(
                    f"{name}: process {stream.read().strip() or 'unknown'} of this clone is "
                    "working on it",
                    hint="wait until it ends, then try again",
                ) from None
            stream.truncate(0)
            stream.write(f"{os.getpid()}\n")
            stream.flush()
        yield


@contextlib.contextmanager
def _work_folder(home: Path) -> Iterator[Path]:
    """Yield a private folder that is gone afterwards; first clear up after killed runs."""
    with (home / "locks" / ".work").open("a") as making:
        fcntl.flock(making, fcntl.LOCK_EX)
        for folder in home.glob("work-*"):
            _clear_if_left(folder)
        work = Path(tempfile.mkdtemp(prefix="work-", dir=home)).resolve()
        own = (work / ".lock").open("w")
        fcntl.flock(own, fcntl.LOCK_EX)
    try:
        yield work
    finally:
        shutil.rmtree(work)
        own.close()


def _clear_if_left(folder: Path) -> None:
    """Delete the work folder of a run that was killed, and end what still works from it."""
    with (folder / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # its run is alive
        end_all(with_argument(str(folder.resolve())), grace=5.0)
        shutil.rmtree(folder)


def _log_folder(home: Path) -> Path:
    name = time.strftime("%Y%m%d-%H%M%S")
    for number in range(100):
        folder = home / (f"{name}-{number}" if number else name)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
            return folder
    raise UsageError(f"could not create a unique log folder in {home}", hint=f"empty {home}")


def _write_private(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8", opener=_private) as stream:
        stream.write(text)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_EXCL, 0o600)
