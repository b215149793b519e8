"""How far an upload or a download is: rsync itself, through an `ssh` that stays on this machine."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support import lacking
from tunesmith.core.errors import TunesmithError
from tunesmith.hosts import transfer

pytestmark = pytest.mark.unit

SIZES = {"a.safetensors": 3_000_000, "b.safetensors": 2_000_000, "config.json": 10}
TOTAL = sum(SIZES.values())


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A host gpu1 that is this machine."""
    if shutil.which("rsync") is None:
        lacking("no rsync", "`apt-get install rsync`")
    script(tmp_path / "bin/ssh", 'while [ "$1" != gpu1 ]; do shift; done; shift; exec sh -c "$*"')
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    for name, size in SIZES.items():
        (tmp_path / "here").mkdir(exist_ok=True)
        (tmp_path / "here" / name).write_bytes(os.urandom(size))
    return SimpleNamespace(name="gpu1", config=tmp_path / "ssh_config", host=None)


def script(file: Path, body: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)


def upload(remote: Any, folder: Path) -> tuple[list[int], list[str]]:
    """Upload folder/here to folder/there; return the bytes told and the lines said."""
    told: list[int] = []
    said: list[str] = []

    def moved(done: int, total: int) -> None:
        assert total == TOTAL
        told.append(done)

    files = {name: folder / "here" / name for name in SIZES}
    transfer.upload(remote, files, str(folder / "there"), said.append, moved)
    for name, file in files.items():
        assert (folder / "there" / name).read_bytes() == file.read_bytes()
    return told, said


def test_an_upload_tells_how_far_it_is(remote: Any, tmp_path: Path) -> None:
    script(tmp_path / "bin/rsync", f'exec {shutil.which("rsync")} --bwlimit=2000 "$@"')
    told, _ = upload(remote, tmp_path)
    assert len(told) > 3
    assert told == sorted(set(told))
    assert told[-1] == TOTAL


def test_what_is_there_counts(remote: Any, tmp_path: Path) -> None:
    there = tmp_path / "there"
    (there / ".rsync-partial").mkdir(parents=True)
    shutil.copy2(tmp_path / "here/a.safetensors", there)
    half = (tmp_path / "here/b.safetensors").read_bytes()[:1_000_000]
    (there / ".rsync-partial/b.safetensors").write_bytes(half)
    told, _ = upload(remote, tmp_path)
    assert told[0] == SIZES["a.safetensors"]
    assert told[-1] == TOTAL
    # With nothing left to do, too.
    assert upload(remote, tmp_path)[0][-1] == TOTAL


def test_after_a_cut_it_does_not_go_back(
    remote: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    cut = f"{tmp_path}/cut"
    script(
        tmp_path / "bin/rsync",
        f'[ "$1" = --version ] || '
        f"[ -e {cut} ] || {{ touch {cut}; printf '\\r  4000000  79%%  1.00MB/s  0:00:01  \\r'; "
        f'echo "Connection reset by peer" >&2; exit 12; }}\nexec {shutil.which("rsync")} "$@"',
    )
    told, said = upload(remote, tmp_path)
    assert said == ["the connection was cut (Connection reset by peer); going on (attempt 1)"]
    assert told[0] == 4_000_000
    assert told == sorted(set(told))
    assert told[-1] == TOTAL


def test_a_download_tells_how_far_it_is(remote: Any, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    into = tmp_path / "incoming"
    into.mkdir()
    shutil.copy2(tmp_path / "here/b.safetensors", into)

    def moved(done: int, total: int) -> None:
        told.append((done, total))

    transfer.download(remote, str(tmp_path / "here"), SIZES, into, print, moved)
    assert told[-1] == (TOTAL, TOTAL)
    for name in SIZES:
        assert (into / name).read_bytes() == (tmp_path / "here" / name).read_bytes()


@pytest.mark.parametrize(
    ("version", "counts"),
    [
        ("rsync  version 3.2.7  protocol version 31\nCopyright", True),
        ("rsync  version v3.1.0  protocol version 31", True),
        ("rsync  version 3.0.9  protocol version 30", False),
        ("rsync  version 2.6.9  protocol version 29", False),
        ("openrsync: protocol version 29, rsync version 2.6.9 compatible", False),
        ("", False),
    ],
)
def test_which_rsync_can_count(version: str, counts: bool) -> None:
    assert transfer.counts(version) == counts


def test_an_rsync_that_cannot_count_moves_files_all_the_same(remote: Any, tmp_path: Path) -> None:
    """What macOS has refuses an option that it does not know."""
    old = (
        'case "$*" in --version) echo "rsync  version 2.6.9  protocol version 29"; exit ;; '
        '*--info=*) echo "rsync: --info: unknown option" >&2; exit 1 ;; esac\n'
        f'exec {shutil.which("rsync")} "$@"'
    )
    script(tmp_path / "bin/rsync", old)
    told, said = upload(remote, tmp_path)
    assert told == []
    assert said == []


def test_a_file_does_not_outgrow_what_was_agreed(
    remote: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The far end says a file's size, and then sends more."""
    there, here = tmp_path / "there", tmp_path / "into"
    there.mkdir()
    (there / "a").write_bytes(os.urandom(3_000_000))
    monkeypatch.setattr(transfer, "_GROWTH", 1_000_000)
    with pytest.raises(TunesmithError, match="gpu1 sent a file of more bytes than it had told"):
        transfer.download(remote, str(there), {"a": 1000}, here, lambda _: None)
    assert all(file.stat().st_size <= 1_001_000 for file in here.iterdir())
    transfer.download(remote, str(there), {"a": 3_000_000}, here, lambda _: None)
    assert (here / "a").read_bytes() == (there / "a").read_bytes()


def test_a_line_without_an_end_is_not_kept(remote: Any, tmp_path: Path) -> None:
    told: list[int] = []
    count = transfer._Count({"a": 10}, lambda done, _total: told.append(done))
    argv = ["sh", "-c", "head -c 30000000 /dev/zero | tr '\\0' x; printf '\\r 5 50%%\\r'"]
    assert transfer._run(argv, count, None) == (0, "")
    assert told == [5]
