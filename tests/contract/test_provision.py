"""Provisioning through the real ansible-runner and ansible-playbook, on this machine."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from tests.unit.local_hosts import local_hosts
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.processes import with_argument
from tunesmith.project import Project
from tunesmith.provision import playbook as provisioning
from tunesmith.provision.drift import record_script
from tunesmith.provision.events import HostResult, Recorder, Step
from tunesmith.provision.playbook import Provisioned, ProvisionOptions, provision, reset
from tunesmith.stack.sources import app_digest

pytestmark = pytest.mark.contract

CANARY = "hf_CanaryCanaryCanaryCanary1234"


def playbook(folder: Path, *tasks: dict[str, object]) -> Path:
    """Write a playbook of these tasks."""
    play = {"name": "Try", "hosts": "gpu_hosts", "gather_facts": False, "tasks": list(tasks)}
    path = folder / "play.yml"
    path.write_text(yaml.safe_dump([play], sort_keys=False), encoding="utf-8")
    return path


def command(name: str, text: str, **more: object) -> dict[str, object]:
    return {"name": name, "ansible.builtin.command": text, **more}


def nothing(_step: Step) -> None:
    return None


def home_of(project: Project) -> Path:
    return project.home / "provision"


def left_over(project: Project) -> list[Path]:
    return list(home_of(project).glob("work-*"))


def test_a_host_that_goes_well(root: Path, tmp_path: Path) -> None:
    project = local_hosts(root, tmp_path, ("gpu1",))
    steps: list[Step] = []
    play = playbook(
        tmp_path,
        command("Say", "echo hello", changed_when=True),
        command("Skip", "echo no", when=False),
        command("Bear it", "false", ignore_errors=True, changed_when=False),
        {
            "name": "Try and rescue",
            "block": [command("Fall", "false")],
            "rescue": [command("Get up", "echo up", changed_when=False)],
        },
    )
    done = provision(project, ["gpu1"], ProvisionOptions(), steps.append, playbook=play)
    (host,) = done.hosts
    assert done.good
    assert host == HostResult("gpu1", ok=3, changed=1, skipped=1, seconds=host.seconds)
    assert 0 < host.seconds < done.seconds
    assert [(step.task, step.state) for step in steps] == [
        ("Say", "started"),
        ("Say", "changed"),
        ("Skip", "started"),
        ("Skip", "skipped"),
        ("Bear it", "started"),
        ("Bear it", "ignored"),
        ("Fall", "started"),
        ("Fall", "failed"),
        ("Get up", "started"),
        ("Get up", "ok"),
    ]
    assert {step.host for step in steps} == {"gpu1"}
    # The log is there for its owner, the work folder is gone.
    assert "TASK [Say]" in (done.log / "ansible.log").read_text(encoding="utf-8")
    events = [json.loads(x) for x in (done.log / "events.jsonl").read_text().splitlines()]
    assert "playbook_on_stats" in {event["event"] for event in events}
    assert stat.S_IMODE(done.log.stat().st_mode) == 0o700
    assert stat.S_IMODE(home_of(project).stat().st_mode) == 0o700
    assert left_over(project) == []


def test_what_the_playbook_is_given(root: Path, tmp_path: Path) -> None:
    """The variables of ansible/playbooks/provision.yml, and the settings that guard it."""
    names = (
        *("stack_file", "mirror_file", "app_archive", "app_digest", "cuda_toolkit"),
        *("cuda_flavour", "state_fingerprint", "record_script", "distrusted", "hf_token_file"),
    )
    content = {name: f"{{{{ {name} | default('absent') }}}}" for name in names}
    content["keys"] = "{{ lookup('ansible.builtin.config', 'HOST_KEY_CHECKING') }}"
    content["config"] = "{{ lookup('ansible.builtin.config', 'CONFIG_FILE') }}"
    content["archive"] = "{{ lookup('ansible.builtin.pipe', 'tar -tzf ' ~ app_archive) }}"
    content["recorder"] = "{{ lookup('ansible.builtin.file', record_script, rstrip=false) }}"
    given = tmp_path / "given.json"
    copy = {"content": "{{ content | to_json }}", "dest": str(given), "mode": "0600"}
    note = {"name": "Note", "ansible.builtin.copy": copy, "vars": {"content": content}}
    play = playbook(tmp_path, note)
    project = local_hosts(root, tmp_path, ("gpu1",))
    distrusted = {"gpu1": ("environment",)}
    asked = ProvisionOptions("cn", "cu126", toolkit=True, distrusted=distrusted)
    done = provision(project, ["gpu1"], asked, nothing, playbook=play)
    assert done.good, done.hosts
    got = json.loads(given.read_text(encoding="utf-8"))
    assert got["stack_file"] == str(root / "configs/stack.yml")
    assert got["mirror_file"] == str(root / "configs/mirrors/cn.yml")
    assert got["app_digest"] == app_digest(root)
    assert (got["cuda_toolkit"], got["cuda_flavour"]) == (True, "cu126")
    assert "flavour=cu126" in got["state_fingerprint"]
    assert got["recorder"] == record_script()
    assert got["distrusted"] == {"gpu1": ["environment"]}
    assert got["hf_token_file"] == "absent"
    assert "src/tunesmith/job/supervisor/worker.py" in got["archive"]
    # ansible-runner would switch the check of host keys off.
    assert got["keys"] is True
    assert got["config"] == str(root / "ansible/ansible.cfg")


def test_three_hosts_of_which_one_fails_and_one_is_off(root: Path, tmp_path: Path) -> None:
    off = {
        "ansible_connection": "ssh",
        "ansible_host": "127.0.0.1",
        "ansible_port": 9,
        "ansible_ssh_common_args": "-F /dev/null",
    }
    project = local_hosts(root, tmp_path, ("gpu1", "gpu2", "gpu3", "gpu4"), gpu3=off)
    text = "sh -c 'echo out; echo first >&2; echo the disk is full >&2; exit 3'"
    play = playbook(
        tmp_path,
        command("Say", "echo hello", changed_when=False),
        command("Fill", text, when="inventory_hostname == 'gpu2'"),
        command("End", "echo end", changed_when=False),
    )
    done = provision(
        project, ["gpu1", "gpu2", "gpu3", "gpu4"], ProvisionOptions(), nothing, playbook=play
    )
    good1, failed, unreachable, good4 = done.hosts
    assert not done.good
    assert [host.name for host in done.hosts if host.good] == ["gpu1", "gpu4"]
    assert (good1.ok, good4.ok) == (2, 2)
    assert (failed.failed, failed.task) == (1, "Fill")
    assert failed.message == "exit code 3: the disk is full"
    assert failed.detail == ("first", "the disk is full")
    assert unreachable.unreachable == 1
    # On a busy machine Ansible may write to an ssh that has just ended, and has its word only.
    off_or_lost = (
        "gpu3: root@gpu3.example.com:22 is off (connect to host",
        "gpu3: the connection to root@gpu3.example.com:22 was lost (",
    )
    assert str(unreachable.message).startswith(off_or_lost)


FAILURES: dict[str, tuple[dict[str, object], str]] = {
    "assertion": (
        {"ansible.builtin.assert": {"that": "false", "fail_msg": "driver 470: take 525"}},
        "driver 470: take 525",
    ),
    "item": (
        {
            "ansible.builtin.command": "sh -c 'echo {{ item }} >&2; exit {{ item }}'",
            "loop": [0, 4, 0],
        },
        "exit code 4: 4",
    ),
    "silent": ({"ansible.builtin.command": "false"}, "exit code 1"),
    "stdout": ({"ansible.builtin.command": "sh -c 'echo why; exit 2'"}, "exit code 2: why"),
    "lines": ({"ansible.builtin.fail": {"msg": "two\nlines"}}, "two lines"),
    "absent": ({"ansible.builtin.command": "absent-program"}, "absent-program: cannot be started"),
    "hidden": ({"ansible.builtin.fail": {"msg": "secret"}, "no_log": True}, "no_log: true"),
    "undefined": (
        {"ansible.builtin.debug": {"msg": "{{ undefined_name }}"}},
        "'undefined_name' is undefined",
    ),
}


def test_why_a_host_failed(root: Path, tmp_path: Path) -> None:
    names = tuple(FAILURES)
    project = local_hosts(root, tmp_path, names)
    tasks = [
        {"name": f"Fail {name}", **task, "when": f"inventory_hostname == '{name}'"}
        for name, (task, _) in FAILURES.items()
    ]
    done = provision(
        project, names, ProvisionOptions(), nothing, playbook=playbook(tmp_path, *tasks)
    )
    for host in done.hosts:
        assert (host.good, host.failed, host.task) == (False, 1, f"Fail {host.name}")
        assert FAILURES[host.name][1] in str(host.message)
        assert "secret" not in f"{host.message} {host.detail}"
        assert "\n" not in str(host.message)


def test_check_and_diff_change_nothing_and_tell(root: Path, tmp_path: Path) -> None:
    project = local_hosts(root, tmp_path, ("gpu1",))
    target = tmp_path / "target"
    copy = {"content": "new line\n", "dest": str(target), "mode": "0600"}
    play = playbook(tmp_path, {"name": "Write", "ansible.builtin.copy": copy})
    done = provision(
        project, ["gpu1"], ProvisionOptions(check=True, diff=True), nothing, playbook=play
    )
    assert done.hosts[0].changed == 1
    assert not target.exists()
    assert "+new line" in (done.log / "ansible.log").read_text(encoding="utf-8")
    done = provision(project, ["gpu1"], ProvisionOptions(), nothing, playbook=play)
    assert target.read_text(encoding="utf-8") == "new line\n"
    assert "+new line" not in (done.log / "ansible.log").read_text(encoding="utf-8")
    done = provision(project, ["gpu1"], ProvisionOptions(), nothing, playbook=play)
    assert done.hosts[0].changed == 0


def test_no_trace_of_a_token(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At -vvv, with a failing task, a loop, and a task that tells it all the same."""
    monkeypatch.setenv("ANSIBLE_VERBOSITY", "3")
    project = local_hosts(root, tmp_path, ("gpu1",))
    token = "{{ lookup('ansible.builtin.file', hf_token_file) }}"
    copy = {"content": f"{token}\n", "dest": str(tmp_path / "kept"), "mode": "0600"}
    play = playbook(
        tmp_path,
        {"name": "Keep", "ansible.builtin.copy": copy, "no_log": True, "diff": True},
        {"name": "Leak", "ansible.builtin.debug": {"msg": f"it is {token}"}, "loop": [1, 2]},
        {"name": "Address", "ansible.builtin.debug": {"msg": "http://me:geheim@proxy:1/"}},
        {"name": "Wait", "ansible.builtin.command": "sleep 1", "changed_when": False},
        {"name": "Fail", "ansible.builtin.fail": {"msg": f"no good: {token}"}},
    )
    seen: list[str] = []
    watching = threading.Event()

    def watch() -> None:
        while not watching.is_set():
            seen.extend(str(pid) for pid in with_argument(CANARY))
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        asked = ProvisionOptions(token=CANARY, diff=True)
        done = provision(project, ["gpu1"], asked, nothing, playbook=play)
    finally:
        watching.set()
        watcher.join()
    assert (tmp_path / "kept").read_text(encoding="utf-8") == f"{CANARY}\n"
    assert done.hosts[0].message == "no good: ***"
    log = (done.log / "ansible.log").read_text(encoding="utf-8")
    assert "it is ***" in log
    assert "http://***@proxy:1/" in log
    assert "TASK [Wait]" in log
    assert "EXEC" in log, "not at -vvv"
    (tmp_path / "kept").unlink()
    for path in tmp_path.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert CANARY.encode() not in content, path
            assert b"geheim" not in content or path == play, path
    assert seen == []


