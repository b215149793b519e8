"""host.check from end to end, with a stand-in for ssh that runs the command here."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.unit.probes.recorded import facts_of
from tunesmith.cli import host_check as cli_host_check
from tunesmith.cli.host_check import host_check
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.mirrors import Mirror, load_mirror
from tunesmith.doctor.check import Checked, addresses, check, settings_of
from tunesmith.doctor.flavours import Decision
from tunesmith.doctor.verdicts import Verdict
from tunesmith.hosts.probe.script import script
from tunesmith.project import Project

pytestmark = pytest.mark.unit

SSH = """\
#!/bin/sh
# Stand-in for ssh: the last word is the command; the host is this machine.
for command in "$@"; do :; done
echo 1 >>{log}
[ -z "$BEFORE" ] || $BEFORE
exec env -i HOME={home} PATH={path} sh -c "$command"
"""


@pytest.fixture
def mirror(project: Project) -> Mirror:
    return load_mirror("default", project.root / "configs/mirrors")


@pytest.fixture
def host(tmp_path: Path, project: Project, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host gpu1 in an inventory of its own, and a mirror file where nothing answers."""
    inventory, programs = tmp_path / "inventory", tmp_path / "bin"
    inventory.mkdir()
    programs.mkdir()
    (tmp_path / "home").mkdir()
    hosts = {"gpu1": {"host_address": "root@127.0.0.1:42151", "host_added": "2026-11-25T10:00:00"}}
    (inventory / "hosts.yml").write_text(yaml.dump({"gpu_hosts": {"hosts": hosts}}))
    (inventory / "ssh_config").write_text("Host gpu1\n  HostName 127.0.0.1\n")
    path = f"{programs}:/usr/sbin:/usr/bin:/sbin:/bin"
    ssh = tmp_path / "ssh/ssh"
    ssh.parent.mkdir()
    ssh.write_text(SSH.format(log=tmp_path / "calls", home=tmp_path / "home", path=path))
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ssh.parent}:/usr/bin:/bin")
    monkeypatch.setenv("TUNESMITH_INVENTORY", str(inventory))
    keys = ("hf_endpoints", "pypi_indexes", "conda_channels", "miniforge_urls")
    closed: dict[str, list[str]] = {key: ["http://127.0.0.1:9"] for key in keys}
    (tmp_path / "m.yml").write_text(yaml.dump(closed | {"apt": [], "docker_registries": []}))
    return tmp_path


