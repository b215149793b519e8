"""What kind of model a folder or a repository holds, told from its small files.

Everything here is read from names and JSON: it costs milliseconds, and is asked before a weight is
fetched. Standard library, Python 3.10.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from tunesmith.basemodel.files import CONFIG, INDEX, WEIGHTS, choose, json_object, pickles
from tunesmith.basemodel.known import known, newer_types
from tunesmith.core.documents import ModelConfig

ADAPTER_CONFIG = "adapter_config.json"
# What each method needs to be trained on (transformers 4.52.4, quantizers/; LLaMA-Factory 0.9.3,
# model/model_utils/quantization.py); None: it cannot be trained on at all.
_QUANTIZED: dict[str, str | None] = {
    "gptq": "gptqmodel and optimum",
    "awq": "autoawq",
    "aqlm": "aqlm",
    "hqq": "hqq",
    "eetq": "eetq",
    "quanto": "optimum-quanto",
    "compressed-tensors": "compressed-tensors",
    "torchao": "torchao",
    "fp8": None,
    "fbgemm_fp8": None,
    "mxfp4": None,
    "auto-round": None,
    "bitnet": None,
    "higgs": None,
    "quark": None,
    "spqr": None,
    "vptq": None,
}
BITSANDBYTES = "bitsandbytes"
# What models call their embedding and head (transformers 4.52.4, get_input_embeddings and
# get_output_embeddings of Llama, GPT-2, GPT-NeoX, BLOOM, ChatGLM).
EMBEDDINGS = frozenset(
    ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings", "output_layer")
)
# Refused by LLaMA-Factory 0.9.3 itself, in patch_config (model/patcher.py), with weights loaded.
_OTHER_FORMAT = {
    "InternVLChatModel": "OpenGVLab/InternVL3-8B-hf",
    "LlavaLlamaForCausalLM": "llava-hf/llava-1.5-7b-hf",
}
# In other tools' formats: the file that tells one, and what it is.
_FOREIGN = {
    "model_index.json": "a diffusers pipeline, which makes pictures",
    "modules.json": "a sentence-transformers model, which makes vectors",
    "params.json": "weights in their author's own format",
}


@dataclass(frozen=True)
class Misfit:
    """Why a model cannot be trained on here, in one line, and what to do instead."""

    text: str
    hint: str


def by_names(name: str, names: Collection[str], folder: Path | None = None) -> Misfit | None:
    """Return why files of these names are no model to train on; None: nothing in the names says so.

    `folder` is where the small ones lie, None where nothing has been fetched yet.
    """
    if CONFIG in names:
        return _no_weights(name, names)
    if ADAPTER_CONFIG in names:
        return _adapter(name, folder)
    if any(file.endswith(".gguf") for file in names):
        return _GGUF
    for file, kind in _FOREIGN.items():
        if file in names:
            return Misfit(f"it is {kind} ({file}, no {CONFIG})", _OTHER)
    return None


def by_config(config: ModelConfig, *, code: bool) -> Misfit | None:
    """Return why a model of this config.json cannot be trained on.

    `code`: its author's is there and may run. A model whose type transformers has itself is loaded
    by that, whatever its config offers.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str):
        return None  # files.verify says what is missing
    own = known()
    if kind in own.types:
        if own.types[kind] is None:
            return Misfit(
                f"model_type {kind} is no language model: LLaMA-Factory {own.llamafactory} loads "
                "none of that kind",
                _OTHER,
            )
    elif not (code and "auto_map" in config):
        return _unknown(kind[:60], config)
    for architecture, example in _OTHER_FORMAT.items():
        if architecture in _words(config.get("architectures")):
            return Misfit(
                f"it has its author's own format ({architecture}), which LLaMA-Factory refuses",
                f"name the copy in transformers' format, as {example} is one",
            )
    return _quantized(config)


