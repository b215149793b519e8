"""The sums behind benchmarks/cold.py and end_to_end.py: what weighs what, what is the same."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from packaging.tags import Tag

from benchmarks.cold import lock_bytes
from benchmarks.end_to_end import STAGES, Way, agree, differing, losses_of
from benchmarks.harness import CommandFailed

TAGS = [
    Tag("cp310", "cp310", "manylinux_2_28_x86_64"),
    Tag("cp310", "cp310", "manylinux_2_17_x86_64"),
    Tag("py3", "none", "any"),
]


def wheel(tag: str, size: int) -> dict[str, object]:
    return {"url": f"https://files.invalid/ab/one-1.0-{tag}.whl", "size": size}


def test_a_package_weighs_what_its_best_wheel_does() -> None:
    wheels = [
        wheel("py3-none-any", 5),
        wheel("cp310-cp310-manylinux_2_17_x86_64", 7),
        wheel("cp310-cp310-manylinux_2_28_aarch64", 900),
        wheel("cp310-cp310-manylinux2014_x86_64.manylinux_2_28_x86_64", 11),
        wheel("cp311-cp311-manylinux_2_28_x86_64", 1000),
    ]
    sdist = {"url": "https://files.invalid/one-1.0.tar.gz", "size": 13}
    package = {"name": "one", "wheels": wheels, "sdist": sdist}
    assert lock_bytes({"packages": [package, {"name": "two", "sdist": sdist}]}, TAGS) == 11 + 13
    foreign = {"name": "three", "wheels": [wheel("cp310-cp310-win_amd64", 1)]}
    with pytest.raises(CommandFailed, match="three"):
        lock_bytes({"packages": [foreign]}, TAGS)


def model(folder: Path, shape: list[int], fill: bytes) -> Path:
    folder.mkdir()
    size = 2 * shape[0] * shape[1]
    header = {"a.weight": {"dtype": "BF16", "shape": shape, "data_offsets": [0, size]}}
    text = json.dumps(header | {"__metadata__": {}}).encode()
    content = struct.pack("<Q", len(text)) + text + fill * size
    (folder / "model.safetensors").write_bytes(content)
    return folder


def test_two_results_are_the_same_by_their_bytes_or_by_their_losses(tmp_path: Path) -> None:
    one = Way(merged=model(tmp_path / "one", [2, 3], b"a"), losses=(2.0, 1.0))
    same = Way(merged=model(tmp_path / "same", [2, 3], b"a"))
    near = Way(merged=model(tmp_path / "near", [2, 3], b"b"), losses=(2.01, 1.0))
    far = Way(merged=near.merged, losses=(2.0, 1.02))
    short = Way(merged=near.merged, losses=(2.0,))
    other = Way(merged=model(tmp_path / "other", [3, 2], b"a"), losses=(2.0, 1.0))
    assert agree(one, same) == "the merged weights have the same sha256"
    assert "within 0.50%" in agree(one, near)
    for wrong, why in ((far, "differ by 2"), (short, "2 steps against 1"), (other, "shapes")):
        with pytest.raises(CommandFailed, match=why):
            agree(one, wrong)


def test_a_way_counts_its_stages_in_their_order() -> None:
    way = Way()
    for name, stage, seconds in (
        ("add", "", 1),
        ("provision", STAGES[0], 10),
        ("fetch", STAGES[1], 2),
        ("train", STAGES[2], 3),
        ("wait", "", 4),
        ("pull", STAGES[3], 5),
    ):
        way.step(name, stage, seconds)
    assert way.wall == 25
    assert way.stages() == [[0, 0], [11, 1], [13, 2], [16, 3], [25, 4]]


def test_losses_are_those_of_the_steps_alone() -> None:
    log = '{"current_steps": 1, "loss": 3.5}\n{"current_steps": 1, "eval_loss": 3.0}\n'
    assert losses_of(log + '{"current_steps": 2, "loss": 3}\n') == [3.5, 3.0]
    events = '{"event": "log", "loss": 3.5}\n{"event": "eval", "loss": 9}\n{"event": "x"}\n'
    assert losses_of(events) == [3.5]


def weights(file: Path, *bits: int) -> Path:
    header = {"a": {"dtype": "BF16", "shape": [len(bits)], "data_offsets": [0, 2 * len(bits)]}}
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + struct.pack(f"<{len(bits)}H", *bits))
    return file


def test_a_last_place_here_and_there_is_told_and_more_is_refused(tmp_path: Path) -> None:
    many = [0x3F80] * 20_000
    one = weights(tmp_path / "one", 0x0000, 0x8001, *many)
    assert differing(one, one).startswith("0 of 20,002")
    # From zero to the smallest, past the sign too.
    near = weights(tmp_path / "near", 0x8001, 0x8001, *many)
    assert differing(one, near).startswith("1 of 20,002")
    far = weights(tmp_path / "far", 0x0001, 0x0001, *many)
    with pytest.raises(CommandFailed, match="2 last places"):
        differing(one, far)
    often = weights(tmp_path / "often", 0x0001, 0x8002, *[0x3F81] * 4, *many[4:])
    with pytest.raises(CommandFailed, match="6 of 20002"):
        differing(one, often)
