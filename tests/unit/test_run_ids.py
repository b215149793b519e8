"""A run id is a plain name, wherever it comes from; nothing is made of another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tunesmith.cli import container as cli_container
from tunesmith.cli import listing, results, training
from tunesmith.cli.command import COMMAND
from tunesmith.core.errors import UsageError
from tunesmith.core.files import write_json
from tunesmith.hosts import agent as asked_of
from tunesmith.job.run.folder import RunFolder
from tunesmith.job.run.replies import RunNamed, RunOrder
from tunesmith.job.run.run_id import RunId
from tunesmith.job.run.schema import RunRequest
from tunesmith.job.supervisor import agent
from tunesmith.plan import build
from tunesmith.plan.options import TrainOptions
from tunesmith.project import Project
from tunesmith.targets.host import HostTarget
from tunesmith.targets.local import LocalTarget

pytestmark = pytest.mark.unit

BAD: tuple[Any, ...] = (
    *(
        "exp/1",
        "../../esc",
        "..",
        ".",
        ".hidden",
        "-x",
        "",
        " ",
        "a b",
        "a\n",
        "\n",
        "a\0b",
        "/abs",
    ),
    *("ü", "a" * 81, "a" * 300, "$(touch x)", "`x`", "a\\b", "a;b", "~", "*", None, 7, ["a"]),
)
TEXTS = [text for text in BAD if isinstance(text, str) and text]


@pytest.mark.parametrize("text", BAD, ids=ascii)
def test_what_is_no_plain_name_is_refused(text: object) -> None:
    with pytest.raises(UsageError, match=r"run id .*: expected 1 to 80 of A-Z a-z 0-9"):
        RunId(text)


@pytest.mark.parametrize("text", ["a", "exp1", "20260114-093005-x.y_z", "a" * 80, "9.-_"])
def test_a_plain_name_is_itself(text: str) -> None:
    assert RunId(text) == text


def test_a_new_id_is_one_however_long_the_config_s_name() -> None:
    for stem in ("x" * 300, "ü", "", "../../etc", "-", "a b"):
        assert RunId(build.new_run_id(stem))


@pytest.fixture
def home(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_a_training_is_refused_before_anything_is_written(
    root: Path, home: Path, text: str
) -> None:
    asked = TrainOptions(config=Path("configs/train/smollm2_135m_lora_sft.yaml"), run_id=text)
    before = sorted(path.name for path in root.iterdir())
    for dry in (True, False):
        with pytest.raises(UsageError, match="run id"):
            training.train(root, "local", asked, training.Choices(dry=dry))
    assert not home.exists()
    assert sorted(path.name for path in root.iterdir()) == before


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_every_verb_refuses_it(root: Path, home: Path, text: str) -> None:
    write_json(home / "runs/one/run.json", {"run_id": "one"})
    target = LocalTarget(Project.at(root))
    for verb in (
        lambda: training.attach(root, "local", text),
        lambda: listing.logs(root, "local", text, follow=False),
        lambda: training.stop(root, "local", text),
        lambda: training.resume(root, "local", text, dry=True),
        lambda: results.merge(root, "local", text, (), dry=True),
        lambda: listing.remove(root, "local", text, dry=False),
        lambda: results.report(root, "local", text, language="en"),
        lambda: target.location(text),
        lambda: target.exists(text),
        lambda: agent.find(home / "runs", text),
        lambda: agent.create(home / "runs", RunOrder(RunRequest(), text)),
    ):
        with pytest.raises(UsageError, match="run id"):
            verb()
    assert [path.name for path in (home / "runs").iterdir()] == ["one"]


@pytest.mark.parametrize("text", BAD, ids=ascii)
def test_one_of_a_host_is_refused(monkeypatch: pytest.MonkeyPatch, text: object) -> None:
    target = HostTarget.__new__(HostTarget)
    target._remote = None  # type: ignore[assignment]
    monkeypatch.setattr(asked_of, "call", lambda *_, **__: RunNamed(text))
    with pytest.raises(UsageError, match="run id"):
        target.find(None)


def test_a_run_json_belongs_to_its_folder(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "one")
    write_json(run.request_file, {"run_id": "two"})
    with pytest.raises(UsageError, match="it is run 'two', in the folder of run one"):
        run.request()


def test_the_image_refuses_it_too(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(COMMAND, "docker run ... IMAGE")
    write_json(home / "runs/one/run.json", {"run_id": "one"})
    assert cli_container.main(["logs", "--run", "../../esc"]) == UsageError.exit_code
    assert "run id '../../esc'" in capsys.readouterr().err
