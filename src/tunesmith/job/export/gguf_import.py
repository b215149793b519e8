"""Convert a GGUF to a model folder: `python -m tunesmith.job.export.gguf_import SRC.gguf FOLDER`.

transformers reads the weights. Its GGUF tokenizer differs from the model's own: it prepends a BOS,
ignores the pre-tokenizer, and saves a copy of the whole GGUF as tokenizer.model. So this module
writes the tokenizer from the GGUF's vocabulary and merges, in the form of the original repository
(for SmolLM2 the files equal the original's, byte for byte: configs/models.yml pins them).

With a wrong conversion training reports no error, but text loses its newlines or its Chinese
(observed: first loss 9.92 instead of 2.23, exit code 0). Therefore the result is loaded as in a
job, and checked, before it gets its name.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.core.documents import JsonObject, ModelConfig
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import fsync_folder, read_json

SAMPLE = "Hello, I'm here.\n\n你好，我是谁？\n  3.14 + 2025 → 🙂\n"
SENTENCE = "The sun rises in the east and sets in the west, and the moon is seen at night."

# nat/token. A correct conversion of SmolLM2-135M has about 2.5, a wrong one more than 9.
_MAX_LOSS = 6.0

# gguf's types of tokens: llama.cpp, include/llama.h, LLAMA_TOKEN_TYPE_CONTROL.
_CONTROL = 3

_BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
# How text is split before the merges, for each value of tokenizer.ggml.pre.
_PRE_TOKENIZERS = {
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL],
    },
}


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer's part of a GGUF."""

    tokens: tuple[str, ...]
    merges: tuple[str, ...]
    control: tuple[str, ...]
    pre: str
    bos: str
    eos: str
    unknown: str
    padding: str
    chat_template: str
    context: int


