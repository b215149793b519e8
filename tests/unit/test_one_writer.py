"""Files that several commands change: one writer at a time, and what each of them is told."""

from __future__ import annotations

import multiprocessing
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tunesmith.basemodel import store as model_store
from tunesmith.basemodel.files import FileRecord
from tunesmith.basemodel.store import ModelFolder
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import locked, private_folder, read_json, write_json, write_text
from tunesmith.dataset import registry
from tunesmith.hosts import inventory, sshconfig
from tunesmith.hosts.address import Address
from tunesmith.hosts.inventory import Host
from tunesmith.job.run.folder import RunFolder, acquire, claim_output
from tunesmith.job.run.process import identify
from tunesmith.job.run.schema import RunRequest
from tunesmith.job.supervisor import agent
from tunesmith.plan.plan import Plan, RunLocation
from tunesmith.project import Project
from tunesmith.targets.local import LocalTarget

pytestmark = pytest.mark.unit

_FORK = multiprocessing.get_context("fork")
# Long enough for any machine: who meets it hangs.
_HANG_SECONDS = 300.0
ADDRESS = Address("198.51.100.7", port=2222, user="root")


def at_once(work: Sequence[Callable[[], Any]]) -> list[str]:
    """Do all of it at the same moment, each in a process; return what each was told.

    "" is success; an error of another kind than ours is told with its class.
    """
    told: Any = _FORK.Queue()
    start = _FORK.Barrier(len(work))

    def one(number: int, do: Callable[[], Any]) -> None:
        start.wait(_HANG_SECONDS)
        try:
            do()
        except TunesmithError as error:
            told.put((number, error.render()))
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is no answer of ours
            told.put((number, f"{type(error).__name__}: {error}"))
        else:
            told.put((number, ""))

    processes = [_FORK.Process(target=one, args=pair) for pair in enumerate(work)]
    for process in processes:
        process.start()
    answers = dict(told.get(timeout=_HANG_SECONDS) for _ in work)
    for process in processes:
        process.join(_HANG_SECONDS)
    return [answers[number] for number in range(len(work))]


def a_run(home: Path, name: str) -> Path:
    folder = home / "runs" / name
    folder.mkdir(parents=True)
    request = {"run_id": name, "created": "2026-01-01T00:00:00+00:00", "title": name}
    write_json(folder / "run.json", request)
    (folder / "output").mkdir()
    for number in range(200):
        (folder / "output" / f"{number}.bin").write_bytes(b"x" * 100)
    return folder


def test_a_lock_lets_one_in(tmp_path: Path) -> None:
    file = tmp_path / "count.json"
    write_json(file, 0)

    def count() -> None:
        with locked(file):
            write_json(file, read_json(file) + 1)

    assert at_once([count] * 16) == [""] * 16
    assert read_json(file) == 16
    assert [path.name for path in tmp_path.iterdir()] == ["count.json"]


def test_of_fifty_registered_at_once_all_are_there(tmp_path: Path) -> None:
    for number in range(50):
        rows = [{"instruction": f"say {number}", "output": "so"}]
        write_json(tmp_path / f"d{number}.json", rows)

    def register(number: int) -> Callable[[], object]:
        return lambda: registry.register(tmp_path, f"d{number}", tmp_path / f"d{number}.json")

    assert at_once([register(number) for number in range(50)]) == [""] * 50
    assert set(registry.load_registry(tmp_path)) == {f"d{number}" for number in range(50)}


def test_a_key_stands_for_one_file_however_many_ask(tmp_path: Path) -> None:
    for number in range(6):
        write_json(tmp_path / f"d{number}.json", [{"instruction": f"say {number}", "output": "so"}])

    def register(number: int) -> Callable[[], object]:
        return lambda: registry.register(tmp_path, "rows", tmp_path / f"d{number}.json")

    told = at_once([register(number) for number in range(6)])
    assert told.count("") == 1
    winner = registry.load_registry(tmp_path)["rows"].file_name
    assert winner == f"d{told.index('')}.json"
    assert all("key rows is already registered for" in line for line in told if line)


