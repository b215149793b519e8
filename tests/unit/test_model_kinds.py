"""Every kind of model folder is told apart by its small files, each in one line with what to do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hubserver import safetensors, tiny_model
from tunesmith.basemodel import architecture, judge, merging, templates
from tunesmith.basemodel import files as model_files
from tunesmith.basemodel.judge import Machine, Seen, Wish
from tunesmith.basemodel.known import known, newer_types
from tunesmith.core.errors import UsageError
from tunesmith.plan import build, model_check
from tunesmith.plan.options import TrainOptions
from tunesmith.project import Project
from tunesmith.targets.local import LocalTarget

pytestmark = pytest.mark.unit

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 1000,
    "torch_dtype": "float32",
}
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def a_folder(
    place: Path, config: dict[str, Any] | None = None, drop: tuple[str, ...] = (), **files: bytes
) -> Path:
    """Write a model folder: a whole Llama, with other keys in config.json, without `drop`."""
    place.mkdir(parents=True, exist_ok=True)
    whole = tiny_model() | {"config.json": json.dumps(LLAMA | (config or {})).encode()} | files
    for name, data in whole.items():
        if name not in drop:
            (place / name).write_bytes(data)
    return place


def seen(folder: Path, name: str = "", **more: Any) -> Seen:
    return Seen(name or str(folder), folder, [path.name for path in folder.iterdir()], **more)


def refused(found: Seen, wish: Wish | None = None) -> UsageError:
    with pytest.raises(UsageError) as caught:
        judge.judge(found, wish or Wish({}))
    assert "\n" not in caught.value.message
    assert caught.value.hint
    assert "did you mean" not in caught.value.render()
    return caught.value


@pytest.mark.parametrize(
    ("config", "told", "hint"),
    [
        ({"model_type": "gpt_oss"}, "needs transformers >= 4.55; this stack has 4.52.4", "list"),
        ({"model_type": "qwen3_5"}, "needs transformers >= 5.2; this stack has 4.52.4", "list"),
        (
            {"model_type": "brand_new", "transformers_version": "5.24.0"},
            "brand_new is not known to transformers 4.52.4, which this stack has; the model was "
            "written by 5.24.0",
            "list",
        ),
        ({"model_type": "lama"}, "model_type lama is not known to transformers 4.52.4", "list"),
        ({"model_type": "clip"}, "model_type clip is no language model", "list"),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "x.Y"}},
            "asks for code of its author",
            "download it into a folder with its code",
        ),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "quantised (gptq): training on it needs gptqmodel",
            "`quantization_bit: 4`",
        ),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            "quantised (fp8): it is made for inference",
            "`quantization_bit: 4`",
        ),
        ({"quantization_config": {"quant_method": "new"}}, "quantised (new)", "made from"),
        ({"architectures": ["InternVLChatModel"]}, "InternVLChatModel", "transformers' format"),
    ],
)
def test_a_config_that_cannot_be_trained_on(
    tmp_path: Path, config: dict[str, Any], told: str, hint: str
) -> None:
    error = refused(seen(a_folder(tmp_path, config)))
    assert told in error.message
    assert hint in error.hint


ADAPTER = json.dumps({"base_model_name_or_path": "org/base", "peft_type": "LORA"}).encode()


@pytest.mark.parametrize(
    ("drop", "files", "told", "hint"),
    [
        (
            ("config.json", "model.safetensors"),
            {"adapter_config.json": ADAPTER, "adapter_model.safetensors": b""},
            "it is an adapter",
            "`model_name_or_path: org/base`, and `adapter_name_or_path: ",
        ),
        (("config.json", "model.safetensors"), {"m.Q4_K_M.gguf": b""}, "GGUF", "made from"),
        (("model.safetensors",), {"m.Q4_K_M.gguf": b""}, "GGUF files only", "made from"),
        (("config.json",), {"model_index.json": b"{}"}, "a diffusers pipeline", "another base"),
        (("config.json",), {"params.json": b"{}"}, "their author's own format", "another base"),
        (
            ("model.safetensors",),
            {
                "model-1-of-2.safetensors": b"",
                "model.safetensors.index.json": b'{"weight_map": {"a": "model-1-of-2.safetensors",'
                b' "b": "model-2-of-2.safetensors"}}',
            },
            "names model-2-of-2.safetensors, which is not there",
            "another copy",
        ),
    ],
    ids=["adapter", "gguf", "gguf with a config", "pipeline", "own format", "hole"],
)
def test_files_that_are_no_model(
    tmp_path: Path, drop: tuple[str, ...], files: dict[str, bytes], told: str, hint: str
) -> None:
    error = refused(seen(a_folder(tmp_path, None, drop, **files)))
    assert told in error.message
    assert hint in error.hint


def test_what_can_be_trained_on_is_not_refused(tmp_path: Path) -> None:
    for number, config in enumerate(
        (
            {},
            {"model_type": "qwen2", "auto_map": {"AutoConfig": "x.Y"}},
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        )
    ):
        judge.require_trainable(seen(a_folder(tmp_path / str(number), config)))
    own = {"model_type": "own", "auto_map": {"AutoConfig": "x.Y"}}
    judge.require_trainable(seen(a_folder(tmp_path / "code", own), code=True))
    # An adapter that lies beside a whole model is no fault of the model.
    both = a_folder(tmp_path / "both", None, (), **{"adapter_config.json": ADAPTER})
    judge.require_trainable(seen(both))


def test_a_quantised_model_is_trained_with_an_adapter_on_a_gpu_and_not_merged(
    tmp_path: Path,
) -> None:
    config = {"quantization_config": {"load_in_4bit": True}}
    found = seen(a_folder(tmp_path, config))
    lora = {"do_train": True, "finetuning_type": "lora", "template": "default"}
    gpu = Machine(gpus=(24 << 30,))
    estimate = judge.judge(found, Wish(lora, machine=gpu)).estimate
    assert estimate and estimate.parts[0].what == "weights in 4 bits"
    told = refused(found, Wish({**lora, "finetuning_type": "full"}, machine=gpu)).message
    assert "quantised (bitsandbytes): they can be trained with an adapter only" in told
    assert "only a GPU" in refused(found, Wish(lora, machine=Machine(ram=1 << 40))).message
    assert "base model is quantized" in refused(found, Wish(lora, merge=True, machine=gpu)).message


def test_the_table_of_newer_types_is_of_newer_types() -> None:
    assert not set(newer_types()) & set(known().types)
    expected = {
        "gemma3n": "4.53",
        "glm4_moe": "4.54",
        "gpt_oss": "4.55",
        "seed_oss": "4.56",
        "qwen3_next": "4.57",
        "qwen3_vl": "4.57",
        "qwen3_5": "5.2",
        "gemma4": "5.5",
    }
    assert {kind: newer_types()[kind] for kind in expected} == expected


# --- templates


def with_template(place: Path, chat: object = None, tokens: tuple[str, ...] = ()) -> Path:
    """Write a model whose tokenizer has these tokens and this chat template."""
    stored: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if chat is not None:
        stored["chat_template"] = chat
    vocabulary = {"added_tokens": [{"content": token} for token in tokens]}
    return a_folder(
        place,
        None,
        (),
        **{
            "tokenizer_config.json": json.dumps(stored).encode(),
            "tokenizer.json": json.dumps(vocabulary).encode(),
        },
    )


def test_a_template_whose_tokens_the_model_has_not_is_refused(tmp_path: Path) -> None:
    found = seen(with_template(tmp_path, CHATML, ("<|im_start|>", "<|im_end|>")))
    assert judge.judge(found, Wish({"template": "qwen"})).notes == ()
    error = refused(found, Wish({"template": "llama3"}))
    assert "`template` is llama3, whose <|eot_id|> is no token of this model" in error.message
    # Followed, it works.
    advised = error.hint.split("`")[1].removeprefix("template: ")
    assert judge.judge(found, Wish({"template": advised})).notes == ()
    for wish in (
        Wish({"template": "llama3"}, insisted=("template",)),
        Wish({"template": "llama3", "resize_vocab": True}),
        Wish({"template": "llama3", "stage": "pt"}),
    ):
        judge.judge(found, wish)


@pytest.mark.parametrize("file", ["tokenizer.model", "vocab.json"])
def test_a_token_is_found_in_each_kind_of_vocabulary(tmp_path: Path, file: str) -> None:
    folder = with_template(tmp_path)
    assert templates.missing_tokens(folder, "qwen") == ("<|im_end|>",)
    (folder / file).write_bytes(b'\x01"<|im_end|>"\x02')
    assert templates.missing_tokens(folder, "qwen") == ()


def test_another_template_than_the_models_is_told(tmp_path: Path) -> None:
    found = seen(with_template(tmp_path, CHATML, ("<|im_start|>", "<|im_end|>")))
    (note,) = judge.judge(found, Wish({"template": "mistral"})).notes
    assert note.startswith("template: mistral does not write what the model's own chat template")
    assert note.endswith("; chatml, qwen would")
    # LLaMA-Factory's own list knows this name.
    named = replace(found, name="Qwen/Qwen2.5-7B-Instruct")
    (note,) = judge.judge(named, Wish({"template": "chatml"})).notes
    assert note == "template: chatml, but LLaMA-Factory's own for this model is qwen"
    assert judge.judge(named, Wish({"template": "chatml"}, insisted=("template",))).notes == ()


def test_a_missing_template_is_read_from_the_model(tmp_path: Path) -> None:
    found = seen(with_template(tmp_path / "one", CHATML), "Qwen/Qwen2.5-7B-Instruct")
    (note,) = judge.judge(found, Wish({})).notes
    assert note == (
        "template: read from the model's chat template; LLaMA-Factory's own for it is qwen"
    )
    assert judge.judge(found, Wish({"stage": "pt"})).notes == ()
    (note,) = judge.judge(seen(with_template(tmp_path / "none")), Wish({})).notes
    assert "no chat template: question and answer follow one another" in note
    # LLaMA-Factory would take `empty` here without a word.
    several = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": ""}]
    error = refused(seen(with_template(tmp_path / "two", several)))
    assert "several chat templates (default, tool_use)" in error.message
    assert error.hint.startswith("write `template: ")
    # A file beside it is taken first, as transformers does.
    (tmp_path / "two" / "chat_template.jinja").write_text(CHATML)
    assert judge.judge(seen(tmp_path / "two"), Wish({})).notes


# --- what cannot be merged


@pytest.mark.parametrize(
    ("values", "config", "told"),
    [
        ({"finetuning_type": "full"}, {}, "no adapter to merge"),
        ({"add_tokens": "<cat>"}, {}, "add_tokens: a merged model with a changed vocabulary"),
        (
            {"additional_target": "embed_tokens,lm_head"},
            {"tie_word_embeddings": True},
            "one tensor",
        ),
        ({"lora_target": ["q_proj", "lm_head"]}, {"tie_word_embeddings": True}, "one tensor"),
        ({"lora_target": "all,lm_head"}, {"model_type": "gemma2"}, "one tensor"),
        ({"additional_target": "lm_head"}, {"tie_word_embeddings": False}, ""),
        ({"additional_target": "norm"}, {"tie_word_embeddings": True}, ""),
        ({"lora_target": "all"}, {"tie_word_embeddings": True}, ""),
    ],
)
def test_what_no_merge_can_take_up(
    values: dict[str, Any], config: dict[str, Any], told: str
) -> None:
    found = merging.by_settings(values) or merging.by_model(values, LLAMA | config)
    assert (told in found.text and bool(found.hint)) if found and told else not (found or told)


# --- at plan time, on this machine


class Roomy(LocalTarget):
    """This machine, with memory that does not depend on where the tests run."""

    def machine(self) -> Machine:
        return Machine(ram=64 << 30)


def plan(project: Project, model: object, *more: str, then: tuple[str, ...] = ()) -> Any:
    config = project.root / "configs/train/smollm2_135m_lora_sft.yaml"
    words = (f"model_name_or_path={model}", *more)
    options = TrainOptions(config=config, overrides=words, then=then)
    return build.plan_training(project, Roomy(project), options)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda place: place / "none", "no such folder"),
        (lambda place: a_folder(place, {"model_type": "gpt_oss"}), "transformers >= 4.55"),
        (lambda place: a_folder(place, {}, ("model.safetensors",)), "model.safetensors: missing"),
        (lambda place: a_folder(place, {}, ("config.json",)), "config.json: missing"),
        (lambda place: a_folder(place) / "model.safetensors", "a file, a folder expected"),
    ],
    ids=["missing", "newer", "no weights", "no config", "a file"],
)
def test_a_folder_is_judged_when_a_run_is_planned(
    project: Project, tmp_path: Path, make: Any, told: str
) -> None:
    with pytest.raises(UsageError, match=told) as caught:
        plan(project, make(tmp_path / "model"), "template=default")
    assert caught.value.hint
    assert "inv model.fetch /" not in caught.value.hint


def test_pickled_weights_are_told_and_not_merged(project: Project, tmp_path: Path) -> None:
    pickled = {"pytorch_model.bin": b"1234"}
    folder = a_folder(tmp_path / "model", None, ("model.safetensors",), **pickled)
    with pytest.raises(UsageError, match="only pickled weights are here") as caught:
        plan(project, folder, "template=default")
    assert "save_pretrained" in caught.value.hint
    # One of the hub that was fetched with --allow-pickle is trained on.
    found = seen(folder, "org/pickled")
    judge.judge(found, Wish({"template": "default"}))
    assert "no merge reads" in refused(found, Wish({"template": "default"}, merge=True)).message


def test_weights_that_are_there_twice_are_counted_once(tmp_path: Path) -> None:
    size = len(tiny_model()["model.safetensors"])
    twice = {"consolidated.safetensors": b"1" * 99, "optimizer.pt": b"2" * 99}
    folder = a_folder(tmp_path, None, (), **twice)
    assert model_files.weight_bytes(folder) == size
    (folder / "model.safetensors").unlink()
    (folder / "consolidated.safetensors").unlink()
    assert model_files.weight_bytes(folder) == 99


def test_a_gguf_file_is_told_as_one(project: Project, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match="a GGUF file") as caught:
        plan(project, tmp_path / "model.gguf")
    assert "made from" in caught.value.hint


def test_a_plan_says_what_the_model_and_the_memory_are(project: Project, tmp_path: Path) -> None:
    folder = with_template(tmp_path / "model", CHATML)
    made = plan(project, folder, "template=null")
    assert "template: read from the model's chat template" in made.notes
    assert made.memory and made.memory.device == "cpu"
    assert "memory of this machine" in made.render()
    # The weights themselves say how many numbers there are.
    assert made.memory.parts[0].size == len(safetensors({"a.weight": (64, 256), "b.weight": (4,)}))
    # A path of another machine is looked at there.
    wish = model_check.wish_of({}, (), merge=False, machine=None)
    assert model_check.check_model(project, "/no/such", wish).notes == ()


def test_a_merge_that_cannot_be_is_refused_before_the_training(
    project: Project, tmp_path: Path
) -> None:
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    for more, told in (
        (("finetuning_type=full",), "no adapter to merge"),
        (("resize_vocab=true",), "changed vocabulary"),
        (("additional_target=embed_tokens,lm_head",), "one tensor"),
    ):
        with pytest.raises(UsageError, match=told) as caught:
            plan(project, name, *more, then=("merge",))
        assert caught.value.hint
        plan(project, name, *more)
    tied = a_folder(tmp_path / "tied", {"tie_word_embeddings": True})
    with pytest.raises(UsageError, match="one tensor"):
        plan(project, tied, "template=default", "additional_target=lm_head", then=("merge",))


def test_every_misfit_has_a_hint() -> None:
    assert all(architecture.by_config({"model_type": kind}, code=False) for kind in newer_types())
