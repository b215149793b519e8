"""Configs: a wrong key is refused before anything starts, and the message mends it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tunesmith.core.errors import UsageError
from tunesmith.plan import build
from tunesmith.plan.config import find_faults, fits, load_config, parse_overrides
from tunesmith.plan.kind import kind_of
from tunesmith.plan.rules.fault import changed, written
from tunesmith.project import Project

pytestmark = pytest.mark.unit

GOOD = """\
model_name_or_path: some/model
stage: sft
do_train: true
dataset: x
template: qwen
"""


def load(project: Project, folder: Path, text: str, *overrides: str) -> dict[str, object]:
    file = folder / "a config.yaml"
    file.write_text(text, encoding="utf-8")
    return dict(load_config(file, overrides, project.stack.schema).values)


def test_a_good_config_is_taken_as_it_is(project: Project, tmp_path: Path) -> None:
    assert load(project, tmp_path, GOOD)["template"] == "qwen"


FAULTS = [
    ("learning_rat: 1.0e-4", "unknown key `learning_rat`", "did you mean `learning_rate`?"),
    ("frobnicate: 1", "unknown key `frobnicate`", "remove `frobnicate` (LLaMA-Factory has no"),
    (
        "learning_rate: 1e-5",
        "`learning_rate` is 1e-5, which YAML reads as text",
        "write `learning_rate: 1.0e-05`",
    ),
    ("weight_decay: 5E-2", "is 5E-2, which YAML reads as text", "write `weight_decay: 0.05`"),
    (
        "lora_rank: eight",
        "`lora_rank` is 'eight', but must be a whole number",
        "write `lora_rank: 8`",
    ),
    ("lora_rank: '16'", "`lora_rank` is '16', but must be a whole number", "write `lora_rank: 16`"),
    ("lora_rank: 8.5", "`lora_rank` is 8.5, but must be a whole number", "write `lora_rank: 8`"),
    ("bf16: 'yes'", "`bf16` is 'yes', but must be true or false", "write `bf16: true`"),
    (
        "cutoff_len: [1]",
        "`cutoff_len` is [1], but must be a whole number",
        "write `cutoff_len: 2048`",
    ),
    ("lora_alpha: x", "`lora_alpha` is 'x', but must be a whole number", "remove `lora_alpha`"),
    ("dataset: [1]", "`dataset` is [1], but must be text or a list", "name a key of dataset_info"),
    (
        "eval_strategy: no",
        "`eval_strategy` is False (YAML reads no or off so), but must be one of no, steps, epoch",
        "write `eval_strategy: 'no'`",
    ),
    ("lr_scheduler_type: cosin", "is 'cosin', but must be one of", "write `lr_scheduler_type: cos"),
    ("template: qwen25", "`template` is 'qwen25', but must be one of", "write `template: qwen`"),
    ("template: ?-", "`template` is '?-', but must be one of", "`inv model.list` shows"),
    ("dataset:", "`dataset` is missing", "name a key of dataset_info.json"),
    ("model_name_or_path:", "`model_name_or_path` is missing", "name a repo id or a folder"),
]


def with_line(line: str) -> str:
    key = line.partition(":")[0]
    return "".join(f"{x}\n" for x in GOOD.splitlines() if not x.startswith(f"{key}:")) + line


@pytest.mark.parametrize(("line", "told", "hint"), FAULTS)
def test_faults(project: Project, tmp_path: Path, line: str, told: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(project, tmp_path, with_line(line))
    assert caught.value.message.startswith(f"{tmp_path / 'a config.yaml'}: ")
    assert told in caught.value.message
    assert caught.value.hint.startswith(hint)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("line", [line for line, _, _ in FAULTS])
def test_a_change_ends_its_fault(project: Project, tmp_path: Path, line: str) -> None:
    schema = json.loads(project.stack.schema.read_text(encoding="utf-8"))
    values = yaml.safe_load(with_line(line))
    (fault,) = find_faults(values, schema, frozenset())
    if fault.change:
        mended = changed(values, fault.change)
        assert find_faults(mended, schema, frozenset()) == []
        # As it is written, too, but where a key is only named.
        for key, value in mended.items():
            assert yaml.safe_load(f"{key}: {written(value)}") == {key: value}
    else:
        assert fault.key in ("template", "dataset", "model_name_or_path"), "only a user can know"


def test_all_faults_in_one_report(project: Project, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load(project, tmp_path, GOOD + "learning_rate: 1e-4\nbf: true\nlora_rank: x\n")
    assert "(and 2 more)" in caught.value.message
    assert len(caught.value.detail) == 2


def test_overrides_win_and_read_numbers_as_numbers(project: Project, tmp_path: Path) -> None:
    words = ("learning_rate=1e-4", "dataset=y", "bf16=true", "num_train_epochs=2")
    values = load(project, tmp_path, GOOD, *words)
    assert (values["learning_rate"], values["dataset"]) == (1e-4, "y")
    assert (values["bf16"], values["num_train_epochs"]) == (True, 2)


def test_an_option_on_the_command_line_needs_no_quotes(project: Project, tmp_path: Path) -> None:
    values = load(project, tmp_path, GOOD, "eval_strategy=no", "bf16=no")
    assert (values["eval_strategy"], values["bf16"]) == ("no", False)


def test_a_wrong_override_is_named_as_one(project: Project, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"`lora_rank` \(given on the command line\) is 'x'") as it:
        load(project, tmp_path, GOOD, "lora_rank=x", "eval_strategy=nope")
    assert it.value.hint == "write `lora_rank=8`"
    assert it.value.detail[0].endswith("; write `eval_strategy=no`")
    with pytest.raises(UsageError) as it:
        load(project, tmp_path, GOOD, "frob=1")
    assert it.value.hint == "leave out `frob=...` (LLaMA-Factory has no such key)"


@pytest.mark.parametrize("word", ["x", "=1", "a-b=1"])
def test_what_is_no_override(word: str) -> None:
    with pytest.raises(UsageError, match="is not an override"):
        parse_overrides([word])


def test_values_with_equals_and_spaces() -> None:
    assert parse_overrides(["dataset_dir=/a path/x=y"]) == {"dataset_dir": "/a path/x=y"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("!!python/object/apply:os.system ['touch /tmp/owned']", "not YAML"),
        ("- a\n- b\n", "must hold `key: value` lines, found list"),
        ("", "must hold `key: value` lines, found NoneType"),
        ("a: [1, 2\nb: 3", "not YAML"),
    ],
)
def test_what_is_no_config(project: Project, tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        load(project, tmp_path, text)
    assert not Path("/tmp/owned").exists()


def test_a_file_that_is_not_there(project: Project, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such config"):
        load_config(tmp_path / "none.yaml", (), project.stack.schema)


def test_the_schema_is_read_as_json_schema_says(project: Project) -> None:
    """Our reading of the few words the schema uses, against the reference implementation."""
    from jsonschema import Draft202012Validator

    rules = json.loads(project.stack.schema.read_text(encoding="utf-8"))["properties"]
    samples: list[object] = [None, True, False, 0, 1, -3, 2.0, 0.5, float("inf"), "", "cosine"]
    samples += ["no", "bf16", [], ["a"], [1], [True], [[]], {}, {"a": 1}]
    compared = 0
    for rule in rules.values():
        validator = Draft202012Validator(rule)
        for value in samples:
            assert fits(value, rule) == validator.is_valid(value), (rule, value)
            compared += 1
    assert compared > 5000


def test_lists_are_read_as_names_with_commas(project: Project, tmp_path: Path) -> None:
    lists = "dataset: [a, b]\nlora_target: [q_proj, v_proj]\ninterleave_probs: [0.5, 0.5]\n"
    text = "".join(f"{x}\n" for x in GOOD.splitlines() if x.partition(":")[0] != "dataset")
    values = load(project, tmp_path, f"{text}{lists}mix_strategy: interleave_under\n")
    assert values["dataset"] == "a,b"
    assert values["lora_target"] == "q_proj,v_proj"
    assert values["interleave_probs"] == "0.5,0.5"


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        (
            "num_train_epochs: 0",
            "`num_train_epochs` is 0, but must be greater than 0",
            "write `num",
        ),
        ("mask_history: true\ntrain_on_prompt: true", "exclude each other", "write `train_on"),
        ("report_to: wandb", "needs wandb", "write `report_to: none`"),
        ("use_unsloth: true", "needs unsloth", "remove `use_unsloth`"),
    ],
)
def test_values_that_cannot_work_are_refused_with_what_can(
    bare: Project, tmp_path: Path, line: str, message: str, hint: str
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(UsageError) as caught:
        build.read_config(bare, file, ())
    assert message in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({"do_train": True, "predict_with_generate": True}, "train"),
        ({"export_dir": "x", "adapter_name_or_path": "a"}, "merge"),
        ({"do_predict": True}, "predict"),
        ({"do_eval": True, "eval_dataset": "a"}, "evaluate loss"),
        ({"task": "mmlu_test"}, "benchmark"),
        ({"model_name_or_path": "m", "template": "qwen"}, "chat"),
    ],
)
def test_what_a_config_is_for(values: dict[str, object], kind: str) -> None:
    assert kind_of(values) == kind