def convert(gguf: Path, folder: Path) -> None:
    """Write the model in `gguf` as bf16 safetensors, with its tokenizer, into `folder`.

    The bytes are the same each time, and `folder` is either complete or absent. Raises UsageError
    for an unsupported kind of GGUF, TunesmithError if the result fails its check.
    """
    if folder.exists():
        raise UsageError(f"{folder}: exists already")
    vocabulary = read_vocabulary(gguf)
    part = folder.with_name(f".{folder.name}.part")
    if part.exists():
        shutil.rmtree(part)
    part.mkdir(parents=True)
    try:
        _write_weights(gguf, part, vocabulary)
        write_tokenizer(vocabulary, part)
        prove(part)
        part.rename(folder)
        fsync_folder(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def read_vocabulary(gguf: Path) -> Vocabulary:
    """Return the tokenizer of a GGUF. Raises UsageError if its kind is not supported."""
    from gguf import GGUFReader

    try:
        fields = GGUFReader(gguf).fields
    except (ValueError, OSError) as error:
        raise UsageError(f"{gguf}: not a GGUF file ({error})") from None

    def value(key: str) -> Any:
        if key not in fields:
            raise UsageError(f"{gguf}: has no {key}")
        return fields[key].contents()

    architecture, kind = value("general.architecture"), value("tokenizer.ggml.model")
    pre = value("tokenizer.ggml.pre")
    if (architecture, kind) != ("llama", "gpt2") or pre not in _PRE_TOKENIZERS:
        supported = ", ".join(_PRE_TOKENIZERS)
        raise UsageError(
            f"{gguf}: architecture {architecture}, tokenizer {kind}/{pre} cannot be converted; "
            f"supported: llama with gpt2/{supported}; take the model's safetensors from the hub"
        )
    tokens = tuple(value("tokenizer.ggml.tokens"))
    types = value("tokenizer.ggml.token_type")
    return Vocabulary(
        tokens=tokens,
        merges=tuple(value("tokenizer.ggml.merges")),
        control=tuple(t for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL),
        pre=pre,
        bos=tokens[value("tokenizer.ggml.bos_token_id")],
        eos=tokens[value("tokenizer.ggml.eos_token_id")],
        unknown=tokens[value("tokenizer.ggml.unknown_token_id")],
        padding=tokens[value("tokenizer.ggml.padding_token_id")],
        chat_template=value("tokenizer.chat_template"),
        context=int(value(f"{architecture}.context_length")),
    )


def write_tokenizer(vocabulary: Vocabulary, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json.

    No post-processor: nothing is added before or after a text.
    """
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    added = [
        {
            "id": ids[token],
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token in vocabulary.control
    ]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": ids,
        "merges": vocabulary.merges,
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": _PRE_TOKENIZERS[vocabulary.pre],
        "post_processor": None,
        "decoder": {**_BYTE_LEVEL, "add_prefix_space": True},
        "model": model,
    }
    chat = [vocabulary.bos, vocabulary.eos]
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(ids[token]): {"content": token, **flags, "special": True}
            for token in vocabulary.control
        },
        "additional_special_tokens": chat,
        "bos_token": vocabulary.bos,
        "chat_template": vocabulary.chat_template,
        "clean_up_tokenization_spaces": False,
        "eos_token": vocabulary.eos,
        "model_max_length": vocabulary.context,
        "pad_token": vocabulary.padding,
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": vocabulary.unknown,
        "vocab_size": len(vocabulary.tokens),
    }
    special = {
        "additional_special_tokens": chat,
        "bos_token": {"content": vocabulary.bos, **flags},
        "eos_token": {"content": vocabulary.eos, **flags},
        "pad_token": {"content": vocabulary.padding, **flags},
        "unk_token": {"content": vocabulary.unknown, **flags},
    }
    # The first file has no final newline, as the tokenizers library writes it.
    _write(folder / "tokenizer.json", tokenizer, end="")
    _write(folder / "tokenizer_config.json", config)
    _write(folder / "special_tokens_map.json", special)


def prove(folder: Path) -> None:
    """Load a converted folder as a job would, and raise TunesmithError unless it is correct."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # This also detects a BOS before the text.
    back = tokenizer.decode(tokenizer.encode(SAMPLE))
    if back != SAMPLE:
        raise TunesmithError(
            f"{folder.name}: the tokenizer does not give back its text: {back!r} for {SAMPLE!r}"
        )
    model = AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, trust_remote_code=False
    )
    inputs = torch.tensor([tokenizer.encode(SENTENCE)])
    with torch.no_grad():
        loss = float(model(input_ids=inputs, labels=inputs).loss)
    # Also true for NaN.
    if not loss < _MAX_LOSS:
        raise TunesmithError(
            f"{folder.name}: the model fails on English text: loss {loss:.2f} nat/token, "
            f"expected below {_MAX_LOSS}"
        )


def _write_weights(gguf: Path, folder: Path, vocabulary: Vocabulary) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, torch_dtype=torch.bfloat16, trust_remote_code=False
    )
    model.generation_config.eos_token_id = vocabulary.tokens.index(vocabulary.eos)
    model.generation_config.pad_token_id = vocabulary.tokens.index(vocabulary.padding)
    # Always one file: such models are small, and need no index.
    model.save_pretrained(folder, max_shard_size="100GB")
    config: JsonObject = read_json(folder / "config.json")
    config.pop("_model_name_or_path", None)
    config["eos_token_id"] = model.generation_config.eos_token_id
    config["pad_token_id"] = model.generation_config.pad_token_id
    # GGUF stores it as float32: 9.999999747378752e-06.
    config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.6g}")
    _write(folder / "config.json", config)
    # safetensors makes it readable only by its owner.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def _write(path: Path, value: ModelConfig, end: str = "\n") -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + end, encoding="utf-8")


def main(argv: Sequence[str]) -> int:
    """Convert; return the exit code."""
    if len(argv) != 2:
        sys.stderr.write("usage: python -I -m tunesmith.job.export.gguf_import SRC.gguf FOLDER\n")
        return 2
    try:
        convert(Path(argv[0]).absolute(), Path(argv[1]).absolute())
    except TunesmithError as error:
        sys.stderr.write(error.render() + "\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
