"""Wheels that are brought by pieces: nothing twice, nothing but what the index says."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hubserver import COMMIT, Hub
from tunesmith.stack import wheel_download
from tunesmith.stack.wheel_download import Broken, Wheel, bring, wheels

NAME = "big-1.0-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl"
CONTENT = os.urandom(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A server that can cut, stall and ignore ranges."""
    with Hub() as hub:
        hub.add("org/big", {NAME: CONTENT})
        yield hub


@pytest.fixture
def wheel(hub: Hub) -> Wheel:
    return Wheel("big", f"{hub.url}/org/big/resolve/{COMMIT}/{NAME}", SHA256)


def pylock(*entries: tuple[str, str]) -> str:
    """Write a lock as uv does: one wheel a line."""
    blocks = []
    for package, names in entries:
        files = ", ".join(
            f'{{ url = "https://files.invalid/{name}", upload-time = 2025-08-05T01:00:00Z, '
            f'size = 7, hashes = {{ sha256 = "{SHA256}" }} }}'
            for name in names.split()
        )
        blocks.append(f'[[packages]]\nname = "{package}"\nversion = "1.0"\nwheels = [{files}]\n')
    return 'lock-version = "1.0"\n\n' + "\n".join(blocks)


def test_the_best_wheel_that_every_host_can_load_is_taken() -> None:
    old, new = (f"two-1.0-cp310-cp310-manylinux_2_{n}_x86_64.whl" for n in (17, 28))
    newest = "two-1.0-cp310-cp310-manylinux_2_34_x86_64.whl"
    plain, stable = "a-1.0-py3-none-any.whl", "a-1.0-cp38-abi3-manylinux2014_x86_64.whl"
    later = "a-1.0-cp311-abi3-manylinux2014_x86_64.whl"
    foreign = "a-1.0-cp310-cp310-manylinux_2_28_aarch64.whl a-1.0-cp310-cp310-win_amd64.whl"
    musl = "a-1.0-cp310-cp310-musllinux_1_2_x86_64.whl"
    text = pylock(
        ("torch", "torch-2.8.0-cp310-cp310-manylinux_2_28_x86_64.whl torch-2.8.0-cp310-none-x.whl"),
        ("nvidia-b", f"{NAME} nvidia_b-1.0-py3-none-win_amd64.whl"),
        ("two", f"{new} {old} {newest}"),
        ("a", f"{plain} {later} {stable} {foreign} {musl}"),
        ("b", f"{plain} {later} {foreign} {musl}"),
    )
    assert [(w.package, w.name) for w in wheels(text)] == [
        ("torch", "torch-2.8.0-cp310-cp310-manylinux_2_28_x86_64.whl"),
        ("nvidia-b", NAME),
        ("two", new),
        ("a", stable),
        ("b", plain),
    ]
    with pytest.raises(Broken, match="c: no wheel"):
        list(wheels(pylock(("c", foreign))))


def test_what_was_cut_goes_on_where_it_ended(hub: Hub, wheel: Wheel, tmp_path: Path) -> None:
    hub.cut[NAME] = [1_000_000, 500_000]
    bring(tmp_path, wheel)
    assert (tmp_path / "big" / NAME).read_bytes() == CONTENT
    assert hub.sent[NAME] == len(CONTENT)
    assert f"#sha256={SHA256}" in (tmp_path / "big" / "index.html").read_text()
    # Unpacked into a cache, its file is gone: it is not fetched again.
    (tmp_path / "big" / NAME).unlink()
    bring(tmp_path, wheel)
    assert hub.sent[NAME] == len(CONTENT)


def test_a_kill_costs_no_byte(hub: Hub, wheel: Wheel, tmp_path: Path) -> None:
    lock = tmp_path / "pylock.toml"
    lock.write_text(pylock(("big", NAME)).replace("https://files.invalid/" + NAME, wheel.url))
    argv = [sys.executable, wheel_download.__file__, str(tmp_path / "wheels"), str(lock)]
    hub.stall[NAME] = [2_000_000]
    part = tmp_path / "wheels" / "big" / f"{NAME}.part"
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as killed:
        deadline = time.monotonic() + 120
        while not part.exists() or part.stat().st_size < 1_500_000:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        killed.send_signal(signal.SIGKILL)
    held = part.stat().st_size
    hub.stall.clear()
    before = hub.sent[NAME]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout == "big\n"
    assert hub.sent[NAME] - before == len(CONTENT) - held
    assert (tmp_path / "wheels" / "big" / NAME).read_bytes() == CONTENT
    # Once more after all has come, as when it was killed before the rename.
    (tmp_path / "wheels" / "big" / "index.html").unlink()
    (tmp_path / "wheels" / "big" / NAME).rename(part)
    assert subprocess.run(argv, capture_output=True, text=True, check=True).stdout == "big\n"


def test_a_server_without_ranges_sends_all_again(hub: Hub, wheel: Wheel, tmp_path: Path) -> None:
    hub.cut[NAME] = [1_000_000]
    hub.ignore_range = True
    bring(tmp_path, wheel)
    assert (tmp_path / "big" / NAME).read_bytes() == CONTENT


def test_another_content_is_never_kept(
    hub: Hub, wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheel_download, "_PAUSES", (0,))
    hub.flip[NAME] = 1
    bring(tmp_path / "once", wheel)
    assert (tmp_path / "once" / "big" / NAME).read_bytes() == CONTENT
    hub.flip[NAME] = 9
    with pytest.raises(Broken, match="another sha256"):
        bring(tmp_path / "ever", wheel)
    assert list((tmp_path / "ever" / "big").iterdir()) == []


def test_a_wheel_that_is_not_there_is_told(hub: Hub, tmp_path: Path) -> None:
    text = pylock(("gone", NAME)).replace("https://files.invalid/", f"{hub.url}/org/no/resolve/x/")
    lock = tmp_path / "pylock.toml"
    lock.write_text(text)
    code = f"import sys; sys.argv = ['x', {str(tmp_path)!r}, {str(lock)!r}]"
    code += "; from tunesmith.stack import wheel_download as w; w._PAUSES = (0,)"
    code += "; from pathlib import Path; sys.exit(w.main(*map(Path, sys.argv[1:])))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "404" in done.stderr
