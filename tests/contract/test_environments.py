"""The training environment is built beside and swapped: by one, whole, and not under a job.

uv and Python are real; the lock is a small one (standins/tiny_environment.py).
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from standins import tiny_environment
from support import lacking
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import read_json
from tunesmith.core.mirrors import load_mirror
from tunesmith.core.names import ENVIRONMENT_MARKER
from tunesmith.core.swap import exchange
from tunesmith.project import Project
from tunesmith.stack import environment as stack_environment
from tunesmith.stack.environment_users import users_of

pytestmark = pytest.mark.contract

_SPAWN = multiprocessing.get_context("spawn")
# Long enough for any machine: who meets it hangs.
_HANG_SECONDS = 180.0


@pytest.fixture(autouse=True)
def tiny(tmp_path: Path, project: Project, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for environments, and an index that has their packages."""
    python = stack_environment.find_python(project.stack.python)
    if python is None:
        lacking(f"no Python {project.stack.python}", "pyenv or conda brings it")
    monkeypatch.setenv("TUNESMITH_PYTHON", python)
    monkeypatch.setenv("UV_DEFAULT_INDEX", (tmp_path / "index").as_uri())
    return tmp_path


def install(
    folder: Path, root: Path, build: int = 1, tell: Callable[[str], None] = lambda _: None
) -> dict[str, Any] | None:
    stack, environment, _ = tiny_environment.environment(folder, Project.at(root).stack, build)
    mirror = load_mirror("default", root / "configs" / "mirrors")
    return stack_environment.install(stack, environment, root, mirror, tell)


def install_and_tell(folder: Path, root: Path, build: int, said: Any) -> None:
    try:
        made = install(folder, root, build, lambda line: said.put((time.time(), line)))
        said.put((time.time(), "made" if made else "current"))
    except BaseException as error:
        said.put((time.time(), f"failed: {error!r}"))
        raise


def wait_for(done: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + _HANG_SECONDS
    while not (found := done()):
        assert time.monotonic() < deadline, "it hangs"
        time.sleep(0.01)
    return found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "envs").iterdir() if path.is_dir())


def marker(folder: Path) -> dict[str, Any]:
    return dict(read_json(folder / "envs" / "tiny" / ENVIRONMENT_MARKER))


def test_an_environment_works_where_it_was_moved_to(tiny: Path, root: Path) -> None:
    assert install(tiny, root) is not None
    program = tiny / "envs" / "tiny" / "bin" / "llamafactory-cli"
    done = subprocess.run([program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tiny / "envs" / "tiny")
    assert names(tiny) == ["tiny"]
    assert install(tiny, root) is None


def test_of_two_installations_one_waits_and_both_succeed(tiny: Path, root: Path) -> None:
    tiny_environment.environment(tiny, Project.at(root).stack)
    said = _SPAWN.Queue()
    both = [_SPAWN.Process(target=install_and_tell, args=(tiny, root, 1, said)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(_HANG_SECONDS)
    lines = []
    while len([line for line in lines if line in ("made", "current")]) < 2:
        lines.append(said.get(timeout=_HANG_SECONDS)[1])
        assert not lines[-1].startswith("failed"), lines
    assert sorted(line for line in lines if line in ("made", "current")) == ["current", "made"]
    assert [line for line in lines if line.endswith("is installing tiny; waiting")], lines
    assert names(tiny) == ["tiny"]


def test_what_uv_says_of_a_failure_is_in_the_error(
    tiny: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UV_DEFAULT_INDEX", (tiny / "empty").as_uri())
    with pytest.raises(TunesmithError, match=r"`uv pip install` failed with exit code 1") as caught:
        install(tiny, root)
    assert "torch" in "\n".join(caught.value.detail)
    assert names(tiny) == []


def test_who_waits_is_told_at_once(tiny: Path, root: Path) -> None:
    (tiny / "envs").mkdir()
    lines: list[str] = []
    with (tiny / "envs" / ".tiny.lock").open("w+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 4711")
        lock.flush()

        def tell(line: str) -> None:
            lines.append(line)
            # It is told before the wait begins, not after it.
            fcntl.flock(lock, fcntl.LOCK_UN)

        assert install(tiny, root, tell=tell) is not None
    assert lines[0] == "training environment: process 4711 is installing tiny; waiting"


def test_a_killed_installation_counts_for_nothing_and_is_swept(tiny: Path, root: Path) -> None:
    assert install(tiny, root) is not None
    before = marker(tiny)
    said = _SPAWN.Queue()
    process = _SPAWN.Process(target=install_and_tell, args=(tiny, root, 2, said))
    process.start()
    wait_for(lambda: [name for name in names(tiny) if name.startswith(".tiny.building-")])
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert marker(tiny) == before
    assert (tiny / "envs" / "tiny" / "bin" / "llamafactory-cli").is_file()
    assert [name for name in names(tiny) if name.startswith(".tiny.building-")]
    assert install(tiny, root, build=2) is not None
    assert marker(tiny) != before
    assert names(tiny) == ["tiny"]


def test_one_that_a_run_works_with_is_not_replaced(tiny: Path, root: Path) -> None:
    install(tiny, root)
    before = marker(tiny)
    run = tiny / "runs" / "r1"
    run.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    python = tiny / "envs" / "tiny" / "bin" / "python"
    code = "import time; print('ready', flush=True); time.sleep(600)"
    with (run / "run.lock").open("w") as lock:
        argv = [python, "-c", code]
        job = subprocess.Popen(argv, stdout=subprocess.PIPE, pass_fds=(lock.fileno(),))
    try:
        assert job.stdout is not None
        assert job.stdout.readline() == b"ready\n"
        with pytest.raises(UsageError) as caught:
            install(tiny, root, build=2)
        assert "run r1 is using it" in caught.value.message
        assert "`inv stop --run r1`" in caught.value.hint
        assert marker(tiny) == before
        # As it is, it is current: nobody is in the way.
        assert install(tiny, root, build=1) is None
    finally:
        job.kill()
        job.wait()
    assert install(tiny, root, build=2) is not None


def test_a_process_without_a_run_is_named(tiny: Path, root: Path) -> None:
    install(tiny, root)
    python = tiny / "envs" / "tiny" / "bin" / "python"
    # By a relative name, as a person would start it.
    argv = ["bin/python", "-c", "import time; print('ready', flush=True); time.sleep(600)"]
    job = subprocess.Popen(argv, cwd=python.parents[1], stdout=subprocess.PIPE)
    try:
        assert job.stdout is not None
        assert job.stdout.readline() == b"ready\n"
        assert [user.pid for user in users_of(tiny / "envs" / "tiny")] == [job.pid]
        with pytest.raises(UsageError, match=f"process {job.pid} is using it"):
            install(tiny, root, build=2)
    finally:
        job.kill()
        job.wait()
    assert users_of(tiny / "envs" / "tiny") == ()


def test_two_folders_change_places(tmp_path: Path) -> None:
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert exchange(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "new").exists()
    assert (tmp_path / "new" / "old").exists()
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "new", tmp_path / "missing")