def test_of_six_that_delete_a_run_one_does(tmp_path: Path, root: Path) -> None:
    project = Project(root, tmp_path)
    a_run(tmp_path, "other")
    a_run(tmp_path, "r1")
    told = at_once([lambda: LocalTarget(project).remove("r1")] * 6)
    assert told.count("") == 1
    for line in told:
        assert line == "" or line.startswith(("error: run r1 is gone", "error: no run 'r1'")), line
        assert "\n" not in line
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["other"]
    assert list((tmp_path / "deleted").iterdir()) == []


def test_runs_deleted_at_once_are_all_gone(tmp_path: Path, root: Path) -> None:
    project = Project(root, tmp_path)
    names = [f"r{number}" for number in range(6)]
    for name in (*names, "kept"):
        a_run(tmp_path, name)
    # What a deletion has left that was killed.
    (tmp_path / "deleted" / "old.4711" / "output").mkdir(parents=True)

    def remove(name: str) -> Callable[[], object]:
        return lambda: LocalTarget(project).remove(name)

    assert at_once([remove(name) for name in names]) == [""] * 6
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["kept"]
    assert list((tmp_path / "deleted").iterdir()) == []


def test_on_a_host_too_one_of_six_deletes_a_run(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for name in ("r1", "kept"):
        a_run(tmp_path, name)
    run = RunFolder(runs / "r1")
    told = at_once([lambda: agent.remove(runs, run)] * 6)
    assert told.count("") == 1
    assert all("r1" in line and "\n" not in line for line in told if line)
    assert not [line for line in told if line.split(":")[0].endswith("Error")], told
    assert [path.name for path in runs.iterdir()] == ["kept"]


def test_a_run_that_is_worked_on_is_not_deleted_nor_asked_anew(tmp_path: Path, root: Path) -> None:
    folder = RunFolder(a_run(tmp_path, "r1"))
    target = LocalTarget(Project(root, tmp_path))
    plan = Plan(
        RunLocation(folder.path, Path("python"), {}),
        (),
        RunRequest(run_id="r1", phases=("merge",)),
    )
    lock = acquire(folder)
    try:
        before = folder.request()
        for change in (lambda: target.remove("r1"), lambda: target.renew(plan)):
            with pytest.raises(UsageError, match="works in it"):
                change()
        assert folder.request() == before
    finally:
        lock.release()
    target.renew(plan)
    assert folder.request() == plan.request


def test_hosts_added_at_once_are_all_there(tmp_path: Path) -> None:
    place, own = tmp_path / "inventory", tmp_path / "ssh" / "config"
    own.parent.mkdir()
    own.write_text("Host mine\n  HostName 192.0.2.1\n")

    def add(number: int) -> Callable[[], object]:
        key = f"tunesmith-h{number} ssh-ed25519 AAAA{number}"
        host = Host(f"h{number}", "root@x", "2026-01-01", None, None, (key,))

        def both() -> None:
            inventory.write(place, host, ADDRESS, ())
            sshconfig.include(tmp_path / f"other{number}", own)

        return both

    assert at_once([add(number) for number in range(16)]) == [""] * 16
    assert set(inventory.read(place)) == {f"h{number}" for number in range(16)}
    lines = own.read_text().splitlines()
    assert len([line for line in lines if line.startswith("Include ")]) == 16
    assert lines[-2:] == ["Host mine", "  HostName 192.0.2.1"]


def test_one_name_is_one_host_however_many_ask(tmp_path: Path) -> None:
    def add(number: int) -> Callable[[], object]:
        key = f"tunesmith-gpu1 ssh-ed25519 AAAA{number}"
        host = Host("gpu1", "root@x", "2026-01-01", None, None, (key,))
        return lambda: inventory.write(tmp_path, host, ADDRESS, ())

    told = at_once([add(number) for number in range(6)])
    assert told.count("") == 1
    assert inventory.read(tmp_path)["gpu1"].keys[0].endswith(f"AAAA{told.index('')}")
    assert all("another command has written it meanwhile" in line for line in told if line)
    told = at_once([lambda: inventory.remove(tmp_path, "gpu1")] * 6)
    assert told.count("") == 1
    assert all("another command has removed it" in line for line in told if line)


def test_an_output_folder_is_claimed_by_one(tmp_path: Path) -> None:
    output = tmp_path / "saves" / "mine"

    def claim(number: int) -> Callable[[], object]:
        run = RunFolder(a_run(tmp_path, f"r{number}"))
        return lambda: claim_output(run, output)

    told = at_once([claim(number) for number in range(6)])
    assert told.count("") == 1
    assert all(f"belongs to run r{told.index('')}" in line for line in told if line), told


def test_a_look_at_a_model_does_not_undo_what_another_has_recorded(tmp_path: Path) -> None:
    store = tmp_path / "me--tiny@one"
    store.mkdir(parents=True)
    (store / "config.json").write_text("{}")
    known = FileRecord(2, "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a")
    model = ModelFolder("me/tiny", store, "folder", None, {"config.json": known}, fetched=True)
    model_store.record(store, model, "first")
    (seen,) = model_store.entries(tmp_path, "me/tiny")
    os.utime(store / "config.json", ns=(1, 1))
    model_store.record(store, model, "second")
    assert model_store.check(seen) == ()
    assert model_store.entries(tmp_path, "me/tiny")[0].requested == "second"


def test_a_stop_needs_no_environment(tmp_path: Path, root: Path) -> None:
    run = RunFolder(a_run(tmp_path, "r1"))
    code = "import signal; print('ready', flush=True); signal.sigwait([signal.SIGTERM])"
    code = f"import signal; signal.pthread_sigmask(0, [15]); {code}; print('asked', flush=True)"
    supervisor = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert supervisor.stdout is not None
        assert supervisor.stdout.readline() == "ready\n"
        owner = identify(supervisor.pid).to_json()
        state = {"run_id": "r1", "state": "running", "phases": {}, "failure": None}
        write_json(run.status_file, state | {"supervisor": owner})
        project = Project(root, tmp_path)
        assert not project.environment().path.exists()
        target = LocalTarget(project)
        assert [found.run_id for found in target.runs()] == ["r1"]
        target.stop("r1")
        assert supervisor.stdout.readline() == "asked\n"
    finally:
        supervisor.kill()
        supervisor.wait()
    with pytest.raises(UsageError, match="is not running"):
        target.stop("r1")


def modes(folder: Path) -> dict[str, str]:
    """Return what others may do with each thing below a folder, and with itself."""
    return {
        str(path): stat.filemode(path.lstat().st_mode)
        for path in (folder, *folder.rglob("*"))
        if path.lstat().st_mode & 0o077 and not path.is_symlink()
    }


def test_what_is_made_here_is_its_owners_alone(tmp_path: Path, root: Path) -> None:
    umask = os.umask(0o022)
    try:
        project = Project(root, tmp_path / "home")
        # As an older version left it.
        (project.home / "runs").mkdir(parents=True)
        assert modes(project.home)
        run = project.runs / "r1"
        location = RunLocation(run, Path("python"), {})
        LocalTarget(project).create(Plan(location, ("train",), RunRequest("r1"), {"stage": "sft"}))
        for name in ("models", "image", "data"):
            project.folder(name)
        assert modes(project.home) == {}
        # What is written there later, too; elsewhere the user's umask counts.
        write_text(run / "report.html", "<p>")
        (tmp_path / "data").mkdir()
        write_text(tmp_path / "data" / "mine.json", "{}")
        assert stat.S_IMODE((run / "report.html").stat().st_mode) == 0o600
        assert stat.S_IMODE((tmp_path / "data" / "mine.json").stat().st_mode) == 0o644
    finally:
        os.umask(umask)


def test_an_open_folder_is_closed(tmp_path: Path) -> None:
    folder = tmp_path / "lab"
    folder.mkdir()
    folder.chmod(0o777)
    assert stat.S_IMODE(private_folder(folder).stat().st_mode) == 0o700


def test_a_folder_of_all_users_is_not_closed(tmp_path: Path) -> None:
    shared = tmp_path / "tmp"
    shared.mkdir()
    shared.chmod(0o1777)
    with pytest.raises(UsageError, match="shared by all users") as caught:
        private_folder(shared)
    assert "TUNESMITH_HOME" in caught.value.hint
    assert stat.S_IMODE(shared.stat().st_mode) == 0o1777
