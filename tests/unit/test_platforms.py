"""configs/platforms.yml: read whole, refused by key and value, and the one place of its facts."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tunesmith.core.errors import UsageError
from tunesmith.hosts import platforms
from tunesmith.hosts.platforms import data_disks, load_platforms, platform_of
from tunesmith.hosts.probe.script import ProbeSettings, script, with_places

pytestmark = pytest.mark.unit


def test_the_order_of_looking_is_that_of_the_file() -> None:
    raw = yaml.safe_load(platforms.FILE.read_text(encoding="utf-8"))
    assert data_disks() == tuple(disk for value in raw.values() for disk in value["disks"])
    assert {"/root/autodl-tmp", "/workspace", "/data"} <= set(data_disks())
    head = f"TUNESMITH_PROBE_DISKS='{' '.join(data_disks())}'\n"
    assert head in script(["places"], ProbeSettings())
    assert head in with_places("")


@pytest.mark.parametrize(
    ("disk", "name"),
    [("/root/autodl-tmp", "autodl"), ("/workspace", "runpod"), ("/data", "other"), ("/x", "other")],
)
def test_a_platform_is_known_by_its_disk(disk: str, name: str) -> None:
    assert platform_of(load_platforms(platforms.FILE), disk).name == name


@pytest.mark.parametrize("disk", ["data", "/a b", "/$(id)", "/a;b", "/", "/a/", ""])
def test_a_disk_that_is_no_plain_path_is_refused(tmp_path: Path, disk: str) -> None:
    raw = yaml.safe_load(platforms.FILE.read_text(encoding="utf-8"))
    raw["runpod"]["disks"] = [disk]
    file = tmp_path / "platforms.yml"
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    with pytest.raises(UsageError, match=r"`runpod\.disks`") as refused:
        load_platforms(file)
    assert repr(disk) in refused.value.message
