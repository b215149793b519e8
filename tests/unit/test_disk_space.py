"""One check of free space, with one message and a hint of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.core import disk
from tunesmith.core.errors import UsageError


def test_a_folder_that_is_to_be_made_lies_where_its_parent_does(tmp_path: Path) -> None:
    assert disk.nearest(tmp_path / "not" / "yet") == tmp_path
    disk.require(tmp_path / "not" / "yet", 1, "a letter", hint="free space there")


def test_a_lack_is_named_with_both_figures_and_the_callers_hint(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        disk.require(tmp_path, 10**18, "a whole web", hint="buy disks", detail=["two parts"])
    assert caught.value.message.startswith(f"{tmp_path}: ")
    assert caught.value.message.endswith(" free, a whole web needs 1000000.0 TB")
    assert (caught.value.hint, caught.value.detail) == ("buy disks", ("two parts",))


def test_another_machines_disk_is_judged_by_what_it_said() -> None:
    disk.require("gpu1:/data", 5, "a file", free=5, hint="")
    with pytest.raises(UsageError, match="gpu1:/data: 4 B free, a file needs 5 B"):
        disk.require("gpu1:/data", 5, "a file", free=4, hint="")
