"""Hostile archives: each is refused before a byte is written."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tunesmith.core import archive
from tunesmith.core.errors import TunesmithError, UsageError

pytestmark = pytest.mark.unit

Member = tuple[tarfile.TarInfo, bytes]


def _file(name: str, data: bytes = b"data") -> Member:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info, data


def _special(name: str, kind: bytes, target: str = "") -> Member:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def _tar(path: Path, *members: Member, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as out:  # type: ignore[call-overload]
        for info, data in members:
            out.addfile(info, io.BytesIO(data))
    return path


def _zip(path: Path, *members: tuple[zipfile.ZipInfo | str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for info, data in members:
            out.writestr(info, data)
    return path


def _zip_link(name: str, target: bytes) -> tuple[zipfile.ZipInfo, bytes]:
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o120777 << 16
    return info, target


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "deep" / "out").mkdir(parents=True)
    return tmp_path / "deep" / "out"


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_a_good_tar_is_unpacked(tmp_path: Path, out: Path, mode: str) -> None:
    folder = _special("m", tarfile.DIRTYPE)
    path = _tar(tmp_path / "a", folder, _file("m/config.json"), _file("./m/b/c", b"c"), mode=mode)
    archive.extract(path, out)
    assert (out / "m/config.json").read_bytes() == b"data"
    assert (out / "m/b/c").read_bytes() == b"c"
    assert archive.is_archive(path)


def test_a_good_zip_is_unpacked(tmp_path: Path, out: Path) -> None:
    path = _zip(tmp_path / "a.zip", ("m/", b""), ("m/config.json", b"data"))
    archive.extract(path, out)
    assert (out / "m/config.json").read_bytes() == b"data"


HOSTILE_TARS = [
    ([_file("/etc/evil")], "absolute"),
    ([_file("../evil")], "leads out"),
    ([_file("a/../../evil")], "leads out"),
    ([_special("evil", tarfile.SYMTYPE, "/etc"), _file("evil/passwd")], "is a link"),
    ([_file("a"), _special("evil", tarfile.LNKTYPE, "a")], "is a link"),
    ([_special("evil", tarfile.CHRTYPE)], "device"),
    ([_special("evil", tarfile.FIFOTYPE)], "device"),
    ([_file("evil"), _file("evil")], "twice"),
    ([_file("evil"), _file("./evil")], "twice"),
    ([_file("evil"), _file("evil/a")], "below a file"),
    ([_file("evil/a"), _file("evil")], "file and a folder"),
    ([_file("evil\\..\\a")], "not a plain name"),
    ([_file("evil\na")], "not a plain name"),
    ([_file("a\u202egpj.exe")], "not a plain name"),
    ([_file("x" * 256)], "a name that is too long"),
    ([_file(".")], "no name"),
    ([_special("evil", tarfile.DIRTYPE), _file("evil")], "twice"),
]


@pytest.mark.parametrize(("members", "fault"), HOSTILE_TARS)
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_hostile_tar_is_refused(
    tmp_path: Path, out: Path, members: list[Member], fault: str, mode: str
) -> None:
    # The good file comes first: it must not be written either.
    path = _tar(tmp_path / "a.tar", _file("good"), *members, mode=mode)
    _refused(path, out, fault)


@pytest.mark.parametrize(
    ("members", "fault"),
    [
        ([("/evil", b"x")], "absolute"),
        ([("C:/evil", b"x")], "absolute"),
        ([("../evil", b"x")], "leads out"),
        ([_zip_link("evil", b"/etc/passwd")], "is a link"),
    ],
)
def test_a_hostile_zip_is_refused(
    tmp_path: Path, out: Path, members: list[tuple[zipfile.ZipInfo | str, bytes]], fault: str
) -> None:
    _refused(_zip(tmp_path / "a.zip", ("good", b"x"), *members), out, fault)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_with_a_name_twice_is_refused(tmp_path: Path, out: Path) -> None:
    _refused(_zip(tmp_path / "a.zip", ("a", b"x"), ("a", b"y")), out, "twice")


def test_an_encrypted_zip_is_refused(tmp_path: Path, out: Path) -> None:
    path = _zip(tmp_path / "a.zip", ("a", b"x"))
    data = bytearray(path.read_bytes())
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(magic) + offset] |= 1
    path.write_bytes(data)
    _refused(path, out, "encrypted")


def test_too_many_entries_are_refused(tmp_path: Path, out: Path) -> None:
    path = _tar(tmp_path / "a.tar", *(_file(f"f{n}") for n in range(5)))
    with pytest.raises(UsageError, match="more than 4 entries"):
        archive.extract(path, out, archive.UnpackLimits(entries=4))
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("pack", [_tar, _zip])
def test_a_bomb_is_refused(tmp_path: Path, out: Path, pack: Callable[..., Path]) -> None:
    zeros = bytes(1_000_001)
    member = _file("zeros", zeros) if pack is _tar else ("zeros", zeros)
    path = pack(tmp_path / "a", member)
    with pytest.raises(UsageError, match=r"more than 1\.0 MB"):
        archive.extract(path, out, archive.UnpackLimits(size=1_000_000))
    assert list(out.iterdir()) == []


def test_a_zip_that_lies_about_its_size_is_stopped(tmp_path: Path, out: Path) -> None:
    path = _zip(tmp_path / "a.zip", ("zeros", bytes(3_000_000)))
    real = (3_000_000).to_bytes(4, "little")
    data = path.read_bytes()
    assert data.count(real) == 2, "in the entry and in the directory"
    path.write_bytes(data.replace(real, (1000).to_bytes(4, "little")))
    with pytest.raises(TunesmithError):
        archive.extract(path, out, archive.UnpackLimits(size=2_000_000))
    assert sum(p.stat().st_size for p in out.iterdir()) <= 2_000_000


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_cut_archive_is_told_as_such(tmp_path: Path, out: Path, mode: str) -> None:
    path = _tar(
        tmp_path / "a", _file("a", b"first"), _file("b", bytes(range(256)) * 400), mode=mode
    )
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if mode == "w:gz" else data[:4000])
    with pytest.raises(TunesmithError, match="truncated or damaged"):
        archive.extract(path, out)


def test_what_is_no_archive_is_refused(tmp_path: Path, out: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("text")
    assert not archive.is_archive(path)
    with pytest.raises(UsageError, match=r"not a \.tar"):
        archive.extract(path, out)


def _refused(path: Path, out: Path, fault: str) -> None:
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(UsageError, match=fault) as caught:
        archive.extract(path, out)
    assert "nothing was unpacked" in caught.value.message
    assert sorted(path.parent.rglob("*")) == before
