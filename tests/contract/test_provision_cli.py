"""`inv provision` from the question to the summary: real Ansible, the real probe.

ssh is a stand-in that runs what it is given here, in a home of the host's own: the real one
needs a server, which tests/host has.
"""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from tests.unit.local_hosts import local_hosts
from tunesmith.cli import provisioning as cli_provision
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.progress import Display
from tunesmith.provision.events import Step
from tunesmith.stack import sources

pytestmark = pytest.mark.contract

SSH = """\
#!/bin/sh
while [ "$1" != -- ]; do name=$1; shift; done
shift
echo "$name" >>{folder}/asked
HOME={folder}/homes/$name
export HOME
if [ ! -d "$HOME" ]; then
    echo "ssh: connect to host 127.0.0.1 port 9: Connection refused" >&2
    exit 255
fi
exec sh -c "$*"
"""
PLAY = """\
- name: Provision
  hosts: gpu_hosts
  gather_facts: false
  vars:
    home: "{folder}/homes/{{{{ inventory_hostname }}}}"
    base: "{{{{ home }}}}/tunesmith"
  tasks:
    - name: Make the folder
      ansible.builtin.file: {{path: "{{{{ base }}}}/envs/llama-factory/bin", state: directory}}
    - name: Put a program into it
      ansible.builtin.copy:
        dest: "{{{{ base }}}}/envs/llama-factory/bin/x"
        content: x
        mode: "0700"
    - name: Refuse
      ansible.builtin.assert: {{that: not (broken | default(false)), fail_msg: "too old"}}
    - name: Say what is not trusted
      ansible.builtin.copy:
        content: "{{{{ distrusted[inventory_hostname] | default([]) | join(' ') }}}}"
        dest: "{{{{ home }}}}/distrusted"
    - name: Write the variables
      ansible.builtin.copy: {{content: "export A=1\\n", dest: "{{{{ base }}}}/env.sh"}}
    - name: Record
      ansible.builtin.command:
        argv: [/bin/sh, -s, --, "{{{{ base }}}}", "{{{{ state_fingerprint }}}}"]
        stdin: "{{{{ lookup('ansible.builtin.file', record_script) }}}}"
      environment: {{HOME: "{{{{ home }}}}"}}
      register: recorded
      changed_when: recorded.stdout == 'recorded'
"""
Run = Callable[..., str]