@pytest.mark.parametrize(
    "text", ["- hosts: [", "- name: Try\n  hosts: gpu_hosts\n  roles: [none]\n"]
)
def test_ansible_that_cannot_begin(root: Path, tmp_path: Path, text: str) -> None:
    project = local_hosts(root, tmp_path, ("gpu1",))
    play = tmp_path / "play.yml"
    play.write_text(text, encoding="utf-8")
    with pytest.raises(TunesmithError, match=r"ended with exit code [1-9]") as caught:
        provision(project, ["gpu1"], ProvisionOptions(), nothing, playbook=play)
    assert caught.value.detail
    assert left_over(project) == []


def test_a_play_that_leaves_a_host_out(root: Path, tmp_path: Path) -> None:
    project = local_hosts(root, tmp_path, ("gpu1", "gpu2"))
    play = playbook(tmp_path, command("Say", "echo hello", changed_when=False))
    play.write_text(play.read_text().replace("hosts: gpu_hosts", "hosts: gpu1"), encoding="utf-8")
    done = provision(project, ["gpu1", "gpu2"], ProvisionOptions(), nothing, playbook=play)
    assert [host.good for host in done.hosts] == [True, False]
    assert done.hosts[1].message == "no task was run on it"


def test_misuse_leaves_nothing_behind(root: Path, tmp_path: Path) -> None:
    project = local_hosts(root, tmp_path, ("gpu1",))
    for names, asked, told in [
        (["gpu1", "other"], ProvisionOptions(), "no host 'other'"),
        (["gpu1"], ProvisionOptions("nowhere"), "unknown mirror 'nowhere'"),
        (["gpu1"], ProvisionOptions(flavour="cu42"), "flavour 'cu42'"),
    ]:
        with pytest.raises(UsageError, match=told):
            provision(project, names, asked, nothing)
    assert not project.home.exists()