def by_index(index: ModelConfig, names: Collection[str]) -> Misfit | None:
    """Return which shards an index names that are not there."""
    where = index.get("weight_map")
    shards = set(where.values()) if isinstance(where, dict) else set()
    missing = sorted(str(shard) for shard in shards - set(names))
    # transformers takes model.safetensors first and does not look at an index beside it.
    if not missing or WEIGHTS in names:
        return None
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return Misfit(
        f"its {INDEX} names {missing[0]}{more}, which is not there: the upload is not complete",
        "name another copy of the model, or wait until its author has mended it",
    )


def quantization(config: ModelConfig) -> str | None:
    """Return the method the weights are quantised with; None: they are not."""
    for key in ("quantization_config", "compression_config"):
        stored = config.get(key)
        if isinstance(stored, dict):
            method = stored.get("quant_method")
            # Older files of bitsandbytes say only how.
            if not method and (stored.get("load_in_4bit") or stored.get("load_in_8bit")):
                method = BITSANDBYTES
            return str(method or "an unknown method")[:40]
    return None


def stored_bits(config: ModelConfig) -> int | None:
    """Return how wide bitsandbytes has stored the weights; None: as they are."""
    stored = config.get("quantization_config")
    if quantization(config) != BITSANDBYTES or not isinstance(stored, dict):
        return None
    return 4 if stored.get("load_in_4bit") or stored.get("_load_in_4bit") else 8


def is_tied(config: ModelConfig) -> bool:
    """Return whether head and embedding are one tensor."""
    stored = config.get("tie_word_embeddings")
    if isinstance(stored, bool):
        return stored
    return bool(known().types.get(str(config.get("model_type"))))


_OTHER = "choose another base model; `inv model.list` shows some that work"
_GGUF = Misfit(
    "it has GGUF files only, which are made for inference",
    "name the model that they were made from, the one with .safetensors files",
)


def _no_weights(name: str, names: Collection[str]) -> Misfit | None:
    weights = [file for file in choose(names) if file.endswith(".safetensors")]
    if weights or pickles(names):
        # An adapter's own are no model's.
        real = [file for file in weights if not file.startswith("adapter_model")]
        if real or any(not p.startswith("adapter_model") for p in pickles(names)):
            return None
        return _adapter(name, None)
    if any(file.endswith(".gguf") for file in names):
        return _GGUF
    return None


def _adapter(name: str, folder: Path | None) -> Misfit:
    stored, _ = json_object(folder / ADAPTER_CONFIG) if folder else ({}, "")
    known = str(stored.get("base_model_name_or_path") or "")[:200]
    base = f"`model_name_or_path: {known}`" if known else "its base model as `model_name_or_path`"
    return Misfit(
        f"it is an adapter ({ADAPTER_CONFIG}), no model",
        f"write {base}, and `adapter_name_or_path: {name}`",
    )


def _unknown(kind: str, config: ModelConfig) -> Misfit:
    own = known().transformers
    if release := newer_types().get(kind):
        return Misfit(
            f"model_type {kind} needs transformers >= {release}; this stack has {own}", _OTHER
        )
    if "auto_map" in config:
        return Misfit(
            f"{CONFIG} asks for code of its author (auto_map; model_type {kind!r} is not one of "
            "transformers' own), which is not run",
            "choose another base model; of an author you trust, download it into a folder with its "
            "code, name that as `model_name_or_path`, and add `trust_remote_code=true` to the "
            "command line",
        )
    wrote = str(config.get("transformers_version") or "")
    if _numbers(wrote) > _numbers(own):
        return Misfit(
            f"model_type {kind} is not known to transformers {own}, which this stack has; the "
            f"model was written by {wrote[:20]}",
            _OTHER,
        )
    return Misfit(
        f"model_type {kind} is not known to transformers {own}, which this stack has", _OTHER
    )


def _quantized(config: ModelConfig) -> Misfit | None:
    method = quantization(config)
    if method in (None, BITSANDBYTES):
        return None
    needed = _QUANTIZED.get(str(method))
    why = (
        f"training on it needs {needed}, which the stack has not"
        if needed
        else ("it is made for inference and cannot be trained on")
    )
    return Misfit(
        f"its weights are quantised ({method}): {why}",
        "name the model that it was made from; with `quantization_bit: 4` that one is quantised "
        "while it is loaded",
    )


def _words(value: object) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