@pytest.fixture
def clone(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone with a small playbook, three hosts and an inventory of its own."""
    folder = tmp_path / "clone"
    for name in ("configs", "src/tunesmith"):
        shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / "pyproject.toml", folder)
    (folder / "ansible/playbooks").mkdir(parents=True)
    (folder / "ansible/ansible.cfg").write_text("[defaults]\n", encoding="utf-8")
    text = PLAY.format(folder=tmp_path)
    (folder / "ansible/playbooks/provision.yml").write_text(text, encoding="utf-8")
    local_hosts(root, tmp_path, ("gpu1", "gpu2", "gpu3"))
    for name in ("gpu1", "gpu2", "gpu3"):
        (tmp_path / "homes" / name).mkdir(parents=True)
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(SSH.format(folder=tmp_path), encoding="utf-8")
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ssh.parent}:/usr/bin:/bin")
    monkeypatch.setenv("TUNESMITH_INVENTORY", str(tmp_path / "inventory"))
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "home"))
    sources.app_tar.cache_clear()
    return folder


@pytest.fixture
def run(clone: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Provision and return what was printed."""

    def provision(on: str, **options: object) -> str:
        cli_provision.provision(clone, on, **options)  # type: ignore[arg-type]
        return capsys.readouterr().out

    return provision


def played(tmp_path: Path) -> int:
    return len(list((tmp_path / "home/provision").glob("2*")))


def test_provision_then_in_state_then_drift(run: Run, tmp_path: Path) -> None:
    out = run("gpu1")
    assert "gpu1: 1 thing to do\n  never provisioned" in out
    assert "\ngpu1: Write the variables: changed (" in out
    assert "Refuse" not in out, "what changes nothing takes no line"
    assert out.splitlines()[-3].split()[:3] == ["gpu1", "changed", "6"]
    assert "log: " in out

    out = run("gpu1")
    assert out.startswith(f"gpu1: in state ({tmp_path}/homes/gpu1/tunesmith, 0.")
    assert (len(out.splitlines()), played(tmp_path)) == (1, 1)

    # The whole playbook has nothing to change either.
    out = run("gpu1", full=True)
    assert "in state" in out
    assert out.splitlines()[-3].split()[:4] == ["gpu1", "nothing", "to", "change"]
    assert played(tmp_path) == 2

    (tmp_path / "homes/gpu1/tunesmith/env.sh").write_text("export A=2\n", encoding="utf-8")
    (tmp_path / "homes/gpu1/tunesmith/envs/llama-factory/bin/x").unlink()
    out = run("gpu1")
    assert "gpu1: 2 things to do\n  env.sh was edited\n" in out
    assert (tmp_path / "homes/gpu1/distrusted").read_text(encoding="utf-8") == "environment"
    assert played(tmp_path) == 3
    assert "1 thing to do\n  mirror: provisioned with default, now cn" in run("gpu1", mirror="cn")
    # --check asks Ansible even where nothing has drifted, and changes nothing.
    assert "nothing to change" in run("gpu1", mirror="cn", check=True)


def test_one_of_three_fails_and_the_summary_says_so(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inventory = tmp_path / "inventory/hosts.yml"
    hosts = yaml.safe_load(inventory.read_text(encoding="utf-8"))
    hosts["gpu_hosts"]["hosts"]["gpu2"]["broken"] = True
    inventory.write_text(yaml.safe_dump(hosts), encoding="utf-8")
    with pytest.raises(TunesmithError) as caught:
        run("gpu1,gpu2,gpu3")
    assert caught.value.exit_code == 1
    assert caught.value.message == "1 of 3 hosts failed: gpu2"
    assert caught.value.detail == ("gpu2: Refuse: too old",)
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert [row for row in rows if len(row) == 2 and row[0].startswith("gpu")][-3:] == [
        ["gpu1", "changed"],
        ["gpu2", "failed"],
        ["gpu3", "changed"],
    ]
    # The next time only the failed one is worked on.
    with pytest.raises(TunesmithError):
        run("gpu1,gpu2,gpu3")
    out = capsys.readouterr().out
    assert "gpu1: in state" in out
    assert "gpu3: in state" in out
    assert "gpu2: 1 thing to do" in out


def test_a_host_that_is_off_does_not_stop_the_others(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "homes/gpu2").rmdir()
    with pytest.raises(TunesmithError, match="1 of 2 hosts failed: gpu2") as caught:
        run("gpu1,gpu2", full=True)
    assert "gpu2: root@gpu2.example.com:22 is off" in caught.value.detail[0]
    out = capsys.readouterr().out
    assert "gpu2" in out and "not reached" in out
    assert played(tmp_path) == 1
    # Alone, it is the one line, and no playbook is begun.
    with pytest.raises(TunesmithError, match=r"^gpu2: root@gpu2.example.com:22 is off"):
        run("gpu2")
    assert played(tmp_path) == 1


def test_dry_asks_no_host_and_writes_nothing(run: Run, tmp_path: Path) -> None:
    out = run("gpu1", dry=True, token=True)
    assert "would bring gpu1 to app=" in out
    assert not (tmp_path / "asked").exists()
    assert not (tmp_path / "home").exists()


def test_misuse(run: Run) -> None:
    for on, told in [
        ("", "--on is empty"),
        ("local", "only a host can be provisioned"),
        ("gpu1,gpu9", "no host 'gpu9'"),
    ]:
        with pytest.raises(UsageError, match=told):
            run(on)


def test_a_token_comes_by_stdin(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clone: Path
) -> None:
    secret = "hf_abcdefgh12345678"
    kept = tmp_path / "kept"
    play = clone / "ansible/playbooks/provision.yml"
    task = (
        "    - name: Keep\n      no_log: true\n      ansible.builtin.copy:\n"
        f"        content: \"{{{{ lookup('ansible.builtin.file', hf_token_file) }}}}\"\n"
        f"        dest: {kept}\n"
    )
    play.write_text(play.read_text(encoding="utf-8") + task, encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{secret}\n"))
    out = run("gpu1", token=True)
    assert kept.read_text(encoding="utf-8") == secret
    assert secret not in out
    for text in ("", "two words", "hf_abc\nsecond line"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        with pytest.raises(UsageError, match="stdin holds no token") as caught:
            run("gpu1", token=True)
        assert not text or text not in caught.value.render()


def test_lines_in_a_pipe() -> None:
    now = [0.0]
    out = io.StringIO()
    with Display(Console(file=out, width=100), lambda: now[0]) as display:
        steps = cli_provision._Steps(display)
        steps.step(Step("gpu1", "conda: Create [x]", "started", 0.0, "1"))
        for now[0] in (1.4, 2.0, 11.9, 12.1):
            display.look()
        steps.step(Step("gpu1", "conda: Create [x]", "changed", 75.0, "1"))
        steps.step(Step("gpu1", "conda: Look", "started", 0.0, "2"))
        now[0] += 1.0
        steps.step(Step("gpu1", "conda: Look", "skipped", 0.0, "2"))
        now[0] += 100.0
        display.look()
    assert out.getvalue().splitlines() == [
        "gpu1: conda: Create [x]: 2.0 s",
        "gpu1: conda: Create [x]: 12 s",
        "gpu1: conda: Create [x]: changed (1 min 15 s)",
    ]


def test_rows_on_a_terminal() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, legacy_windows=False)
    with Display(console) as display:
        steps = cli_provision._Steps(display)
        for host in ("gpu1", "gpu2"):
            steps.step(Step(host, "conda: Create [x]", "started", 0.0, "1"))
        steps.step(Step("gpu1", "conda: Create [x]", "changed", 75.0, "1"))
        steps.step(Step("gpu2", "conda: Create [x]", "ok", 75.0, "1"))
    shown = out.getvalue()
    assert "gpu1: conda: Create [x]: changed (1 min 15 s)" in shown
    assert shown.count("changed") == 1
    assert "gpu2" in shown