def test_progress_that_breaks_is_not_swallowed(root: Path, tmp_path: Path) -> None:
    project = local_hosts(root, tmp_path, ("gpu1",))

    def broken(_step: Step) -> None:
        raise OSError("the terminal is gone")

    play = playbook(tmp_path, command("Say", "echo hello", changed_when=False))
    with pytest.raises(OSError, match="the terminal is gone"):
        provision(project, ["gpu1"], ProvisionOptions(), broken, playbook=play)
    assert left_over(project) == []


def test_reset_runs_its_playbook(root: Path, tmp_path: Path) -> None:
    project = local_hosts(root, tmp_path, ("gpu1",))
    text = "test {{ stack_file }} = {{ app_archive | default(stack_file) }}"
    play = playbook(tmp_path, command("Compare", text, changed_when=False))
    assert reset(project, ["gpu1"], nothing, playbook=play).good


# Runs in a process of its own, because it is interrupted and killed.
SCRIPT = """
import dataclasses, sys
from pathlib import Path
from tests.unit.local_hosts import _Project
from tunesmith.core.errors import TunesmithError
from tunesmith.provision.playbook import ProvisionOptions, provision

root, folder, play = map(Path, sys.argv[1:])
project = _Project(root, folder / "home", folder / "inventory")
try:
    done = provision(project, ["gpu1"], ProvisionOptions(token="hf_CanaryCanaryCanaryCanary1234"),
                     lambda step: print(step.task, step.state, flush=True), playbook=play)
except TunesmithError as error:
    sys.exit(error.message)
print("interrupted" if done.interrupted else "good" if done.good else "bad", flush=True)
print(done.hosts[0].message, flush=True)
"""


