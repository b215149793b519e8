"""An adapter is taken only with the base model it was trained on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tunesmith.core.errors import UsageError
from tunesmith.job.merge.adapter import check_fits

pytestmark = pytest.mark.unit

Shapes = dict[str, tuple[int, ...]]
HIDDEN, WIDE, RANK = 8, 12, 2


def write_tensors(path: Path, shapes: Shapes) -> None:
    """Write a safetensors file of zeros, float32."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))


def base_shapes(layers: int = 2, hidden: int = HIDDEN) -> Shapes:
    shapes: Shapes = {"model.embed_tokens.weight": (20, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        shapes[f"model.layers.{layer}.self_attn.q_proj.weight"] = (hidden, hidden)
        shapes[f"model.layers.{layer}.mlp.up_proj.weight"] = (WIDE, hidden)
    return shapes


def make_base(folder: Path, shapes: Shapes | None = None, **config: Any) -> Path:
    folder.mkdir()
    write_tensors(folder / "model.safetensors", shapes or base_shapes())
    values = {"model_type": "llama", "hidden_size": HIDDEN, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(values | config))
    return folder


def adapter_shapes(layers: int = 2) -> Shapes:
    shapes: Shapes = {}
    for layer in range(layers):
        for module, out in (("self_attn.q_proj", HIDDEN), ("mlp.up_proj", WIDE)):
            name = f"base_model.model.model.layers.{layer}.{module}"
            shapes[f"{name}.lora_A.weight"] = (RANK, HIDDEN)
            shapes[f"{name}.lora_B.weight"] = (out, RANK)
    return shapes


def make_adapter(folder: Path, shapes: Shapes | None = None, **config: Any) -> Path:
    folder.mkdir()
    write_tensors(folder / "adapter_model.safetensors", shapes or adapter_shapes())
    values = {
        "peft_type": "LORA",
        "base_model_name_or_path": "maker/small-base",
        "r": RANK,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "up_proj"],
        "use_rslora": False,
        "init_lora_weights": True,
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(values | config))
    return folder


def test_facts_of_a_fitting_adapter(tmp_path: Path) -> None:
    facts = check_fits(make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter"))
    assert facts.base_named == "maker/small-base"
    assert facts.scale == 4 / RANK
    assert facts.targets["model.layers.1.mlp.up_proj"] == "model.layers.1.mlp.up_proj.weight"
    assert len(facts.targets) == 4
    assert facts.parameters == 2 * (2 * RANK * HIDDEN + RANK * HIDDEN + RANK * WIDE)
    assert facts.beyond_plain == ()


def test_rank_stabilised_scale_divides_by_the_root(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", use_rslora=True)
    assert check_fits(make_base(tmp_path / "base"), adapter).scale == 4 / math.sqrt(RANK)


def test_a_wider_base_is_refused_with_both_shapes_and_both_names(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", base_shapes(hidden=16))
    with pytest.raises(UsageError) as caught:
        check_fits(base, make_adapter(tmp_path / "adapter"))
    for part in (
        "model.layers.0.mlp.up_proj.lora_A is [2, 8]",
        "model.layers.0.mlp.up_proj.weight [12, 16]",
        "maker/small-base",
        str(base),
    ):
        assert part in caught.value.message


def test_a_base_that_lacks_a_module_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", base_shapes(layers=1))
    with pytest.raises(UsageError, match=r"layers\.1\.mlp\.up_proj does not exist in the base"):
        check_fits(base, make_adapter(tmp_path / "adapter"))


def test_a_deeper_base_of_equal_width_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", base_shapes(layers=3))
    with pytest.raises(UsageError, match=r"layers\.2.* has no adapter weights"):
        check_fits(base, make_adapter(tmp_path / "adapter"))


def test_layers_left_out_on_purpose_are_no_misfit(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", base_shapes(layers=3))
    adapter = make_adapter(tmp_path / "adapter", layers_to_transform=[0, 1])
    assert len(check_fits(base, adapter).targets) == 4


def test_equal_shapes_but_another_config_of_the_named_base(tmp_path: Path) -> None:
    trained_on = make_base(tmp_path / "trained on", model_type="qwen2")
    adapter = make_adapter(tmp_path / "adapter", base_model_name_or_path=str(trained_on))
    with pytest.raises(UsageError, match="model_type is 'llama', the adapter's base has 'qwen2'"):
        check_fits(make_base(tmp_path / "given"), adapter)
    assert check_fits(trained_on, adapter).base_named == str(trained_on)


def test_ranks_of_a_pair_must_agree(tmp_path: Path) -> None:
    shapes = adapter_shapes()
    shapes["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"] = (WIDE, RANK + 1)
    adapter = make_adapter(tmp_path / "adapter", shapes)
    with pytest.raises(UsageError, match="differ in their rank"):
        check_fits(make_base(tmp_path / "base"), adapter)


def test_half_a_pair_is_refused(tmp_path: Path) -> None:
    shapes = adapter_shapes()
    del shapes["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"]
    adapter = make_adapter(tmp_path / "adapter", shapes)
    with pytest.raises(UsageError, match=r"layers\.0\.mlp\.up_proj has lora_A only"):
        check_fits(make_base(tmp_path / "base"), adapter)


def test_names_transformers_changes_in_memory_are_found(tmp_path: Path) -> None:
    shapes = {
        name.replace("base_model.model.model.", "base_model.model.model.language_model."): shape
        for name, shape in adapter_shapes().items()
    }
    facts = check_fits(make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter", shapes))
    assert facts.targets["model.language_model.layers.0.mlp.up_proj"] == (
        "model.layers.0.mlp.up_proj.weight"
    )


def test_a_head_tied_to_the_embedding_is_found_and_not_recomputable(tmp_path: Path) -> None:
    shapes = adapter_shapes() | {
        "base_model.model.lm_head.lora_A.weight": (RANK, HIDDEN),
        "base_model.model.lm_head.lora_B.weight": (20, RANK),
    }
    facts = check_fits(make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter", shapes))
    assert facts.targets["lm_head"] == "model.embed_tokens.weight"
    assert facts.beyond_plain == ("LoRA on a head tied to the embedding",)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias=all"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights=pissa_niter_16"),
    ],
)
def test_features_beyond_plain_lora_are_named(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    adapter = make_adapter(tmp_path / "adapter", **change)
    assert check_fits(make_base(tmp_path / "base"), adapter).beyond_plain == (reason,)


def test_tensors_the_adapter_replaces_whole(tmp_path: Path) -> None:
    shapes = adapter_shapes() | {"base_model.model.model.embed_tokens.weight": (20, HIDDEN)}
    adapter = make_adapter(tmp_path / "adapter", shapes, modules_to_save=["embed_tokens"])
    facts = check_fits(make_base(tmp_path / "base"), adapter)
    assert facts.saved_whole == ("model.embed_tokens.weight",)
    assert facts.beyond_plain == ("modules_to_save",)


def test_a_truncated_adapter_is_refused_by_name(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UsageError, match=r"adapter_model\.safetensors: is cut"):
        check_fits(make_base(tmp_path / "base"), adapter)


def test_an_adapter_of_pickles_is_refused(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    (adapter / "training_args.bin").write_bytes(b"")
    with pytest.raises(UsageError, match=r"only pickled weights \(adapter_model\.bin\)"):
        check_fits(make_base(tmp_path / "base"), adapter)


def test_an_unfinished_run_is_not_called_a_pickle(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "training_args.bin").write_bytes(b"")
    with pytest.raises(UsageError, match=r"adapter_model\.safetensors: missing"):
        check_fits(make_base(tmp_path / "base"), adapter)


@pytest.mark.parametrize(
    ("text", "reason"),
    [(None, "missing"), ("{", "not JSON"), ('{"peft_type": "IA3"}', "'IA3', 'LORA' expected")],
)
def test_a_bad_adapter_config_is_refused(tmp_path: Path, text: str | None, reason: str) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    config = adapter / "adapter_config.json"
    config.unlink() if text is None else config.write_text(text)
    with pytest.raises(UsageError, match=f"adapter_config.json: .*{reason}"):
        check_fits(make_base(tmp_path / "base"), adapter)


@pytest.mark.parametrize("key", ["auto_mapping", "megatron_config"])
def test_an_adapter_that_names_modules_is_refused(tmp_path: Path, key: str) -> None:
    adapter = make_adapter(tmp_path / "adapter", **{key: {"parent_library": "antigravity"}})
    with pytest.raises(UsageError, match=f"{key} is set, which names code"):
        check_fits(make_base(tmp_path / "base"), adapter)
