"""The memory of a training: held against measured ones, and what it refuses and advises."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.probes.recorded import FOLDER, parse
from tunesmith.basemodel import judge, memory
from tunesmith.basemodel.catalogue import load_models
from tunesmith.basemodel.judge import Machine, Wish
from tunesmith.basemodel.memory import Estimate
from tunesmith.basemodel.shape import ModelShape, shape_of
from tunesmith.core.errors import UsageError
from tunesmith.doctor.check import fit
from tunesmith.hosts.probe.gpu import Gpu
from tunesmith.plan.build import read_config
from tunesmith.project import Project

pytestmark = pytest.mark.unit

MEASURED = json.loads((Path(__file__).parents[1] / "data" / "memory.json").read_text("utf-8"))
GB = 10**9
LORA = {"do_train": True, "finetuning_type": "lora", "bf16": True, "cutoff_len": 1024}
FULL = {**LORA, "finetuning_type": "full"}
# Qwen2.5-7B's config.json, of its shape.
SEVEN = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def shape(config: dict[str, Any]) -> ModelShape:
    found = shape_of(config)
    assert found
    return found


def taken(config: dict[str, Any], values: dict[str, Any], gpus: int = 1, zero: int = 0) -> Estimate:
    setting = memory.setting_of(values, on_gpu=True, zero=zero, processes=gpus)
    return memory.estimate(shape(config), setting, on_gpu=True)


def part(found: Estimate, word: str) -> int:
    return sum(one.size for one in found.parts if word in one.what)


@pytest.mark.parametrize("run", MEASURED["settings"], ids=lambda run: run["name"])
def test_the_estimate_is_within_a_tenth_of_what_was_measured(run: dict[str, Any]) -> None:
    setting = memory.setting_of(run["config"], on_gpu=False)
    found = memory.estimate(shape(MEASURED["models"][run["model"]]), setting, on_gpu=False)
    assert found.measured
    assert found.total == pytest.approx(run["peak"], rel=0.1)
    assert found.sure < run["peak"]


def test_numbers_are_counted_by_shape_and_by_the_size_of_the_weights(root: Path) -> None:
    # https://huggingface.co/Qwen/Qwen2.5-7B: 7.61 billion parameters.
    assert shape(SEVEN).parameters == pytest.approx(7.616e9, rel=0.001)
    for known in load_models(root / "configs/models.yml").values():
        assert shape(dict(known.config)).parameters * 2 == pytest.approx(known.size_bytes, rel=0.01)
        found = shape_of(known.config, known.size_bytes)
        assert found and found.parameters == known.size_bytes // 2
    mixture = {**SEVEN, "num_experts": 8, "moe_intermediate_size": 1024}
    assert shape(mixture).experts == 8
    assert shape({"text_config": SEVEN, "model_type": "qwen2_5_vl"}).layers == 28
    assert shape_of({"model_type": "llama", "hidden_size": 64}) is None
    assert shape_of({**SEVEN, "vocab_size": "many"}) is None


def test_what_is_counted_follows_the_method() -> None:
    parameters = shape(SEVEN).parameters
    lora, full = taken(SEVEN, LORA), taken(SEVEN, FULL)
    assert part(lora, "weights") == parameters * 2
    # float32 weights, gradients and two moments: 16 bytes a number.
    assert full.sure == parameters * 16
    assert taken(SEVEN, {**FULL, "pure_bf16": True}).sure == parameters * 8
    assert taken(SEVEN, {**FULL, "optim": "adamw_8bit"}).sure == parameters * 10
    assert taken(SEVEN, {**FULL, "optim": "sgd"}).sure == parameters * 8
    # Nobody knows what these keep: nothing is refused for it.
    assert taken(SEVEN, {**FULL, "use_galore": True}).sure == parameters * 4
    assert part(lora, "trained") == 20_185_088 * 4  # PEFT's count, r=8 on all linear layers
    freeze = taken(SEVEN, {**FULL, "finetuning_type": "freeze", "freeze_trainable_layers": 2})
    assert part(freeze, "trained") == 2 * shape(SEVEN).layer * 4
    dpo = taken(SEVEN, {**FULL, "stage": "dpo"})
    assert dpo.sure == full.sure + parameters * 2


def test_quantised_weights_take_less() -> None:
    # 7B in 4 bits with embedding and head in bf16: 5.5 GB (bitsandbytes, Qwen2.5-7B).
    four = part(taken(SEVEN, {**LORA, "quantization_bit": 4}), "in 4 bits")
    eight = part(taken(SEVEN, {**LORA, "quantization_bit": 8}), "in 8 bits")
    assert four == pytest.approx(5.55 * GB, rel=0.02)
    assert four < eight < part(taken(SEVEN, LORA), "weights")


def test_what_is_not_counted_is_not_taken_for_sure() -> None:
    """A refusal must be right, so that less is sure where more would be a guess."""
    freeze = {**FULL, "finetuning_type": "freeze"}
    part_of_it = taken(SEVEN, {**freeze, "freeze_trainable_modules": "mlp"})
    assert part_of_it.sure < taken(SEVEN, freeze).sure
    # What sees is left as it is: of the weights' size, what no language model of the shape has.
    seeing = {"model_type": "qwen2_5_vl", "text_config": SEVEN, "vision_config": {}}
    text = shape(SEVEN).parameters
    found = shape_of(seeing | {"torch_dtype": "bfloat16"}, 2 * (text + 10**9))
    assert found and (found.parameters, found.apart) == (text + 10**9, 10**9)
    full = memory.estimate(found, memory.setting_of(FULL, on_gpu=True), on_gpu=True)
    assert full.sure == text * 16 + 10**9 * 2
    # Norms are no embeddings; without bf16 config.json's own type is loaded.
    assert taken(SEVEN, {**LORA, "additional_target": "norm"}).sure == taken(SEVEN, LORA).sure
    assert taken(SEVEN, {**LORA, "bf16": False}).sure == taken(SEVEN, LORA).sure
    whole = taken(SEVEN, {**LORA, "additional_target": "embed_tokens,lm_head"})
    assert whole.sure == taken(SEVEN, LORA).sure + 2 * 152064 * 3584 * 16


def test_zero_divides_what_each_stage_divides() -> None:
    alone = taken(SEVEN, FULL)
    for stage, divided in ((1, ("optimizer",)), (2, ("optimizer", "gradients"))):
        found = taken(SEVEN, FULL, gpus=4, zero=stage)
        for word in ("optimizer", "gradients", "trained"):
            share = 4 if word in divided else 1
            assert part(found, word) == part(alone, word) // share, (stage, word)
    assert taken(SEVEN, FULL, gpus=4, zero=3).sure == pytest.approx(alone.sure / 4, rel=1e-6)
    assert taken(SEVEN, FULL, gpus=4).sure == alone.sure


def test_less_is_kept_with_checkpointing_and_a_smaller_batch() -> None:
    one = {**LORA, "per_device_train_batch_size": 1}
    more = taken(SEVEN, {**one, "per_device_train_batch_size": 4})
    open_ = taken(SEVEN, {**one, "disable_gradient_checkpointing": True})
    assert part(more, "activations") == pytest.approx(4 * part(taken(SEVEN, one), "activations"))
    assert part(open_, "activations") > 5 * part(taken(SEVEN, one), "activations")


def asked(values: dict[str, Any], machine: Machine) -> tuple[Estimate, tuple[str, ...]]:
    return judge.require_memory("org/seven", shape(SEVEN), Wish(values, machine=machine))


def test_what_surely_does_not_fit_is_refused_with_the_change_that_does() -> None:
    with pytest.raises(UsageError) as caught:
        asked(FULL, Machine(gpus=(80 * GB,)))
    assert caught.value.message.startswith(
        "org/seven: the training takes at least 121.8 GB, the GPU has 80.0 GB"
    )
    # The hint is what stands on the command line, and with it the training fits.
    words = caught.value.hint.split("`")[1]
    change = {key: yaml.safe_load(value) for key, value in (w.split("=") for w in words.split())}
    assert change["finetuning_type"] == "lora"
    assert asked({**FULL, **change}, Machine(gpus=(80 * GB,)))[1] == ()
    with pytest.raises(UsageError, match=r"at least 15\.\d GB, the GPU has 12\.0 GB") as caught:
        asked({**LORA, "per_device_train_batch_size": 1}, Machine(gpus=(12 * GB,)))
    assert "quantization_bit=4" in caught.value.hint
    with pytest.raises(UsageError) as caught:
        asked(FULL, Machine(gpus=(4 * GB,)))
    assert caught.value.hint == "choose a smaller base model, or a GPU with more memory"
    with pytest.raises(UsageError, match="the machine has"):
        asked(FULL, Machine(ram=16 * GB))


def test_what_the_ladder_may_still_help_is_told_and_not_refused() -> None:
    values = {**LORA, "per_device_train_batch_size": 32, "disable_gradient_checkpointing": True}
    found, (note,) = asked(values, Machine(gpus=(24 * GB,)))
    assert found.sure < 24 * GB < found.total
    assert "goes on with a smaller batch" in note
    assert "`per_device_train_batch_size=1 disable_gradient_checkpointing=false`" in note
    # Nothing is said, and nothing refused, of a machine that nobody has seen.
    assert judge.require_memory("m", shape(SEVEN), Wish(FULL))[1] == ()


def test_shares_of_several_gpus_count(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    written = '{"zero_optimization": {"stage": 3}}'
    file.write_text(written)
    for value in (str(file), written, json.loads(written)):
        assert judge.zero_stage_of(value) == 3
    assert judge.zero_stage_of(None) == judge.zero_stage_of("/no/such") == 0
    gpus = Machine(gpus=(80 * GB,) * 4)
    values = {**FULL, "per_device_train_batch_size": 1}
    judge.require_memory("m", shape(SEVEN), Wish(values, zero=3, machine=gpus))
    for zero, some in ((0, gpus), (3, gpus.taking(1)), (3, gpus.taking(1, (3,)))):
        with pytest.raises(UsageError):
            judge.require_memory("m", shape(SEVEN), Wish(values, zero=zero, machine=some))
    assert Machine(gpus=(1, 2, 3)).taking(2, (0, 2)).gpus == (1, 3)


def test_a_host_is_told_whether_a_training_fits(project: Project) -> None:
    facts = parse(sorted(FOLDER.glob("*.txt"))[0].read_text(encoding="utf-8"))
    config = read_config(project, Path("configs/train/deepseek_r1_1_5b_lora_sft.yaml"), ())

    def on(size: int) -> Any:
        gpus = replace(facts.gpu, gpus=(Gpu("A GPU", "570", "8.9", size, 0),))
        return fit(project, config, replace(facts, gpu=gpus))

    assert on(80 * GB).level == "pass"
    assert "deepseek_r1_1_5b_lora_sft.yaml takes about" in on(80 * GB).text
    assert on(10 * GB).level == "warning"
    assert on(3 * GB).level == "critical"
    assert "quantization_bit=4" in on(3 * GB).fix or "choose a smaller" in on(3 * GB).fix