def program(host: Path, name: str, text: str) -> None:
    (host / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
    (host / "bin" / name).chmod(0o755)


def test_one_call_and_a_decision(host: Path, project: Project) -> None:
    program(host, "nvidia-smi", "echo '580.65.06, 8.9, 24564 MiB, 1 MiB, NVIDIA L40'")
    checked = check(project, "gpu1", str(host / "m.yml"))
    assert (host / "calls").read_text() == "1\n", "one ssh exec"
    assert checked.decision.flavour == "cu128"
    levels = {v.what: v.level for v in checked.verdicts}
    assert (levels["gpu"], levels["clock"]) == ("pass", "pass")
    assert (levels["PyPI index"], levels["conda channel"]) == ("critical", "critical")
    assert checked.exit_code == 1
    assert json.loads(json.dumps(checked.to_json()))["decision"]["flavour"] == "cu128"


def test_a_clock_an_hour_off(host: Path, project: Project) -> None:
    program(host, "date", f"echo {int(time.time()) - 3600}")
    checked = check(project, "gpu1", str(host / "m.yml"))
    (clock,) = (v for v in checked.verdicts if v.what == "clock")
    assert clock.level == "critical"
    assert "behind this machine's" in clock.text
    assert clock.text.startswith(("59 min 5", "1 h 00 min"))


def test_a_slow_connection_is_no_wrong_clock(
    host: Path, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEFORE", "sleep 2")
    program(host, "date", f"echo {int(time.time()) + 2}")
    checked = check(project, "gpu1", str(host / "m.yml"))
    (clock,) = (v for v in checked.verdicts if v.what == "clock")
    assert clock.text == "within 1.0 s of this machine's"


def test_a_wrong_word_is_refused_before_anything_is_asked(host: Path, project: Project) -> None:
    mirror = str(host / "m.yml")
    for name, chosen, flavour, part in (
        ("gpu2", mirror, None, "gpu2"),
        ("gpu1", "nowhere", None, "unknown mirror 'nowhere'"),
        ("gpu1", mirror, "cu99", "flavour 'cu99'"),
    ):
        with pytest.raises(UsageError, match=part):
            check(project, name, chosen, flavour)
    with pytest.raises(UsageError, match="one host at a time"):
        host_check(project.root, "gpu1,gpu2", mirror=mirror, flavour="", as_json=False)
    assert not (host / "calls").exists()


def test_an_answer_that_is_none_names_the_host(host: Path, project: Project) -> None:
    program(host, "date", "kill -9 $PPID")
    with pytest.raises(TunesmithError, match="gpu1: its answer to the probe is truncated"):
        check(project, "gpu1", str(host / "m.yml"))


def checked_as(mirror: Mirror, *verdicts: Verdict) -> Checked:
    decision = Decision("cu128", "because")
    return Checked("gpu1", mirror.name, facts_of("autodl"), verdicts, decision)


def test_the_printed_page_and_the_exit_code(
    project: Project,
    mirror: Mirror,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = checked_as(
        mirror,
        Verdict("pass", "cpu", "16 cores"),
        Verdict("critical", "clock", "an hour off [red]", "set it"),
    )
    monkeypatch.setattr(cli_host_check, "check", lambda *_: bad)
    with pytest.raises(TunesmithError, match=r"gpu1 is not fit: 1 critical verdict$") as caught:
        host_check(project.root, "gpu1", mirror="default", flavour="", as_json=False)
    assert caught.value.exit_code == 1
    assert capsys.readouterr().out.splitlines() == [
        "pass      cpu            16 cores",
        "critical  clock          an hour off [red]",
        "                         -> set it",
    ]
    with pytest.raises(TunesmithError):
        host_check(project.root, "gpu1", mirror="default", flavour="", as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert (told["host"], told["exit_code"], told["facts"]["resources"]["cgroup"]) == (
        "gpu1",
        1,
        "v1",
    )
    assert told["verdicts"][1]["fix"] == "set it"
    good = replace(bad, verdicts=(Verdict("unknown", "gpu use", "not told"),))
    monkeypatch.setattr(cli_host_check, "check", lambda *_: good)
    host_check(project.root, "gpu1", mirror="default", flavour="", as_json=False)


def test_what_is_tried_is_what_provision_fetches(project: Project, mirror: Mirror) -> None:
    version = project.stack.conda.version
    tried = dict(addresses(mirror, project.stack))
    assert tried["pypi"] == "https://pypi.org/simple/llamafactory/"
    assert tried["conda"] == "https://conda.anaconda.org/conda-forge/linux-64/repodata.json"
    assert tried["miniforge"].endswith(f"/{version}/Miniforge3-{version}-Linux-x86_64.sh")
    assert "docker" not in tried, "an image's, not a host's"


def test_a_hostile_mirror_cannot_write_the_script(project: Project, mirror: Mirror) -> None:
    evil = replace(mirror, hf_endpoints=("https://x.example/$(touch /x)';touch /y;'",))
    lines = script(["mirrors"], settings_of(evil, project.stack)).splitlines()
    (head,) = (line for line in lines if line.startswith("TUNESMITH_PROBE_URLS='"))
    assert """$(touch/x)'"'"';touch/y;'"'"'/""" in head


def test_a_missing_authority_file_is_named(project: Project, mirror: Mirror) -> None:
    lost = replace(mirror, ca_bundle=Path("/nowhere/ca.pem"))
    with pytest.raises(UsageError, match=r"`ca_bundle`: /nowhere/ca\.pem: No such file"):
        settings_of(lost, project.stack)
