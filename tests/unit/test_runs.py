"""Checks before a run: the template of a known model, the disk, foreign output folders."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tunesmith.core.errors import UsageError
from tunesmith.core.files import write_json
from tunesmith.job.run.allowed import part_of_allowed
from tunesmith.job.run.schema import Limits
from tunesmith.plan import build, prediction, start
from tunesmith.plan.config import Config
from tunesmith.plan.options import THEN, check_then, run_limits
from tunesmith.plan.staging import Staged, stage_inputs
from tunesmith.project import Project
from tunesmith.targets import factory
from tunesmith.targets.folder import refuse_foreign_output
from tunesmith.targets.local import LocalTarget

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
    with pytest.raises(UsageError, match="was trained with deepseekr1") as caught:
        build.read_config(project, file, ())
    assert caught.value.hint.startswith("write `template: deepseekr1`")
    assert build.read_config(project, file, ("template=qwen",)).get("template") == "qwen"


def test_another_known_model_brings_its_template(project: Project, tmp_path: Path) -> None:
    file = config_file(tmp_path, "meta-llama/Meta-Llama-3-8B-Instruct", "llama3")
    assert build.read_config(project, file, ()).get("template") == "llama3"
    read = build.read_config(project, file, (f"model_name_or_path={SMOL}",))
    assert (read.get("template"), read.overrides["template"]) == ("smollm", "smollm")


def test_a_disk_too_small_is_refused_with_the_sum(root: Path, tmp_path: Path) -> None:
    target = LocalTarget(Project(root, tmp_path / "not" / "yet"))
    needs = {"3 checkpoints": 6 * 10**17, "the merged model": 4 * 10**17}
    with pytest.raises(UsageError) as caught:
        start.check_room(target, needs)
    assert caught.value.message.endswith("this run needs 1000000.0 TB")
    assert [line.split()[-1] for line in caught.value.detail] == ["checkpoints", "model"]
    start.check_room(target, {"little": 1})


def test_output_of_another_run_is_refused_before_a_run_is_made(tmp_path: Path) -> None:
    output = tmp_path / "theirs"
    output.mkdir()
    refuse_foreign_output(output, tmp_path / "mine")
    write_json(output / ".tunesmith-owner.json", {"run_id": "theirs-1"})
    with pytest.raises(UsageError, match="belongs to run theirs-1"):
        refuse_foreign_output(output, tmp_path / "mine")


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("lora_1.5b", "lora_1.5b"),
        ("a b/c", "a-b-c"),
        ("../../etc", "etc"),
        ("ü", "run"),
        ("", "run"),
    ],
)
def test_run_ids_are_plain_names(stem: str, name: str) -> None:
    made = build.new_run_id(stem)
    assert re.fullmatch(rf"20\d{{6}}-\d{{6}}-{re.escape(name)}", made)


def test_unknown_targets_and_runs_are_named(project: Project) -> None:
    with pytest.raises(UsageError, match="known are: local"):
        factory.target_of(project, "mars", print)
    with pytest.raises(UsageError, match=r"no run|no runs"):
        project.run_folder("20000101-000000-none")


def test_the_tighter_of_two_limits_holds() -> None:
    assert run_limits() == Limits()
    assert run_limits(max_hours=2.0) == Limits(max_seconds=7200.0)
    assert run_limits(max_hours=2.0, price=3.0, max_cost=1.5) == Limits(max_seconds=1800.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_cost": 3.0}, "--max-cost needs the hourly price"),
        ({"price": 0.0}, "--price 0.0: expected more than 0"),
        ({"max_hours": float("nan")}, "--max-hours nan"),
    ],
)
def test_limits_that_make_no_sense_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run_limits(**options)


def test_only_what_can_follow_a_run_is_taken() -> None:
    check_then(THEN)
    with pytest.raises(UsageError, match="--then sleep: expected one of merge, report, pull"):
        check_then(("merge", "sleep"))


class Elsewhere(LocalTarget):
    """A target whose runs have their inputs below /there."""

    def remote_path(self, run_id: str, name: str, path: Path) -> str:
        return f"/there/{run_id}/{name}"


def test_inputs_are_the_registry_and_the_files_of_the_data_sets(root: Path, tmp_path: Path) -> None:
    deepspeed = tmp_path / "ds.json"
    deepspeed.write_text("{}")
    data = root / "data"
    values: dict[str, object] = {
        "dataset": "philosophy_conch",
        "dataset_dir": str(data),
        "deepspeed": str(deepspeed),
    }
    reports = build.check_data(values)
    target = Elsewhere(Project(root, tmp_path))
    inputs = stage_inputs(target, "r1", values, reports).inputs
    assert values["dataset_dir"] == "/there/r1/dataset_dir"
    assert {item.name: item.source for item in inputs} == {
        "dataset_dir/dataset_info.json": data / "dataset_info.json",
        "dataset_dir/philosophy_data.json": data / "philosophy_data.json",
        "deepspeed/ds.json": deepspeed,
    }
    # A prediction's have a place of their own beside those of the training.
    values |= {"dataset_dir": str(data), "deepspeed": str(deepspeed)}
    others = stage_inputs(target, "r1", values, reports, below="predict/").inputs
    assert values["dataset_dir"] == "/there/r1/predict/dataset_dir"
    assert {item.name for item in others} == {f"predict/{item.name}" for item in inputs}
    # Here, nothing is brought anywhere.
    values["dataset_dir"] = str(data)
    assert stage_inputs(LocalTarget(Project(root, tmp_path)), "r1", values, reports) == Staged()


def test_a_data_file_that_a_host_would_not_find_is_refused(root: Path, tmp_path: Path) -> None:
    inner = tmp_path / "data"
    inner.mkdir()
    (tmp_path / "rows.json").write_text('[{"instruction": "a", "input": "", "output": "b"}]')
    write_json(inner / "dataset_info.json", {"d": {"file_name": str(tmp_path / "rows.json")}})
    values: dict[str, object] = {"dataset": "d", "dataset_dir": str(inner)}
    reports = build.check_data(values)
    with pytest.raises(UsageError, match=r"rows.json: lies outside"):
        stage_inputs(Elsewhere(Project(root, tmp_path)), "r1", values, reports)


def test_the_merge_config_beside_the_train_config_counts(project: Project, tmp_path: Path) -> None:
    """As in a user's own folder, or one that is mounted into a container."""
    name = "smollm2_135m_lora_sft.yaml"
    train = tmp_path / "train" / name
    train.parent.mkdir()
    train.write_text((project.root / "configs/train" / name).read_text())
    config = build.read_config(project, train, ())
    ours = build.merge_keys(project, config)
    (tmp_path / "merge").mkdir()
    text = (project.root / "configs/merge" / name).read_text()
    assert "export_size: 5" in text
    (tmp_path / "merge" / name).write_text(text.replace("export_size: 5", "export_size: 1"))
    assert build.merge_keys(project, config) == ours | {"export_size": 1}
    assert ours["export_size"] != 1


def test_each_data_set_has_a_folder_for_its_prediction() -> None:
    names = ("rows", "other", "a,b", "a b", "数据", "../x", "x" * 200)
    folders = [
        prediction.prediction_folder(Config(Path("x.yaml"), {"eval_dataset": name}, {}))
        for name in names
    ]
    assert folders[:2] == ["predict/rows", "predict/other"]
    assert len(set(folders)) == len(names)
    # A pull brings them, whatever a data set is called.
    assert {part_of_allowed(f"{folder}/predict_results.json") for folder in folders} == {"predict"}
