"""Seals of a run that was pulled: the host's, and those of what was made with it here."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from tests.unit.finished_run import flip, write
from tests.unit.test_pull_parts import Host, host, merge_here
from tunesmith.core.errors import UsageError
from tunesmith.job.run import seals
from tunesmith.job.run.manifest import PARTS

__all__ = ["host"]
pytestmark = pytest.mark.unit

WEIGHTS = "merged/model.safetensors"
HERE = "merged/model-00001-of-00002.safetensors"


@pytest.fixture
def sealed(host: Host) -> Host:
    """The host's run with seals of every result."""
    seals.seal(host.there / "r", "train", (*seals.FOLDERS, "proof.json"))
    return host


def merge_and_seal(folder: object) -> None:
    seals.forget(folder, ("merged", "proof.json"))  # type: ignore[arg-type]
    merge_here(folder)  # type: ignore[arg-type]
    seals.seal(folder, "merge", ("merged",))  # type: ignore[arg-type]


def test_seals_come_with_the_results(sealed: Host) -> None:
    folder = sealed.pull("r", PARTS)
    assert seals.check(folder, seals.FOLDERS).unsealed == ()
    flip(folder / WEIGHTS, quietly=True)
    with pytest.raises(UsageError, match=r"`inv pull --on gpu1 --run r --what merged`"):
        seals.check(folder, ("merged",))
    sealed.pull("r", ["merged"])
    seals.check(folder, seals.FOLDERS)


def test_what_a_pull_leaves_on_the_host_is_not_missed(host: Host) -> None:
    (host.there / "r/output/training_args.bin").write_bytes(b"a pickle")
    seals.seal(host.there / "r", "train", (*seals.FOLDERS, "proof.json"))
    folder = host.pull("r", PARTS)
    assert not (folder / "output/training_args.bin").exists()
    seals.check(folder, seals.FOLDERS)


def test_a_result_that_is_not_the_sealed_one_is_not_taken(sealed: Host) -> None:
    sealed.pull("r", ["adapter"])
    flip(sealed.there / "r" / WEIGHTS)
    with pytest.raises(UsageError, match="changed since it was made: expected sha256"):
        sealed.pull("r", PARTS)
    assert not (sealed._project.runs / "r" / WEIGHTS).exists()


def test_what_was_merged_here_keeps_its_seal_over_a_pull(sealed: Host) -> None:
    folder = sealed.pull("r", ["adapter"])
    merge_and_seal(folder)
    sealed.write("output/adapter_model.safetensors", "trained more")
    seals.seal(sealed.there / "r", "train", ("output",))
    sealed.pull("r", ["adapter"])
    assert seals.check(folder, seals.FOLDERS).unsealed == ()
    assert HERE in seals.read(folder) and WEIGHTS not in seals.read(folder)
    flip(folder / HERE)
    with pytest.raises(UsageError, match=r"`inv merge --run r` makes it anew"):
        seals.check(folder, ("merged",))
    # The host's takes its place, and so do the host's seals.
    sealed.pull("r", ["merged"])
    assert seals.check(folder, seals.FOLDERS).unsealed == ()
    assert WEIGHTS in seals.read(folder) and HERE not in seals.read(folder)


def test_a_part_that_stays_keeps_the_seals_it_came_with(sealed: Host) -> None:
    folder = sealed.pull("r", ["merged"])
    sealed.write(WEIGHTS, "merged anew there")
    seals.seal(sealed.there / "r", "merge", ("merged",))
    sealed.pull("r", ["adapter"])
    assert seals.check(folder, seals.FOLDERS).unsealed == ()
    sealed.pull("r", ["merged"])
    assert seals.check(folder, seals.FOLDERS).unsealed == ()


def test_damaged_seals_are_mended_by_a_pull(sealed: Host) -> None:
    folder = sealed.pull("r", ["adapter"])
    write(folder / seals.SEALS, "{")
    with pytest.raises(UsageError, match=r"`inv pull --on gpu1 --run r` brings it again"):
        seals.check(folder, ("output",))
    sealed.pull("r", ["adapter"])
    seals.check(folder, ("output",))


@pytest.mark.parametrize(
    "files",
    [
        {"proof.json": {}},
        {"proof.json": {"size": "1", "sha256": "a" * 64, "phase": "proof"}},
        {"proof.json": {"size": 1, "sha256": "a\u001b]52;" + "a" * 58, "phase": "proof"}},
        {"proof.json": {"size": 1, "sha256": "a" * 64, "phase": "\u001b[2J"}},
        {"output/\u001b[2J": {"size": 1, "sha256": "a" * 64, "phase": "train"}},
        {"proof.json": ["size"]},
        ["proof.json"],
    ],
)
def test_seals_of_a_host_that_are_none_are_refused(sealed: Host, files: Any) -> None:
    folder = sealed.pull("r", ["adapter"])
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    write(folder / seals.SEALS, json.dumps({"version": 1, "sha256": digest, "files": files}))
    with pytest.raises(UsageError, match=r"seals\.json: damaged") as caught:
        seals.check(folder, ("proof.json", "output"))
    assert caught.value.message.isprintable()
