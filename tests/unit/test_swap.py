"""A folder takes the place of another: killed at any step, one of them is there, whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.core import files, swap

pytestmark = pytest.mark.unit

KILLED = 9
# Every way in which a swap changes names or deletes.
STEPS = ((Path, "rename"), (Path, "unlink"), (Path, "replace"), (shutil, "rmtree"))


def make(folder: Path, text: str) -> Path:
    (folder / "sub").mkdir(parents=True)
    (folder / "sub/file").write_text(text)
    (folder / "of").write_text(text)
    return folder


def content(folder: Path) -> str:
    """Return what a folder holds; it must be whole."""
    texts = {(folder / name).read_text() for name in ("of", "sub/file")}
    assert len(texts) == 1
    return texts.pop()


def until_killed(step: int, act: Callable[[], object]) -> bool:
    """Do something in a child that ends, as by kill -9, before its step of this number.

    Returns whether it was killed; False: it was through before.
    """
    child = os.fork()
    if child == 0:
        left = [step]

        def counted(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    os._exit(KILLED)
                return original(*arguments, **options)

            return call

        try:
            for owner, name in (*STEPS, (swap, "_exchanged")):
                setattr(owner, name, counted(getattr(owner, name)))
            act()
        except BaseException:  # noqa: BLE001 - the child of a fork must not go on as pytest
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED)
    return code == KILLED


@pytest.fixture(params=["exchange", "journal"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways; not every file system has the first."""
    if request.param == "journal":
        monkeypatch.setattr(swap, "_exchanged", lambda *_: swap._CANNOT[0])
    monkeypatch.setattr(files, "_fsync", lambda *_: None)
    return str(request.param)


def test_killed_at_any_step_the_old_or_the_new_is_there(tmp_path: Path, way: str) -> None:
    seen: set[str] = set()
    step = 0
    while True:
        home = tmp_path / str(step)
        fresh, final = make(home / "incoming", "new"), make(home / "runs/r", "old")
        killed = until_killed(step, lambda: swap.put_in_place(fresh, final))  # noqa: B023
        if way == "exchange":
            content(final)  # without any recovery
        swap.recover(final.parent)
        seen.add(content(final))
        # Then as always: from what is left, or made again.
        if not fresh.exists():
            make(fresh, "newer")
        before = content(fresh)
        swap.put_in_place(fresh, final)
        assert content(final) == before
        # No more than that, a lock, and a journal that was never whole.
        names = {path.name for path in (home / "runs").iterdir() if path.is_dir()}
        assert names == {"r"}
        assert not list((home / "runs").glob("*.swap.json"))
        if not killed:
            break
        step += 1
    assert step >= 2
    assert seen == {"old", "new"}


def test_a_recovery_that_is_killed_is_taken_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swap, "_exchanged", lambda *_: swap._CANNOT[0])
    for first in range(1, 8):
        for second in range(4):
            home = tmp_path / f"{first}-{second}"
            fresh, final = make(home / "incoming", "new"), make(home / "runs/r", "old")
            until_killed(first, lambda: swap.put_in_place(fresh, final))  # noqa: B023
            until_killed(second, lambda: swap.recover(final.parent))  # noqa: B023
            swap.recover(final.parent)
            content(final)


@pytest.mark.parametrize("content", ["", "[]", "{}", "{", "\0" * 20])
def test_a_damaged_journal_leaves_the_old_one(tmp_path: Path, content: str) -> None:
    old = make(tmp_path / "runs" / ".r.swap.old", "old")
    (tmp_path / "runs" / ".r.swap.json").write_text(content)
    swap.recover(tmp_path / "runs")
    assert not old.exists()
    assert list(tmp_path.glob("runs/.*.json")) == []
    assert (tmp_path / "runs" / "r").is_dir()


def test_a_first_one_needs_no_swap_and_an_error_is_none_of_a_kind(tmp_path: Path) -> None:
    swap.put_in_place(make(tmp_path / "fresh", "new"), tmp_path / "runs/r")
    assert content(tmp_path / "runs/r") == "new"
    with pytest.raises(FileNotFoundError):
        swap.exchange(tmp_path / "none", tmp_path / "runs/r")


def test_this_machine_exchanges_in_one_step(tmp_path: Path) -> None:
    one, other = make(tmp_path / "one", "1"), make(tmp_path / "other", "2")
    assert swap.exchange(one, other)
    assert (content(one), content(other)) == ("2", "1")
