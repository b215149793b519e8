"""What is known of models without torch (basemodel/known.json), held against the packages; and the
template that LLaMA-Factory reads from a model where a config names none."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

from tunesmith.basemodel import known as knowledge
from tunesmith.basemodel import templates as template_files
from tunesmith.job.data import model_facts
from tunesmith.job.inference import engine
from tunesmith.job.inference.engine import Codec, Question
from tunesmith.job.prompts import read_back, templates
from tunesmith.job.run.failures import JobError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Gemma's does.
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + CHATML
)
TURNS = (
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4."},
    {"role": "user", "content": "你好！\nAnd 3?"},
)


def test_what_is_known_of_models_is_what_the_packages_say(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model_facts.main()
    committed = knowledge.KNOWN.read_text(encoding="utf-8")
    assert capsys.readouterr().out == committed, "`inv stack.render` renews it"


def test_a_head_is_tied_as_transformers_has_it(tmp_path: Path) -> None:
    """Where config.json does not say so."""
    for kind in ("llama", "qwen2", "gemma2", "gpt2", "mistral"):
        (tmp_path / "config.json").write_text(f'{{"model_type": "{kind}"}}')
        tied = AutoConfig.from_pretrained(tmp_path).tie_word_embeddings
        assert knowledge.known().types[kind] is tied, kind


def test_tokens_are_found_in_the_files_as_the_tokenizer_has_them(base_model: Path) -> None:
    vocabulary = AutoTokenizer.from_pretrained(base_model).get_vocab()
    for name, template in knowledge.known().templates.items():
        expected = tuple(token for token in template.tokens if token not in vocabulary)
        assert template_files.missing_tokens(base_model, name) == expected, name


def test_a_token_that_is_missing_has_a_number_without_an_embedding(base_model: Path) -> None:
    """Why a template whose tokens the model has not is refused."""
    rows = AutoConfig.from_pretrained(base_model).vocab_size
    assert template_files.missing_tokens(base_model, "llama3") == ("<|eot_id|>",)
    asked = codec(base_model, template="llama3")
    assert max(asked.encode(Question(TURNS))) >= rows
    assert max(codec(base_model, template="smollm").encode(Question(TURNS))) < rows


def codec(folder: Path, **more: Any) -> Codec:
    config = {"model_name_or_path": str(folder), "stage": "sft", **more}
    return engine.codec(engine.arguments(config))


@pytest.fixture(params=["own", "chatml"])
def model(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path) -> Path:
    """A model with SmolLM2's own chat template, which has a system text of its own, or a plain
    one."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    if request.param == "chatml":
        (folder / templates.CHAT_TEMPLATE).write_text(CHATML)
    return folder


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("turns", [TURNS[:1], TURNS])
def test_without_a_template_the_models_own_prompt_is_trained(
    model: Path, system: str | None, turns: tuple[dict[str, str], ...]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    head = [{"role": "system", "content": system}] if system else []
    own = tokenizer.apply_chat_template([*head, *turns], add_generation_prompt=True)
    read = codec(model)
    assert read.encode(Question(turns, system)) == own
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in read.stop_ids()
    # And a merged model whose chat template was replaced is read back as the same.
    templates.put_chat_template(model, templates.chat_template(read, ""))
    assert codec(model).encode(Question(turns, system)) == own
    question = Question(turns, system)
    read_back.require(read, model, lambda one: [one.encode(question)])
    (model / templates.CHAT_TEMPLATE).write_text(CHATML.replace("<|im_end|>", "</s>"))
    with pytest.raises(JobError, match="write the template of its family and train again"):
        read_back.require(read, model, lambda one: [one.encode(question)])
    # One with a name is not read from there.
    named = codec(model, template="smollm")
    read_back.require(named, model, lambda one: [one.encode(question)])


def test_a_chat_template_that_cannot_be_read_is_a_fault_of_the_config(model: Path) -> None:
    (model / templates.CHAT_TEMPLATE).write_text(NO_SYSTEM)
    with pytest.raises(JobError, match="System role not supported") as caught:
        codec(model)
    assert caught.value.failure == "config"
    assert "write the template of its family" in caught.value.message
    assert codec(model, template="chatml").encode(Question(TURNS[:1]))
    # What asks for an answer is no beginning of one.
    (model / templates.CHAT_TEMPLATE).write_text(
        CHATML.replace("nt\n{% endif", "nt\n<think>{% endif")
    )
    with pytest.raises(JobError, match="A placeholder is required"):
        codec(model)
