"""Checkpoints: only a sealed one counts, and nothing torn is ever resumed from."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from tunesmith.job.run import checkpoints

pytestmark = pytest.mark.unit

FILES = {
    "adapter_model.safetensors": 4000,
    "optimizer.pt": 8000,
    "scheduler.pt": 500,
    "rng_state.pth": 700,
    "trainer_state.json": 300,
}


def make(output: Path, step: int, *, sealed: bool = True) -> Path:
    folder = output / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    noise = random.Random(step)
    for name, size in FILES.items():
        (folder / name).write_bytes(noise.randbytes(size))
    if sealed:
        checkpoints.seal(folder)
    return folder


def test_newest_sealed_wins_by_step_not_by_time(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        make(tmp_path, step)
    # The clock jumped back an hour while the newest was written.
    os.utime(tmp_path / "checkpoint-100", (1, 1))
    newest, discarded = checkpoints.newest_valid(tmp_path)
    assert newest is not None
    assert (newest.step, discarded) == (100, [])
    assert checkpoints.rotate(tmp_path, 2, None) == [tmp_path / "checkpoint-5"]


def test_unsealed_is_set_aside_under_a_name_nobody_matches(tmp_path: Path) -> None:
    make(tmp_path, 5)
    make(tmp_path, 10, sealed=False)
    newest, discarded = checkpoints.newest_valid(tmp_path)
    assert newest is not None
    assert newest.step == 5
    assert discarded == [("checkpoint-10", "it was never finished (no manifest)")]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad-checkpoint-10", "checkpoint-5"]


def test_torn_writes_never_load(tmp_path: Path) -> None:
    """A power loss after the seal: 200 damages of every kind, each falls back one checkpoint."""
    chance = random.Random(0)
    made = tmp_path / "made"
    make(made, 5)
    make(made, 10)
    for case in range(200):
        output = tmp_path / str(case)
        shutil.copytree(made, output)
        victim = output / "checkpoint-10" / chance.choice([*FILES, checkpoints.MANIFEST])
        content = bytearray(victim.read_bytes())
        kind = chance.choice(["empty", "short", "zeros", "bit", "gone"])
        if kind == "gone":
            victim.unlink()
        elif kind == "empty":
            victim.write_bytes(b"")
        elif kind == "short":
            victim.write_bytes(content[: chance.randrange(len(content))])
        elif kind == "zeros":
            start = chance.randrange(len(content))
            victim.write_bytes(content[:start] + bytes(len(content) - start))
        else:
            # Of the manifest only digits of sizes and hashes carry meaning; take one of those.
            places = [i for i, byte in enumerate(content) if chr(byte) in "0123456789"]
            place = chance.choice(
                places if victim.name == checkpoints.MANIFEST else range(len(content))
            )
            content[place] ^= 1
            victim.write_bytes(content)
        newest, discarded = checkpoints.newest_valid(output)
        assert newest is not None, (case, kind, victim.name)
        assert newest.step == 5, (case, kind, victim.name)
        assert len(discarded) == 1


def test_rotation_keeps_the_best_and_counts_only_sealed(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        make(tmp_path, step)
    make(tmp_path, 5, sealed=False)
    gone = checkpoints.rotate(tmp_path, 2, tmp_path / "checkpoint-1")
    assert [p.name for p in gone] == ["checkpoint-2"]
    assert (tmp_path / "checkpoint-5").is_dir(), "one that is being written is nobody's to delete"


def test_a_manifest_of_another_step_does_not_count(tmp_path: Path) -> None:
    make(tmp_path, 5).rename(tmp_path / "checkpoint-6")
    assert checkpoints.newest_valid(tmp_path)[0] is None


def test_the_last_faulty_one_is_kept_for_a_look(tmp_path: Path) -> None:
    for _ in range(2):
        make(tmp_path, 10, sealed=False)
        assert checkpoints.newest_valid(tmp_path)[0] is None
    assert [p.name for p in tmp_path.iterdir()] == ["bad-checkpoint-10"]
