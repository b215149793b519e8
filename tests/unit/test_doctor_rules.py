"""Recorded probes and what they must be judged as: a new case is two files in probes/."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.probes.recorded import FOLDER, facts_of, parse
from tunesmith.core.mirrors import load_mirror
from tunesmith.doctor.facts import Facts
from tunesmith.doctor.rules import decide, judge
from tunesmith.doctor.verdicts import Verdict
from tunesmith.project import Project

pytestmark = pytest.mark.unit

NOW = 1795600000.0
ENVIRONMENT = "/root/autodl-tmp/tunesmith/envs/llama-factory"
CASES = sorted(FOLDER.glob("*.txt"))


def verdicts_of(project: Project, facts: Facts, requested: str | None = None) -> list[Verdict]:
    mirror = load_mirror("default", project.root / "configs/mirrors")
    decision = decide(facts, project.stack, requested)
    return list(judge(facts, project.stack, mirror, NOW, decision))


def find(verdicts: Sequence[Verdict], what: str) -> Verdict:
    return next(verdict for verdict in verdicts if verdict.what == what)


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_recorded(project: Project, case: Path) -> None:
    expected: dict[str, Any] = yaml.safe_load(case.with_suffix(".yml").read_text("utf-8"))
    facts = parse(case.read_text(encoding="utf-8"))
    decision = decide(facts, project.stack)
    assert decision.flavour == expected["flavour"]
    assert decision.self_test == expected["self_test"]
    assert decision.fallback == expected["fallback"]
    verdicts = verdicts_of(project, facts)
    told = [f"{v.level} {v.what}" for v in verdicts if v.level != "pass"]
    assert told == expected["verdicts"]
    printed = "\n".join(f"{v.text}\n{v.fix}" for v in verdicts)
    for part in expected["says"]:
        assert part in printed
    assert verdicts[-1].what == "decision"
    for verdict in verdicts:
        assert verdict.level not in ("warning", "critical") or verdict.fix, verdict


def test_every_recording_has_its_verdicts() -> None:
    assert len(CASES) >= 14
    assert {f.stem for f in FOLDER.glob("*.yml")} == {f.stem for f in CASES}


# (record, text, replacement, what, level, part of the line)
POINTS = [
    ("autodl", "arch=x86_64", "arch=aarch64", "system", "critical", "the locks are for x86_64"),
    ("autodl", "libc=glibc 2.35", "libc=glibc 2.27", "system", "critical", "need glibc 2.28"),
    ("autodl", "libc=glibc 2.35", "libc=glibc 2.28", "system", "pass", "glibc 2.28"),
    ("autodl", "libc=glibc 2.35", "libc=musl", "system", "critical", "need glibc 2.28"),
    ("autodl", "libc=glibc 2.35", "libc=", "system", "unknown", "unknown libc"),
    ("vm", "pid1=systemd", "pid1=tini", "kind", "info", "a VM or machine"),
    ("autodl", "container=overlay", "container=", "kind", "info", "a container without systemd"),
    ("vm", "sudo=yes", "sudo=no", "rights", "warning", "sudo asks for a password; not there"),
    ("vm", "programs=flock tar gzip apt-get", "programs=flock gzip", "rights", "critical", "tar"),
    ("vm", "sudo=yes", "sudo=absent", "rights", "warning", "no sudo; not there: rsync, gcc"),
    ("autodl", "cpu.thousandths=16000", "cpu.thousandths=", "cpu", "pass", "128 cores"),
    ("autodl", "cpu.thousandths=16000", "cpu.thousandths=1000", "cpu", "pass", "1 core by"),
    ("autodl", "cpu.thousandths=16000", "cpu.thousandths=900", "cpu", "warning", "0.9 cores"),
    ("vm", "cpu.count=16", "cpu.count=", "cpu", "unknown", "cannot be read"),
    ("vm", "memory.total=123456784", "memory.total=", "memory", "unknown", "cannot be read"),
    ("vm", "memory.limit=", "memory.limit=3900000000", "memory", "warning", "by cgroup v2"),
    ("vm", "memory.limit=", "memory.limit=4100000000", "memory", "pass", "4.1 GB by cgroup v2"),
    ("autodl", "writable=yes", "writable=no", "data disk", "critical", "cannot write there"),
    # KiB: 11.1 GB are needed, 20 GB are comfortable.
    ("autodl", "52411392 26214400", "10839843 26214400", "data disk", "critical", "needs 11.1 GB"),
    ("autodl", "52411392 26214400", "10839844 26214400", "data disk", "warning", "left for models"),
    ("autodl", "52411392 26214400", "19531250 26214400", "data disk", "pass", "20.0 GB free"),
    ("autodl", "26214400 26214021", "204800 149999", "inodes", "critical", "149,999 of 204,800"),
    ("autodl", "26214400 26214021", "204800 150000", "inodes", "pass", "150,000 of 204,800"),
    ("autodl", "63963136 63963136", "65536 65536", "shared memory", "warning", "67.1 MB"),
    ("autodl", "end=1.38", "end=1.38", "shared memory", "pass", "65.5 GB in /dev/shm"),
    ("autodl", "24564 MiB, 1 MiB,", "24564 MiB, 953 MiB,", "gpu use", "pass", "nobody; 999.3 MB"),
    ("autodl", "24564 MiB, 1 MiB,", "24564 MiB, 1200 MiB,", "gpu use", "warning", "cannot be seen"),
    ("autodl", "24564 MiB, 1 MiB,", "[N/A], [N/A],", "gpu use", "unknown", "does not tell"),
    ("no_gpu", "gid=0", "other_accelerator=AMD", "gpu", "critical", "one of AMD"),
    ("no_gpu", "nvidia_smi=/usr/bin/nvidia-smi", "nvidia_smi=", "gpu", "warning", "gives no GPU"),
    ("autodl", "nvcc=12.4", "nvcc=11.8", "toolkit", "info", "not of CUDA 12.8"),
    ("autodl", "epoch=1795600000", "epoch=1795600030", "clock", "pass", "within 30 s"),
    ("autodl", "epoch=1795600000", "epoch=1795600031", "clock", "warning", "31 s ahead"),
    ("autodl", "epoch=1795600000", "epoch=1795599700", "clock", "warning", "5 min 00 s behind"),
    ("autodl", "epoch=1795600000", "epoch=1795599699", "clock", "critical", "5 min 01 s behind"),
    ("vm", "no_proxy=10.0.0.0/8", "no_proxy=localhost, 127.0.0.1", "proxy", "info", "no_proxy="),
    ("vm", "no_proxy=10.0.0.0/8", "no_proxy=*", "proxy", "info", "no_proxy=*"),
    ("vm", "no_proxy=10.0.0.0/8", "no_proxy=localhost", "proxy", "warning", "lacks 127.0.0.1"),
    ("autodl", "1 pypi ok 200", "1 pypi tls -", "PyPI index", "critical", "not trust"),
    ("autodl", "4 hf ok 200", "4 hf timeout -", "Hugging Face", "warning", "no address"),
    ("autodl", "2 conda ok 200", "2 conda no_tool -", "conda channel", "unknown", ""),
    ("vm", "3 miniforge ok 200", "3 miniforge http 503", "Miniforge", "critical", "503"),
    ("vm", "python=3.11.2", "python=3.7.9", "python", "critical", "Ansible needs 3.8"),
    ("vm", "python=3.11.2", "python=3.8.10", "python", "pass", "3.8.10"),
    ("vm", "python=3.11.2 /usr/bin/python3\n", "", "python", "critical", "none: Ansible"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "old", "new", "what", "level", "part"), POINTS)
def test_a_point(
    project: Project, record: str, old: str, new: str, what: str, level: str, part: str
) -> None:
    found = find(verdicts_of(project, facts_of(record, (old, new))), what)
    assert (found.level, part in found.text) == (level, True), found


def test_the_system_disk_counts_too(project: Project) -> None:
    record = "disk=31457280 23068672 1572864 1401293 /|/"
    some = facts_of("autodl", (record, record.replace("23068672", "900000")))
    assert find(verdicts_of(project, some), "system disk").level == "warning"
    none = facts_of("autodl", (record, record.replace("23068672", "90000")))
    assert find(verdicts_of(project, none), "system disk").level == "critical"


def test_a_container_without_a_data_disk_is_warned(project: Project) -> None:
    facts = facts_of("vm", ("container=", "container=dockerenv"))
    told = [v.level for v in verdicts_of(project, facts) if v.what == "data disk"]
    assert told == ["pass", "warning"]
    assert [v.level for v in verdicts_of(project, facts_of("vm")) if v.what == "data disk"] == [
        "pass"
    ]


def test_an_installed_host_needs_less(project: Project) -> None:
    there = ("end=1.38\n", f"environment={ENVIRONMENT}\t{{}}\nend=1.38\n")
    small = ("52411392 26214400 26214021", "5000000 204800 61204")
    dead = ("1 pypi ok 200", "1 pypi refused -")
    verdicts = verdicts_of(project, facts_of("autodl", there, small, dead))
    assert [find(verdicts, what).level for what in ("data disk", "inodes", "PyPI index")] == [
        "pass",
        "pass",
        "warning",
    ]
    assert find(verdicts, "environment").text == f"{ENVIRONMENT} is there, from an earlier run"
    half = facts_of("autodl", (there[0], there[1].replace("{}", "")), small)
    levels = {v.what: v.level for v in verdicts_of(project, half)}
    assert (levels["data disk"], levels["inodes"], levels["environment"]) == (
        "critical",
        "critical",
        "info",
    )


def test_a_refused_flavour_is_critical_and_ends_it(project: Project) -> None:
    verdicts = verdicts_of(project, facts_of("blackwell"), "cu126")
    assert verdicts[-1].level == "critical"
    assert verdicts[-1].fix == "leave --flavour out: cu128 runs here"


def test_what_is_installed_stays_without_a_gpu_and_after_a_failed_self_test(
    project: Project,
) -> None:
    marker = '{"flavour": "cu126", "refused": "torch on L40", "lock_sha256": "' + "0" * 64 + '"}'
    there = ("end=1.38\n", f"environment={ENVIRONMENT}\t{marker}\nend=1.38\n")
    bare = (there[0], there[1].replace("torch on L40", ""))
    assert decide(facts_of("no_gpu", bare), project.stack).flavour == "cu126"
    assert decide(facts_of("no_gpu", bare), project.stack, "cu128").flavour == "cu128"
    tested = decide(facts_of("autodl", there), project.stack)
    assert (tested.flavour, tested.fallback) == ("cu126", None)
    assert tested.why == "cu128 failed its self-test on this host"
    assert decide(facts_of("autodl", bare), project.stack).flavour == "cu128"
    broken = (there[0], f"environment={ENVIRONMENT}\t{{half\nend=1.38\n")
    assert decide(facts_of("autodl", broken), project.stack).flavour == "cu128"


def test_a_quick_login_is_no_verdict(project: Project) -> None:
    quick = facts_of("vm", ("bashrc_seconds=4.00", "bashrc_seconds=2.00"))
    assert "login" not in [v.what for v in verdicts_of(project, quick)]
    none = facts_of("vm", ("bashrc_seconds=4.00\n", ""))
    assert "login" not in [v.what for v in verdicts_of(project, none)]


def test_an_unknown_authority_has_its_own_fix(project: Project) -> None:
    tls = facts_of("autodl", ("1 pypi ok 200", "1 pypi tls -"))
    assert "`ca_bundle`" in find(verdicts_of(project, tls), "PyPI index").fix
    dns = facts_of("autodl", ("1 pypi ok 200", "1 pypi dns -"))
    assert "another mirror with --mirror" in find(verdicts_of(project, dns), "PyPI index").fix


def test_miniforge_matters_only_without_conda(project: Project) -> None:
    dead = ("3 miniforge ok 200", "3 miniforge dns -")
    whats = [v.what for v in verdicts_of(project, facts_of("autodl", dead))]
    assert "Miniforge" not in whats
    assert find(verdicts_of(project, facts_of("vm", dead)), "Miniforge").level == "critical"