def started(root: Path, folder: Path, play: Path) -> subprocess.Popen[str]:
    """Start a provision and return when its last task, which waits, has begun."""
    argv = [sys.executable, "-c", SCRIPT, str(root), str(folder), str(play)]
    # Without .venv/bin on PATH, as when its inv is called by its path.
    environment = {**os.environ, "PATH": "/usr/bin:/bin", "PYTHONPATH": str(root)}
    # What a module that was killed leaves behind goes with the test's folder.
    environment["TMPDIR"] = str(folder)
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    while (line := process.stdout.readline()).strip() != "Wait started":
        assert line, "it ended before it waited"
    deadline = time.monotonic() + 120
    while not (folder / "waits").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return process


def waiting(folder: Path) -> Path:
    """A playbook that waits ten minutes, or until there is a file `go`."""
    wait = f"for n in $(seq 6000); do [ -e {folder}/go ] || sleep 0.1; done"
    text = f"sh -c 'touch {folder}/waits; {wait}; touch {folder}/waited'"
    return playbook(folder, command("Wait", text, changed_when=False))


def ours(folder: Path) -> tuple[int, ...]:
    return with_argument(f"{folder}/home/provision/work-")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_ends_all_of_it(root: Path, tmp_path: Path, number: signal.Signals) -> None:
    project = local_hosts(root, tmp_path, ("gpu1",))
    process = started(root, tmp_path, waiting(tmp_path))
    process.send_signal(number)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert out.splitlines() == [
        "interrupted",
        "interrupted; run the same command again to continue",
    ]
    assert ours(tmp_path) == ()
    assert left_over(project) == []


