"""What an export refuses before it loads a model, and what it reads from a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.job.export import export, gguf_writer
from tunesmith.job.merge import manifest
from tunesmith.job.prompts import templates

pytestmark = pytest.mark.unit

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS: dict[str, Any] = {
    "qwen2": [{"type": "Split", "pattern": {"Regex": QWEN2}}, {"type": "ByteLevel"}],
    "smollm": [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}],
}

ORIGIN = manifest.Origin(
    run="r",
    base=manifest.BaseOrigin("m/x", None, {}),
    adapters=(),
    lora=manifest.LoraOrigin(8, 16, 2.0),
    dtype="bfloat16",
    arithmetic="numpy",
    parity=True,
    corrected=(),
)


def model(folder: Path, pre: Any = "qwen2", **config: Any) -> Path:
    folder.mkdir(parents=True)
    values = {"architectures": ["Qwen2ForCausalLM"], "vocab_size": 8, "rope_scaling": None}
    (folder / "config.json").write_text(json.dumps(values | config))
    tokenizer = {
        "added_tokens": [
            {"id": 3, "content": "<s>", "special": True},
            {"id": 4, "content": "<think>", "special": False},
        ],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": SPLITS[pre] if isinstance(pre, str) else pre,
        },
        "model": {
            "type": "BPE",
            "vocab": {"a": 0, "b": 1, "ab": 2, "<s>": 3},
            "merges": [["a", "b"]],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"bos_token": {"content": "<s>"}, "eos_token": "<s>", "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": True}))
    return folder


def proven(run: Path) -> Path:
    merged = model(run / "merged")
    manifest.write(merged, ORIGIN)
    (run / "proof.json").write_text(json.dumps({"passed": True}))
    return merged


def test_only_a_proven_model_is_exported(tmp_path: Path) -> None:
    for passed in (None, False):
        run = tmp_path / str(passed)
        model(run / "merged")
        if passed is not None:
            (run / "proof.json").write_text(json.dumps({"passed": passed}))
        with pytest.raises(UsageError, match="no proven merged model") as refused:
            export.run(run, "gguf")
        assert refused.value.hint == f"`inv merge --run {run.name}` creates it"


def test_a_model_that_changed_since_its_proof_is_refused(tmp_path: Path) -> None:
    merged = proven(tmp_path / "run")
    (merged / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="not the model that was proven"):
        export.run(tmp_path / "run", "gguf")


def test_options_that_do_nothing_are_refused(tmp_path: Path) -> None:
    proven(tmp_path / "run")
    with pytest.raises(UsageError, match="--server is for --format vllm-check"):
        export.run(tmp_path / "run", "gguf", server="http://127.0.0.1:1")
    with pytest.raises(UsageError, match="vLLM serves the merged folder"):
        export.run(tmp_path / "run", "vllm-check", "q8_0")


def test_a_server_that_is_none_is_named() -> None:
    with pytest.raises(UsageError, match="begins with http"):
        export._fetch("file:///etc/passwd", None)
    with pytest.raises(TunesmithError, match=r"127\.0\.0\.1:9/v1/models: no vLLM server answered"):
        export._fetch("http://127.0.0.1:9/v1/models", None)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "architecture GemmaForCausalLM"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
    ],
)
def test_what_cannot_be_written_is_named(
    tmp_path: Path, config: dict[str, Any], reason: str
) -> None:
    assert gguf_writer.why_not(model(tmp_path / "good")) is None
    found = gguf_writer.why_not(model(tmp_path / "bad", **config))
    assert found is not None
    assert reason in found


def test_the_tokenizer_is_known_by_how_it_splits(tmp_path: Path) -> None:
    for name in SPLITS:
        assert gguf_writer.pre_tokenizer(model(tmp_path / name, name)) == name
    strange = model(tmp_path / "x", [{"type": "Split", "pattern": {"Regex": "x"}}])
    assert gguf_writer.pre_tokenizer(strange) is None
    assert "pre-tokenizer" in str(gguf_writer.why_not(strange))
    with pytest.raises(UsageError, match="none of smollm, llama-bpe"):
        gguf_writer.read_vocabulary(strange)


def test_the_vocabulary_fills_the_embedding(tmp_path: Path) -> None:
    found = gguf_writer.read_vocabulary(model(tmp_path / "m"))
    assert found.tokens == ["a", "b", "ab", "<s>", "<think>", "[PAD5]", "[PAD6]", "[PAD7]"]
    assert found.types == [1, 1, 1, 3, 4, 5, 5, 5]
    assert found.merges == ["a b"]
    assert found.special == {"bos": 3, "eos": 3}


def test_a_chat_template_has_one_place(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "old"}))
    templates.put_chat_template(folder, "new")
    assert json.loads((folder / "tokenizer_config.json").read_text()) == settings
    assert (folder / "chat_template.jinja").read_text() == "new"
    assert templates.adds_bos(folder) is True
    templates.put_add_bos(folder, add=False)
    assert templates.adds_bos(folder) is False
