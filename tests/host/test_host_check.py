"""`inv host.check` tells what is wrong with a host, for every illness a replica can have."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from replica.replica import MIRROR, Replica, mirror_content
from replica_fixtures import HostProject

pytestmark = pytest.mark.host

GIB = 1 << 30
# Sparse: what is not written takes no room on this machine.
DISK_BYTES, DISK_INODES = 30 * GIB, 152_000
NOBODY = "http://127.0.0.1:9"


@dataclass(frozen=True)
class Doctor:
    """A host that was added, and the look at it."""

    project: HostProject
    replica: Replica
    name: str

    def look(self, mirror: Path | None = None, *words: str) -> Report:
        """Run `inv host.check --json`."""
        source = ("--mirror", str(mirror or self.project.mirror))
        done = self.project.inv("host.check", "--on", self.name, "--json", *source, *words)
        report = json.loads(done.stdout)
        assert done.returncode == report["exit_code"], done.stderr
        return Report(done.returncode, report)


@dataclass(frozen=True)
class Report:
    """The exit code and the JSON of one look."""

    code: int
    json: dict[str, Any]

    def verdict(self, what: str) -> dict[str, str]:
        """Return the one verdict about something."""
        (found,) = [v for v in self.json["verdicts"] if v["what"] == what]
        return found

    def level(self, what: str) -> str:
        return self.verdict(what)["level"]

    def critical(self) -> list[str]:
        """Return what is critical, beside the decision that follows from it."""
        verdicts = self.json["verdicts"]
        return [v["what"] for v in verdicts if v["level"] == "critical" and v["what"] != "decision"]

    @property
    def flavour(self) -> str | None:
        return self.json["decision"]["flavour"]


def doctor_of(project: HostProject, replica: Replica, name: str) -> Doctor:
    added = project.inv("host.add", name, replica.address, "--identity", str(project.key))
    assert added.returncode == 0, added.stderr
    return Doctor(project, replica, name)


@pytest.fixture(scope="module")
def gpu1(host_project: HostProject, autodl: Replica) -> Iterator[Doctor]:
    doctor = doctor_of(host_project, autodl, "gpu1")
    yield doctor
    assert host_project.inv("host.remove", "gpu1").returncode == 0


@pytest.fixture
def small(host_project: HostProject, new_replica: Callable[..., Replica]) -> Iterator[Doctor]:
    """A host with 2 GiB of memory and a data disk of a size of its own."""
    replica = new_replica(
        kind="autodl", gpu="ok", memory="2g", disk_bytes=DISK_BYTES, disk_inodes=DISK_INODES
    )
    yield doctor_of(host_project, replica, "small")
    assert host_project.inv("host.remove", "small").returncode == 0


# GPU mode: level of the verdict `gpu`, words in it or its fix, the flavour, self-test.
GPUS = {
    "ok": ("pass", "RTX 4090", "cu128", False),
    "blackwell": ("pass", "RTX 5090", "cu128", False),
    "mixed": ("pass", "V100", "cu128", False),
    "middle_driver": ("pass", "535.161.08", "cu128", True),
    "pascal": ("pass", "Tesla P40", "cu126", True),
    "no_gpu": ("warning", "No devices were found", "cu128", False),
    "absent": ("warning", "there is no nvidia-smi", "cu128", False),
    "no_driver": ("warning", "couldn't communicate", "cu128", False),
    "old_driver": ("critical", "525", None, False),
    "blackwell_old_driver": ("critical", "570", None, False),
    "nvml_error": ("critical", "Driver/library version mismatch", None, False),
}


@pytest.mark.parametrize("mode", GPUS)
def test_the_gpu_decides(gpu1: Doctor, mode: str) -> None:
    level, words, flavour, self_test = GPUS[mode]
    gpu1.replica.set_mode(mode)
    found = gpu1.look()
    gpu = found.verdict("gpu")
    assert gpu["level"] == level
    assert words in f"{gpu['text']} {gpu['fix']}"
    assert found.flavour == flavour
    assert found.json["decision"]["self_test"] == self_test
    assert found.critical() == (["gpu"] if level == "critical" else [])
    if level == "critical":
        assert "rental console" in gpu["fix"], "what to do"


def test_a_gpu_that_another_uses_is_told(gpu1: Doctor) -> None:
    gpu1.replica.set_mode("busy")
    found = gpu1.look()
    assert found.level("gpu use") == "warning"
    assert "4242" in found.verdict("gpu use")["text"]


def test_a_flavour_that_was_asked_for_is_refused_not_replaced(gpu1: Doctor) -> None:
    gpu1.replica.set_mode("blackwell")
    found = gpu1.look(None, "--flavour", "cu126")
    assert (found.code, found.flavour) == (1, None)
    assert "cu128 runs here" in found.verdict("decision")["fix"]


def test_lines_for_people_end_in_the_decision(gpu1: Doctor) -> None:
    gpu1.replica.set_mode("no_gpu")
    words = ("host.check", "--on", "gpu1", "--mirror", str(gpu1.project.mirror))
    done = gpu1.project.inv(*words)
    assert done.returncode == 0, done.stdout
    # On a slow machine a line says meanwhile that it is at work.
    lines = [line for line in done.stdout.splitlines() if not line.startswith("gpu1: checking")]
    verdicts = [line for line in lines if not line.startswith(" ")]
    levels = {line.split()[0] for line in verdicts}
    assert levels <= {"pass", "info", "warning", "critical", "unknown"}
    assert "cu128" in verdicts[-1]
    assert verdicts[-1].split()[1] == "decision"
    # AutoDL's traps, told without being used.
    for trap in ("/etc/network_turbo", "plain http", "mirrors.tuna.tsinghua.edu.cn"):
        assert trap in done.stdout
    assert "/root/autodl-tmp" in done.stdout
    unknown = gpu1.project.inv("host.check", "--on", "gpu1", "--mirror", "nowhere")
    assert unknown.returncode == 2


def test_it_changes_nothing(gpu1: Doctor) -> None:
    # Of /tmp itself only the time changes: what the probe kept there is gone again.
    left_out = "-path '/proc*' -o -path '/sys*' -o -path '/run*' -o -path '/var/log*' -o -path /tmp"
    found = f"find / -xdev ! \\( {left_out} \\); find /root/autodl-tmp -maxdepth 3"
    tree = f"({found}) | LC_ALL=C sort | xargs -d '\\n' stat -c '%n %Y %s %a'"
    before = gpu1.replica.sh(tree)
    gpu1.look()
    assert gpu1.replica.sh(tree) == before


def test_disk_memory_and_clock(small: Doctor) -> None:
    replica = small.replica
    found = small.look()
    assert found.critical() == []
    assert found.level("data disk") in ("pass", "warning")
    assert found.level("inodes") == "pass"
    assert found.level("clock") == "pass"
    # 2 GiB, as in a rental console's mode without a GPU.
    assert found.level("memory") == "warning"
    assert "not to train" in found.verdict("memory")["text"]

    replica.fill_disk(free=GIB)
    found = small.look()
    assert found.critical() == ["data disk"]
    assert (found.code, found.level("decision")) == (1, "critical")
    assert "data disk" in found.verdict("decision")["fix"]
    replica.free_disk()

    replica.use_inodes(left=100_000)
    found = small.look()
    assert found.critical() == ["inodes"]
    assert "100,000" in found.verdict("inodes")["text"]
    replica.free_disk()

    for skew, word in ((3600, "ahead of"), (-3600, "behind")):
        replica.set_clock(skew)
        replica.cut_ssh()  # a kept connection has the clock of before
        found = small.look()
        assert "clock" in found.critical()
        text = found.verdict("clock")["text"]
        assert re.match(r"(1 h 00 min|59 min \d\d s) ", text), text
        assert word in text
    replica.set_clock(0)
    replica.cut_ssh()
    assert small.look().critical() == []


def test_half_a_mirror(gpu1: Doctor, tmp_path: Path) -> None:
    source = tmp_path / "half.yml"

    def mirror(**changes: object) -> Path:
        source.write_text(yaml.safe_dump(mirror_content(**changes)))
        return source

    whole = gpu1.look()
    assert [whole.level(what) for what in ("PyPI index", "conda channel")] == ["pass", "pass"]

    # The first choice is dead, the second works: slower, and nothing stops.
    found = gpu1.look(mirror(pypi_indexes=[f"{NOBODY}/simple", "https://pypi.org/simple"]))
    assert found.level("PyPI index") == "warning"
    assert "refuses the connection" in found.verdict("PyPI index")["text"]
    assert found.critical() == []

    # The second is dead.
    channels = [f"{MIRROR}/conda-forge", f"{MIRROR}/gone"]
    found = gpu1.look(mirror(conda_channels=channels))
    assert found.level("conda channel") == "info"
    assert "answers 404" in found.verdict("conda channel")["text"]

    # One kind of source is ill, the others are well.
    for fault, words in (("503", "answers 503"), ("stall", "does not answer")):
        gpu1.replica.set_mirror(f"/conda-forge {fault}")
        found = gpu1.look()
        assert found.critical() == ["conda channel"], fault
        assert words in found.verdict("conda channel")["text"]
        assert found.level("PyPI index") == "pass"
    gpu1.replica.set_mirror()


def test_a_certificate_authority_of_ones_own(gpu1: Doctor, tmp_path: Path) -> None:
    # One that signed nothing of what the mirror is.
    other = tmp_path / "other.pem"
    made = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=other -keyout /dev/null"
    other.write_text(gpu1.replica.sh(f"{made} 2>/dev/null"))
    source = tmp_path / "strange.yml"
    source.write_text(yaml.safe_dump(mirror_content(ca_bundle=str(other))))
    found = gpu1.look(source)
    assert "PyPI index" in found.critical()
    assert "does not trust" in found.verdict("PyPI index")["text"]
    assert "ca_bundle" in found.verdict("PyPI index")["fix"]


def test_a_virtual_machine_without_conda(host_project: HostProject, vm: Replica) -> None:
    doctor = doctor_of(host_project, vm, "vm1")
    found = doctor.look()
    assert found.critical() == []
    assert "sudo without a password" in found.verdict("rights")["text"]
    assert "Miniforge" in found.verdict("conda")["text"]
    assert found.level("Miniforge") == "pass"
    assert "/data" in found.verdict("data disk")["text"]
    assert host_project.inv("host.remove", "vm1").returncode == 0
