"""The parts of a plan; whole ones, with every key decided, stand in tests/golden/plans."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.basemodel.files import FileRecord
from tunesmith.basemodel.store import ModelFolder
from tunesmith.job.run import schema
from tunesmith.job.run.schema import ModelRef, RunRequest
from tunesmith.plan.config import Config
from tunesmith.plan.plan import (
    Plan,
    RunLocation,
    absolute_paths,
    apply_managed_keys,
    disk_needs,
    train_phases,
)

pytestmark = pytest.mark.unit

LOCATION = RunLocation(Path("/runs/r 1"), Path("/env/bin/python"), {"A": "1"})


def config(overrides: dict[str, object] | None = None, **values: object) -> Config:
    base = {"model_name_or_path": "m", "stage": "sft", "do_train": True, "output_dir": "saves/x"}
    return Config(Path("x.yaml"), base | values | (overrides or {}), overrides or {})


def test_managed_keys_are_changed_and_told() -> None:
    written = config(
        overwrite_output_dir=True,
        trust_remote_code=True,
        save_only_model=True,
        report_to="none",
        resume_from_checkpoint="x/checkpoint-5",
    )
    values, managed = apply_managed_keys(written, LOCATION)
    assert values["model_name_or_path"] == "m"
    assert values["output_dir"] == "/runs/r 1/output"
    assert "overwrite_output_dir" not in values
    assert "resume_from_checkpoint" not in values
    assert values["trust_remote_code"] is False
    assert values["save_only_model"] is False
    assert values["logging_nan_inf_filter"] is False
    assert {item.key: item.was for item in managed} == {
        "output_dir": "saves/x",
        "overwrite_output_dir": True,
        "resume_from_checkpoint": "x/checkpoint-5",
        "trust_remote_code": True,
        "save_only_model": True,
        "logging_nan_inf_filter": None,
        "include_num_input_tokens_seen": None,
        "disable_tqdm": None,
    }
    assert all(item.why for item in managed)


def test_the_curves_of_a_tracker_are_the_runs() -> None:
    """A worker's own folder goes with it."""
    values, managed = apply_managed_keys(config(logging_dir="logs"), LOCATION)
    assert values["logging_dir"] == "/runs/r 1/logs"
    assert ("logging_dir", "logs") in {(item.key, item.was) for item in managed}
    values, _ = apply_managed_keys(config(logging_dir="/mine"), LOCATION)
    assert values["logging_dir"] == "/mine"


def test_what_the_user_insists_on_stays() -> None:
    written = config({"trust_remote_code": True, "output_dir": "/mine"}, report_to="wandb")
    values, managed = apply_managed_keys(written, LOCATION)
    assert (values["trust_remote_code"], values["output_dir"]) == (True, "/mine")
    assert values["report_to"] == "wandb"
    assert not {"trust_remote_code", "output_dir", "report_to"} & {item.key for item in managed}


def test_paths_become_absolute_but_hub_names_stay() -> None:
    values: dict[str, object] = {
        "dataset_dir": "data",
        "deepspeed": "ds.json",
        "tokenized_path": None,
    }
    absolute_paths(values, lambda path: Path("/root") / path)
    assert values["dataset_dir"] == "/root/data"
    assert values["deepspeed"] == "/root/ds.json"
    online: dict[str, object] = {"dataset_dir": "REMOTE:some/repo"}
    absolute_paths(online, lambda path: Path("/root") / path)
    assert online["dataset_dir"] == "REMOTE:some/repo"


@pytest.mark.parametrize(
    ("values", "prompts", "evaluate", "measured"),
    [
        ({"val_size": 0.1}, [], True, True),
        ({"eval_dataset": "y"}, [], True, True),
        ({}, ["?"], True, True),
        ({}, [], True, False),
        ({"val_size": 0.1}, [], False, False),
        ({"val_size": 0.1, "stage": "dpo"}, ["?"], True, False),
        ({"val_size": 0.1, "do_train": False}, ["?"], True, False),
    ],
)
def test_measured_where_it_can_be(
    values: dict[str, object], prompts: list[str], evaluate: bool, measured: bool
) -> None:
    phases = train_phases(config(**values), prompts, evaluate=evaluate)
    assert phases == (("before", "train", "after") if measured else ("train",))


def test_disk_needs_of_a_lora_run() -> None:
    shapes = {
        "model.embed_tokens.weight": ("BF16", (1000, 64)),
        "model.layers.0.q_proj.weight": ("BF16", (64, 64)),
        "model.layers.0.up_proj.weight": ("BF16", (128, 64)),
        "model.layers.0.norm.weight": ("BF16", (64,)),
    }
    needs = disk_needs({"lora_rank": 4, "save_total_limit": 2}, shapes, 1234, merge=True)
    trainable = 4 * (64 + 64) + 4 * (128 + 64)
    assert needs["3 checkpoints"] == 3 * (trainable * 12 + 16_000_000)
    assert needs["the adapter"] == trainable * 4
    assert needs["the merged model"] == 1234
    full = disk_needs({"finetuning_type": "full"}, shapes, 1234, merge=False)
    assert full["the adapter"] == 4 * (1000 * 64 + 64 * 64 + 128 * 64 + 64)
    assert "the merged model" not in full


MODEL = ModelFolder(
    "m", Path("/models/m"), "hub", "abc", {"model.safetensors": FileRecord(1234, "0" * 64)}, False
)
SHAPES = {"model.layers.0.q_proj.weight": ("BF16", (64, 64))}


def test_a_base_model_is_put_into_a_plan() -> None:
    values, managed = apply_managed_keys(config(lora_rank=4), LOCATION)
    request = RunRequest(model=ModelRef("m"), phases=("train",))
    plan = Plan(LOCATION, ("train",), request, values, tuple(managed), notes=("a note",))
    whole = plan.with_model(MODEL, SHAPES)
    assert whole.config == {**values, "model_name_or_path": "/models/m"}
    [told] = [item for item in whole.managed if item not in managed]
    assert (told.key, told.value, told.was) == ("model_name_or_path", "/models/m", "m")
    assert whole.request.owned == whole.managed
    files = {"model.safetensors": schema.FileRecord(1234, "0" * 64)}
    assert whole.request.model == ModelRef("m", "/models/m", "hub", "abc", files)
    assert whole.needs["the merged model"] == 1234
    assert whole.notes == ("a note", "base model from hub")
    assert (plan.config or {})["model_name_or_path"] == "m", "the plan itself stays"


def test_a_base_model_is_put_into_the_plan_of_a_prediction() -> None:
    predicted = {"model_name_or_path": "m", "seed": 1}
    request = RunRequest(model=ModelRef("m"), predict=predicted)
    whole = Plan(LOCATION, ("predict",), request).with_model(MODEL, SHAPES)
    assert whole.request.predict == {"model_name_or_path": "/models/m", "seed": 1}
    assert (whole.config, whole.needs) == (None, {})


def test_rendered_plan_shows_command_environment_config_and_decisions() -> None:
    values, managed = apply_managed_keys(config(trust_remote_code=True), LOCATION)
    plan = Plan(
        LOCATION,
        ("train",),
        RunRequest(),
        values,
        tuple(managed),
        {"x": 2_000_000_000},
        ("a note",),
    )
    shown = plan.render()
    assert "command  /env/bin/python -I -m tunesmith.job start '/runs/r 1' train" in shown
    assert "  A=1" in shown
    assert "  model_name_or_path: m" in shown
    assert "trust_remote_code: False (was True)" in shown
    assert "2.0 GB  together" in shown
    assert "note     a note" in shown
