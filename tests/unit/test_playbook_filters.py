"""The filters: what the probe printed, and the flavour that follows from it."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tunesmith.hosts.platforms import data_disks

pytestmark = pytest.mark.unit

L40 = "550.54.14, 8.9, NVIDIA L40"
NEW = "580.65.06, 8.9, NVIDIA L40"
PROGRAMS = ("flock", "gcc")
NONE = {"flavour": "", "lock_sha256": "", "refused": "", "self_test": ""}


def plugin(root: Path, name: str) -> ModuleType:
    path = root / "ansible" / "plugins" / "filter" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"filter_{name}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def facts_of(root: Path, *lines: str) -> dict[str, Any]:
    """Return what the filter makes of the probe's lines."""
    printed = "\n".join(["tunesmith_probe=2", *lines, "end=0.10"])
    return plugin(root, "host").host_facts(printed, "own", PROGRAMS)


@pytest.fixture
def stack(root: Path) -> dict[str, Any]:
    return yaml.safe_load((root / "configs/stack.yml").read_text(encoding="utf-8"))


def test_every_key_is_there_even_when_the_probe_says_nothing(root: Path) -> None:
    facts = facts_of(root)
    assert facts["environment"] == NONE
    assert facts["missing"] == ["flock", "gcc", "stdlib.h"]
    assert (facts["gpu"], facts["locked"], facts["conda"], facts["uid"]) == ([], [], "", None)


def test_values_may_have_what_separates_them(root: Path) -> None:
    lines = ["gpu=a = b, 8.9, x", "gpu=c", "toolkit=12.4 /usr/local/cuda", "locked=/a b", "uid=0"]
    facts = facts_of(root, *lines)
    assert facts["gpu"] == ["a = b, 8.9, x c"]
    assert facts["toolkit"] == {"12.4": "/usr/local/cuda"}
    assert (facts["locked"], facts["uid"]) == (["/a b"], 0)


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("base=/x/{{ lookup('pipe', 'touch canary') }}", "base"),
        ("conda=1 /opt/$(touch canary)/conda", "conda"),
        ("toolkit=1 relative", "toolkit"),
        ("environment=/x/$(touch canary)\t{}", "environment"),
        ("home=/root/../etc", "home"),
        ("login_file=relative/.profile", "login_file"),
        ("locked=/a`touch canary`", "locked"),
        ("arch=x86_64; touch canary", "arch"),
        (f"epoch={'9' * 5000}", "epoch"),
        ("uid=-1", "uid"),
        ("used_kib=NaN", "used_kib"),
        ("installed={% raw %}", "installed"),
        (f"digest={'0' * 64} /x\x1b]52;c;eA==\x07", "digest"),
        ('environment=/e\t{"flavour": ' + "[" * 5000 + "]" * 5000 + "}", "environment.marker"),
        ('environment=/e\t{"flavour": ' + "9" * 5000 + "}", "environment.marker"),
        ('environment=/e\t{"flavour": "{{ x }}"}', "environment.marker.flavour"),
    ],
)
def test_a_value_that_no_host_has_ends_the_play(root: Path, line: str, key: str) -> None:
    from ansible.errors import AnsibleFilterError

    with pytest.raises(
        AnsibleFilterError, match=rf"the host: its answer to the probe: {key}: "
    ) as told:
        facts_of(root, "uid=0", line)
    assert "\n" not in told.value.message
    assert len(told.value.message) < 400


@pytest.mark.parametrize("text", ["{", "[]", "null", '"x"', '{"flavour": "cu128"'])
def test_a_marker_that_is_damaged_counts_as_none(root: Path, text: str) -> None:
    lines = ("base=/d/tunesmith", f"environment=/d/tunesmith/envs/own\t{text}")
    assert facts_of(root, *lines)["environment"] == NONE


def test_a_marker_is_read(root: Path) -> None:
    marker = NONE | {"flavour": "cu126", "lock_sha256": "ab" * 32}
    text = json.dumps(marker | {"python": "3.10"})
    own, other = (f"environment=/d/tunesmith/envs/{name}\t{text}" for name in ("own", "other"))
    assert facts_of(root, "base=/d/tunesmith", own)["environment"] == marker
    assert facts_of(root, "base=/d/tunesmith", other)["environment"] == NONE


def test_an_answer_that_is_cut_off_ends_the_play(root: Path) -> None:
    from ansible.errors import AnsibleFilterError

    with pytest.raises(AnsibleFilterError, match="the host: its answer to the probe is truncated"):
        plugin(root, "host").host_facts("tunesmith_probe=2\nuid=0\n", "own", PROGRAMS)


