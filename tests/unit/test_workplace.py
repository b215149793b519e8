"""The current folder of a run's workers: new, closed to others, and put away at the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.core import isolated
from tunesmith.job.run.folder import RunFolder
from tunesmith.job.supervisor import workplace

pytestmark = pytest.mark.unit


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = tmp_path / "runs" / "a run [1]"
    folder.mkdir(parents=True)
    return RunFolder(folder)


def left(run: RunFolder) -> list[Path]:
    return sorted(run.path.glob(f"{workplace.LEFT}*"))


def test_it_is_new_closed_and_not_in_the_run(run: RunFolder) -> None:
    (run.path / ".git").mkdir()
    with workplace.of(run) as before:
        pass
    with workplace.of(run) as place:
        assert place != before
        assert list(place.iterdir()) == []
        # Nor below it: git and others look in the folders above, too.
        assert run.path not in (place, *place.parents)
        assert place.stat().st_mode & 0o077 == 0
        assert place.parent.stat().st_mode & 0o077 == 0
    assert not place.exists()
    assert left(run) == []


def test_what_a_library_leaves_there_is_the_runs(run: RunFolder) -> None:
    for number in (1, 2):
        with workplace.of(run) as place:
            (place / "swanlog").mkdir()
            (place / "swanlog" / "kept").write_text(str(number))
    found = [(folder / "swanlog" / "kept").read_text() for folder in left(run)]
    assert sorted(found) == ["1", "2"]


def test_what_a_killed_supervisor_left_is_put_away(run: RunFolder) -> None:
    killed = workplace.of(run)
    (killed.__enter__() / "wandb").write_text("1")
    neighbour = RunFolder(run.path.with_name(f"{run.run_id} and more"))
    neighbour.path.mkdir()
    with workplace.of(neighbour) as place:
        (place / "wandb").write_text("2")
        with workplace.of(run):
            assert place.exists(), "that of another run stays"
    assert [(folder / "wandb").read_text() for folder in left(run)] == ["1"]
    assert [(folder / "wandb").read_text() for folder in left(neighbour)] == ["2"]


def test_a_link_in_the_run_leads_nothing_away(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr("time.strftime", lambda _: "now")
    (run.path / f"{workplace.LEFT}now").symlink_to(elsewhere)
    with workplace.of(run) as place:
        (place / "kept").write_text("1")
    assert list(elsewhere.iterdir()) == []
    assert (run.path / f"{workplace.LEFT}now-1" / "kept").read_text() == "1"


def test_a_disk_that_takes_no_folder_does_not_stop_the_work(run: RunFolder) -> None:
    (run.path.parent / ".work").write_text("a file in the way")
    with workplace.of(run) as place:
        assert place == Path(isolated.NOWHERE)
    assert Path(isolated.NOWHERE).is_dir()


def test_a_relative_output_dir_is_below_the_run(run: RunFolder) -> None:
    absolute = run.path / "saves" / "x"
    assert run.settled({"output_dir": "saves/x", "seed": 1}) == {
        "output_dir": str(absolute),
        "seed": 1,
    }
    assert run.settled({"output_dir": "/mine"}) == {"output_dir": "/mine"}
    assert run.settled({"seed": 1}) == {"seed": 1}
