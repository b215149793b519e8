"""Checks before a run: the template of a known model, the disk, foreign output folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith import runs
from tunesmith.errors import UsageError
from tunesmith.files import write_json
from tunesmith.plan import Place
from tunesmith.project import Project

pytestmark = pytest.mark.unit

SMOL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def config_file(folder: Path, model: str, template: str) -> Path:
    file = folder / "x.yaml"
    file.write_text(
        f"model_name_or_path: {model}\nstage: sft\ndo_train: true\ndataset: d\n"
        f"template: {template}\n"
    )
    return file


def test_the_wrong_template_of_a_known_model_is_refused_with_the_right_one(
    project: Project, tmp_path: Path
) -> None:
    file = config_file(tmp_path, "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "qwen")
    with pytest.raises(UsageError, match="write `template: deepseekr1`"):
        runs.read_config(project, file, ())
    assert runs.read_config(project, file, ("template=qwen",)).get("template") == "qwen"


def test_another_known_model_brings_its_template(project: Project, tmp_path: Path) -> None:
    file = config_file(tmp_path, "meta-llama/Meta-Llama-3-8B-Instruct", "llama3")
    assert runs.read_config(project, file, ()).get("template") == "llama3"
    read = runs.read_config(project, file, (f"model_name_or_path={SMOL}",))
    assert (read.get("template"), read.overrides["template"]) == ("smollm", "smollm")


def test_a_disk_too_small_is_refused_with_the_sum(tmp_path: Path) -> None:
    needs = {"3 checkpoints": 6 * 10**17, "the merged model": 4 * 10**17}
    with pytest.raises(UsageError) as caught:
        runs.check_room(tmp_path / "not" / "yet", needs)
    assert "this run may need 1000000.0 TB" in caught.value.message
    assert [line.split()[-1] for line in caught.value.detail] == ["checkpoints", "model"]
    runs.check_room(tmp_path, {"little": 1})


def test_output_of_another_run_is_refused_before_a_run_is_made(tmp_path: Path) -> None:
    output = tmp_path / "theirs"
    output.mkdir()
    place = Place(tmp_path / "mine", Path("python"), {})
    runs.refuse_foreign_output(output, place)
    write_json(output / ".tunesmith-owner.json", {"run_id": "theirs-1"})
    with pytest.raises(UsageError, match="belongs to run theirs-1"):
        runs.refuse_foreign_output(output, place)


@pytest.mark.parametrize("stem", ["a b/c", "../../etc", "ü", ""])
def test_run_ids_are_plain_names(stem: str) -> None:
    assert set(runs.new_run_id(stem)) <= set(
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-"
    )


def test_unknown_targets_and_runs_are_named(project: Project) -> None:
    with pytest.raises(UsageError, match="known are: local"):
        runs.target_of(project, "mars")
    with pytest.raises(UsageError, match=r"no run|no runs"):
        project.run_folder("20000101-000000-none")