def test_after_a_kill_the_next_run_clears_up_first(root: Path, tmp_path: Path) -> None:
    project = local_hosts(root, tmp_path, ("gpu1",))
    process = started(root, tmp_path, waiting(tmp_path))
    process.kill()
    process.communicate()
    (left,) = left_over(project)
    assert (left / "token").read_text(encoding="utf-8") == CANARY
    assert stat.S_IMODE((left / "token").stat().st_mode) == 0o600
    assert stat.S_IMODE(left.stat().st_mode) == 0o700
    assert ours(tmp_path), "ansible-playbook outlives us: that is what the next run must see"
    play = playbook(tmp_path, command("Say", "echo hello", changed_when=False))
    done = provision(project, ["gpu1"], ProvisionOptions(), nothing, playbook=play)
    assert done.good
    assert left_over(project) == []
    assert ours(tmp_path) == ()


def test_two_commands_do_not_work_on_one_host(root: Path, tmp_path: Path) -> None:
    project = local_hosts(root, tmp_path, ("gpu1", "gpu2"))
    process = started(root, tmp_path, waiting(tmp_path))
    play = tmp_path / "other"
    play.mkdir()
    quick = playbook(play, command("Say", "echo hello", changed_when=False))
    with pytest.raises(TunesmithError, match=rf"gpu1: process {process.pid} of this clone"):
        provision(project, ["gpu2", "gpu1"], ProvisionOptions(), nothing, playbook=quick)
    # Another host is free, and the first command's work folder is left alone.
    done: Provisioned = provision(project, ["gpu2"], ProvisionOptions(), nothing, playbook=quick)
    assert done.good
    assert len(left_over(project)) == 1
    (tmp_path / "go").touch()
    out, _ = process.communicate(timeout=120)
    assert out.splitlines()[-2] == "good"
    assert (tmp_path / "waited").exists()
    assert left_over(project) == []


def test_a_process_that_swells_ends_the_play(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked between two looks at ansible-playbook: has one of its processes grown?"""
    grow = "kept = bytearray(80_000_000); print(len(kept), flush=True); input()"
    argv = [sys.executable, "-ISc", grow, str(tmp_path)]
    with (
        Recorder(["gpu1"], tmp_path, nothing, ()) as recorder,
        subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child,
    ):
        assert child.stdout is not None and child.stdout.readline() == b"80000000\n"
        for limit, ends in ((500_000_000, False), (50_000_000, True)):
            monkeypatch.setattr(provisioning, "_MOST_MEMORY", limit)
            interrupt = provisioning._Interrupt(tmp_path, recorder)
            assert (interrupt.must_end_now(), interrupt.flooded) == (ends, ends)
        child.kill()
