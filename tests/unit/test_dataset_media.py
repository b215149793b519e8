"""Pictures, films and sounds: there, whole to look at, and as many as the text asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith.core.errors import UsageError
from tunesmith.dataset.check import check_file
from tunesmith.dataset.entry import Entry
from tunesmith.dataset.media import MediaPlace
from tunesmith.dataset.report import DatasetReport
from tunesmith.plan.staging import stage_inputs

pytestmark = pytest.mark.unit

PNG, MP4, WAV = b"\x89PNG\r\n\x1a\n" + b"0" * 30, b"\0\0\0\x18ftypmp42", b"RIFF\0\0\0\0WAVEfmt "
COLUMNS = {"prompt": "instruction", "response": "output"}
ENTRY = Entry("d", columns={**COLUMNS, "images": "images"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for name, content in (
        ("pictures/a.png", PNG),
        ("b.png", PNG),
        ("empty.png", b""),
        ("page.png", b"<!DOCTYPE html><html>"),
        ("pointer.png", b"version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        ("odd.png", b"\x01\x02\x03\x04\x05\x06"),
        ("film.mp4", MP4),
        ("sound.wav", WAV),
    ):
        (tmp_path / name).write_bytes(content)
    return tmp_path


def checked(
    folder: Path,
    rows: list[Any],
    entry: Entry = ENTRY,
    template: str | None = "qwen2_vl",
    media: Path | None = None,
) -> DatasetReport:
    file = folder / "rows.json"
    file.write_text(json.dumps(rows))
    return check_file(file, entry, media=MediaPlace(media or folder, template))


def row(images: Any, question: str = "<image>What?", answer: str = "a") -> dict[str, Any]:
    return {"instruction": question, "output": answer, "images": images}


def test_what_is_there_is_found(folder: Path) -> None:
    two = row(["b.png", "pictures/a.png"], "<image><image>?")
    report = checked(folder, [row(["pictures/a.png"]), two, row([], "none?"), row(None, "none?")])
    assert not report.findings
    assert set(report.media) == {str(folder / "b.png"), str(folder / "pictures/a.png")}
    # One name alone is a list of one (data/converter.py).
    assert not checked(folder, [row("b.png")]).findings
    assert not checked(folder, [row(["a.png"])], media=folder / "pictures").findings


@pytest.mark.parametrize(
    ("images", "severity", "part"),
    [
        (["gone.png"], "error", "the picture gone.png does not exist"),
        (["pictures"], "error", "is a folder"),
        (["empty.png"], "error", "is empty"),
        (["page.png"], "error", "a page of a server"),
        (["pointer.png"], "error", "a pointer of Git LFS"),
        (["odd.png"], "warning", "begins as no picture"),
        ([7], "error", "a number (7)"),
        (["b.png", "b.png"], "error", "2 images and 1 <image>"),
        ([], "error", "0 images and 1 <image>"),
    ],
)
def test_what_is_wrong_is_told_with_its_row(
    folder: Path, images: Any, severity: str, part: str
) -> None:
    report = checked(folder, [row(["b.png"]), row(images)])
    (finding,) = report.findings
    assert (finding.severity, finding.row) == (severity, 2)
    assert part in finding.message
    assert finding.fix


def test_a_missing_file_is_told_once(folder: Path) -> None:
    report = checked(folder, [row(["gone.png"])] * 5)
    assert [f.row for f in report.errors] == [1]


def test_a_text_model_takes_none(folder: Path) -> None:
    report = checked(folder, [row(["b.png"]), row(["gone.png"])], template="qwen")
    (finding,) = report.errors
    assert "template qwen takes none" in finding.message
    films = Entry("d", columns={**COLUMNS, "videos": "films"})
    rows = [{"instruction": "<video>?", "output": "a", "films": ["film.mp4"]}]
    assert not checked(folder, rows, films).errors
    assert checked(folder, rows, films, "llava").errors
    # Without a config nobody knows the model.
    assert not checked(folder, [row(["b.png"])], template=None).findings


def test_sounds_frames_and_conversations(folder: Path) -> None:
    columns = {"messages": "conversations", "audios": "audios", "videos": "videos"}
    entry = Entry("d", formatting="sharegpt", columns=columns)
    said = [("system", "<audio> is no sign here"), ("human", "<audio><video>?"), ("gpt", "a")]
    rows = [
        {
            "conversations": [{"from": side, "value": text} for side, text in said],
            "audios": ["sound.wav"],
            "videos": [["b.png", "pictures/a.png"]],
        }
    ]
    assert not checked(folder, rows, entry, "qwen2_omni").findings
    rows[0]["videos"] = [["b.png", "gone.png"]]
    assert "gone.png does not" in checked(folder, rows, entry, "qwen2_omni").errors[0].message


def test_each_answer_of_a_pair_is_counted(folder: Path) -> None:
    columns = {"prompt": "instruction", "chosen": "c", "rejected": "r", "images": "images"}
    entry = Entry("d", columns=columns, other={"ranking": True})
    pair = {"instruction": "q", "c": "<image>", "r": "none", "images": ["b.png"]}
    (finding,) = checked(folder, [pair], entry).errors
    assert '1 images and 0 <image> in the texts with "r"' in finding.message


class Elsewhere:
    """A target on which paths are others."""

    name, shared = "gpu1", True

    def remote_path(self, run_id: str, name: str, path: Path) -> str:
        return f"/there/{run_id}/{name}"


def test_pictures_go_along_to_a_host(folder: Path) -> None:
    report = checked(folder, [row(["pictures/a.png"])])
    values: dict[str, object] = {"dataset_dir": str(folder)}
    target: Any = Elsewhere()
    sent = {item.name for item in stage_inputs(target, "r", values, [report]).inputs}
    assert "dataset_dir/pictures/a.png" in sent
    assert "dataset_dir/b.png" not in sent


def test_a_whole_path_is_none_on_a_host(folder: Path) -> None:
    report = checked(folder, [row([str(folder / "b.png")])])
    assert not report.errors
    target: Any = Elsewhere()
    with pytest.raises(UsageError, match="a path of this machine"):
        stage_inputs(target, "r", {"dataset_dir": str(folder)}, [report])
