"""A fact stands in one place: what code, scripts and playbooks need of it they read there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tunesmith.core.names import ENVIRONMENT_MARKER
from tunesmith.hosts.platforms import data_disks
from tunesmith.job.services.manager import PORTS
from tunesmith.stack.definition import load_stack

pytestmark = pytest.mark.contract

KINDS = {".py", ".sh", ".yml", ".yaml", ".j2", ".cfg", ".toml"}
# Names that mean more than a rented disk: the image's mount, a folder of ours, LLaMA-Factory's.
# A role's default, for who uses it without the playbook.
HUGGINGFACE = {
    f"ansible/roles/huggingface/{file}.yml" for file in ("defaults/main", "meta/argument_specs")
}
COMMON = {"/workspace", "/data"}


def lines(root: Path) -> list[tuple[str, str]]:
    """Return (file, line) of all that is run or configured, comments left out."""
    found = []
    for top in ("src", "ansible", "configs", "docker"):
        for file in sorted((root / top).rglob("*")):
            if file.is_file() and (file.suffix in KINDS or file.name == "Dockerfile"):
                text = file.read_text(encoding="utf-8")
                name = file.relative_to(root).as_posix()
                found += [(name, line.partition("#")[0]) for line in text.splitlines()]
    return found


def test_the_data_disks_stand_in_platforms_yml_alone(root: Path) -> None:
    named: dict[str, set[str]] = {}
    for disk in data_disks():
        whole = re.compile(rf"(?<![\w./$}}~-]){re.escape(disk)}(?![\w/.-])")
        for file, line in lines(root):
            if whole.search(line):
                named.setdefault(file, set()).add(disk)
    # The common names alone are no list of disks; beside each other they are one.
    lists = {file for file, disks in named.items() if disks - COMMON or len(disks) > 1}
    lists -= {"docker/Dockerfile"} if named.get("docker/Dockerfile") == COMMON else set()
    assert lists == {"configs/platforms.yml"}


def test_names_that_many_agree_on_stand_in_one_file_each(root: Path) -> None:
    """An image's Dockerfile can read no Python: its marker is compared here."""
    stack = load_stack(root / "configs/stack.yml")
    for name, places in (
        (ENVIRONMENT_MARKER, {"src/tunesmith/core/names.py", "docker/Dockerfile"}),
        ("Hugging-Face", {"src/tunesmith/hosts/probe/places.sh", *HUGGINGFACE}),
        (stack.environment_name, {"configs/stack.yml", "docker/Dockerfile"}),
    ):
        whole = re.compile(rf"(?<![\w@]){re.escape(name)}(?![\w-])")
        assert {file for file, line in lines(root) if whole.search(line)} == places, name


def test_the_ports_of_services_are_numbers_in_one_module(root: Path) -> None:
    """Docker Compose can read no Python: its ports are compared."""
    number = re.compile(rf"(?<![\w.])({'|'.join(map(str, PORTS.values()))})(?![\w.])")
    places = {
        file
        for file, line in lines(root)
        # What fits into a text or an answer is a number of 8000, too, and no port.
        if number.search(line) and file.endswith(".py") and "Text(" not in line
    }
    # The image's verbs name two of them to people.
    assert places <= {
        "src/tunesmith/job/services/manager.py",
        "src/tunesmith/cli/container_services.py",
    }
    compose = (root / "docker/compose.yaml").read_text(encoding="utf-8")
    assert set(re.findall(r'ports: \["127\.0\.0\.1:(\d+):\1"\]', compose)) == {
        str(PORTS["webui"]),
        str(PORTS["api"]),
    }
    helped = (root / "src/tunesmith/cli/container_services.py").read_text(encoding="utf-8")
    assert set(number.findall(helped)) == {str(PORTS["webui"]), str(PORTS["api"])}
    assert len(number.findall(helped)) == 2