def test_without_disks_those_of_the_platforms_are_looked_for(root: Path) -> None:
    text = plugin(root, "host").host_probe([], "", "own", PROGRAMS)
    assert f"TUNESMITH_PROBE_DISKS='{' '.join(data_disks())}'\n" in text
    for playbook in ("provision", "reset"):
        (play,) = yaml.safe_load((root / f"ansible/playbooks/{playbook}.yml").read_text("utf-8"))
        assert "preflight_data_disks" not in play["vars"]


def test_a_disk_that_is_no_word_ends_the_play(root: Path) -> None:
    from ansible.errors import AnsibleFilterError

    with pytest.raises(AnsibleFilterError, match=r"^disk '/my disk': expected no blanks"):
        plugin(root, "host").host_probe(["/my disk"], "", "own", PROGRAMS)


def test_gpu_and_driver_decide(root: Path, stack: dict[str, Any]) -> None:
    decision = plugin(root, "flavour").flavour_for([NEW], stack, NONE)
    assert (decision["flavour"], decision["tested_on"]) == ("cu128", NEW)
    assert decision["refused"] == ""


def test_without_a_gpu_what_is_there_stays(root: Path, stack: dict[str, Any]) -> None:
    flavour_for = plugin(root, "flavour").flavour_for
    there = NONE | {"flavour": "cu126"}
    assert flavour_for([], stack, there)["flavour"] == "cu126"
    assert flavour_for([], stack, there, "cu128")["flavour"] == "cu128"
    assert flavour_for([], stack, NONE | {"flavour": "cu000"})["flavour"] == "cu128"


@pytest.mark.parametrize(
    "line",
    [
        'Field "compute_cap" is not a valid field to query.',
        "Failed to initialize NVML: Driver/library version mismatch",
        "470.82.01, 8.0, NVIDIA A100",
    ],
)
def test_a_gpu_that_is_refused_is_refused_though_something_is_installed(
    root: Path, stack: dict[str, Any], line: str
) -> None:
    for flavour in stack["flavours"]:
        there = NONE | {"flavour": flavour}
        decision = plugin(root, "flavour").flavour_for([line], stack, there)
        assert decision["flavour"] is None
        assert decision["why"]


def test_a_flavour_that_failed_here_is_not_tried_again(root: Path, stack: dict[str, Any]) -> None:
    flavour_for = plugin(root, "flavour").flavour_for
    first = flavour_for([L40], stack, NONE)
    assert (first["flavour"], first["fallback"]) == ("cu128", "cu126")
    there = NONE | {"flavour": "cu126", "refused": first["refusal"]}
    again = flavour_for([L40], stack, there)
    assert (again["flavour"], again["fallback"]) == ("cu126", None)
    # The marker is written as it was: nothing changes from run to run.
    assert again["refused"] == first["refusal"]


def test_another_driver_or_torch_gets_its_chance(root: Path, stack: dict[str, Any]) -> None:
    flavour_for = plugin(root, "flavour").flavour_for
    there = NONE | {"refused": flavour_for([L40], stack, NONE)["refusal"]}
    other = L40.replace("550.54.14", "560.28.03")
    assert flavour_for([other], stack, there)["flavour"] == "cu128"
    stack["flavours"]["cu128"]["requirements"] = ["torch==2.8.1"]
    assert flavour_for([L40], stack, there)["flavour"] == "cu128"


def test_an_unknown_flavour_is_refused_in_one_line(root: Path, stack: dict[str, Any]) -> None:
    from ansible.errors import AnsibleFilterError

    with pytest.raises(AnsibleFilterError, match=r"^flavour 'cu99' is unknown; known are cu128"):
        plugin(root, "flavour").flavour_for([NEW], stack, NONE, "cu99")


def test_an_archive_is_the_same_bytes_for_the_same_files(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.json").write_text("b")
    (folder / "deep/a.json").write_text("a")
    file = tmp_path / "lock.txt"
    file.write_text("torch==1\n")
    pack = plugin(root, "host").as_archive
    sent = pack({"lock/x.txt": str(file), "data": str(folder)})
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode(sent))) as archive:
        assert archive.getnames() == ["data/b.json", "data/deep/a.json", "lock/x.txt"]
        assert archive.extractfile("lock/x.txt").read() == b"torch==1\n"  # type: ignore[union-attr]
    file.touch()
    assert pack({"data": str(folder), "lock/x.txt": str(file)}) == sent
