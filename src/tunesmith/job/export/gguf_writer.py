"""A model folder as one GGUF file, written with the `gguf` package, quantised on request.

It does the same as llama.cpp's convert_hf_to_gguf.py for these architectures: names by gguf's
tensor map, Q and K of llama reordered for its rotary halves, the tokenizer as vocabulary, types and
merges. Tensors pass through memory one at a time. Other architectures, tokenizers and
quantisations are refused by name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.basemodel.files import tensor_shapes
from tunesmith.core.documents import ModelConfig
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import read_json, replacing
from tunesmith.job.merge.weights import TensorReader
from tunesmith.job.prompts import templates

ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}
# The types that gguf's quants.py can write; each name is a member of GGMLQuantizationType.
QUANTISATIONS = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
_STORED = {"BF16": "bf16", "F16": "f16", "F32": "f32"}
_BLOCK = 32  # elements that share a scale: a row must be a multiple of it
# sha256 of the split expressions of tokenizer.json -> name of the pre-tokenizer in llama.cpp,
# as in Ollama's import (ollama, convert/tokenizer.go).
PRE_TOKENIZERS = {
    "d98f9631be1e9607a9848c26c1f9eac1aa9fc21ac6ba82a2fc0741af9780a48f": "llama-bpe",
    "03df5c5863ad70781dcfdef491ead25140f895fe8010964be0daefe27be32b02": "deepseek-llm",
    "21cde974d587f0d54dc8d56b183cc1e6239600172035c68fbd6d4b9f8da0576e": "deepseek-coder",
    "1ff7f41064896984db5d1bb6ff64fa4bc29007d08c1b439e505b7392777a319e": "qwen2",
}
# The largest error of an element in a type, relative to the largest element of the tensor: the
# step of its scale, plus a tenth for the scale's own 16 bits; half a unit in the last place for
# floats.
_COARSE = {
    "q8_0": 1.1 / 127,
    "q5_0": 1.1 / 15,
    "q5_1": 1.1 / 15,
    "q4_0": 1.1 / 7,
    "q4_1": 1.1 / 7,
    "bf16": 2.0**-8,
    "f16": 2.0**-11,
}
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # gguf.constants.TokenType


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer's part of a GGUF."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre: str
    special: Mapping[str, int]  # bos, eos, unk, pad -> id


def why_not(folder: Path) -> str | None:
    """Return why this model cannot be written here, None if it can."""
    config = read_json(folder / "config.json")
    name = next(iter(config.get("architectures") or ["none"]))
    if name not in ARCHITECTURES:
        return f"architecture {name} (known: {', '.join(ARCHITECTURES)})"
    for key in ("rope_scaling", "attention_bias", "mlp_bias", "use_sliding_window"):
        if config.get(key):
            return f"{key} {json.dumps(config[key])} of {name}"
    if pre_tokenizer(folder) is None:
        return "the pre-tokenizer of its tokenizer.json"
    return None


def default_quantisation(folder: Path) -> str:
    """Return the type name of the unquantised weights."""
    dtypes = {dtype for dtype, _ in tensor_shapes(folder).values()}
    return next((name for dtype, name in _STORED.items() if dtype in dtypes), "f32")


def pre_tokenizer(folder: Path) -> str | None:
    """Return llama.cpp's name of the pre-tokenizer, None if it has none."""
    digest = split_digest(folder)
    if digest in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[digest]
    steps = _steps(folder)
    kinds = [(step["type"], bool(step.get("individual_digits"))) for step in steps]
    return "smollm" if kinds == [("Digits", True), ("ByteLevel", False)] else None


def split_digest(folder: Path) -> str:
    """Return the sha256 of the tokenizer's split expressions, by which Ollama identifies it."""
    digest = hashlib.sha256()
    for step in _steps(folder):
        if step["type"] == "Split":
            digest.update(str(step.get("pattern", {}).get("Regex", "")).encode())
    return digest.hexdigest()


def write(folder: Path, out: Path, quantise: str) -> None:
    """Write the model of `folder` to `out`, completely or not at all.

    Raises UsageError if it cannot be written (why_not, or an unsupported quantisation).
    """
    import gguf

    reason = why_not(folder)
    if reason:
        raise UsageError(f"{folder}: {reason} cannot be written as GGUF here")
    if quantise not in QUANTISATIONS:
        raise UsageError(f"quantisation {quantise!r}: expected one of {', '.join(QUANTISATIONS)}")
    config = read_json(folder / "config.json")
    arch = ARCHITECTURES[config["architectures"][0]]
    with replacing(out) as part, TensorReader(folder) as reader:
        writer = gguf.GGUFWriter(part, arch)
        _metadata(writer, folder, config, quantise)
        _vocabulary(writer, read_vocabulary(folder), folder)
        plan = list(_plan(folder, config, arch, quantise))
        for name, _, shape, kind in plan:
            stored, itemsize = _stored(kind)
            bytes_shape = (
                gguf.quant_shape_to_byte_shape(shape, kind) if itemsize == 1 else tuple(shape)
            )
            size = itemsize
            for length in bytes_shape:
                size *= length
            writer.add_tensor_info(name, bytes_shape, stored, size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, source, _, kind in plan:
            values = _values(reader, source, config, arch)
            writer.write_tensor_data(gguf.quants.quantize(values, kind))
        writer.close()


@dataclass(frozen=True)
class Figures:
    """The result of comparing a GGUF with its model."""

    tensors: int
    max_difference: float  # of an element, absolute


def check(folder: Path, file: Path) -> Figures:
    """Read a GGUF back and compare every tensor with the folder's; return the figures.

    Unquantised tensors must be equal, others within the resolution of their scale. Raises
    TunesmithError for the first that is not.
    """
    import gguf
    import numpy as np

    config = read_json(folder / "config.json")
    arch = ARCHITECTURES[config["architectures"][0]]
    written = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    names = gguf.get_tensor_name_map(_model_arch(arch), config["num_hidden_layers"])
    shapes = tensor_shapes(folder)
    worst, count = 0.0, 0
    with TensorReader(folder) as reader:
        for source in _sources(folder, config):
            name = names.get_name(source, try_suffixes=(".weight", ".bias"))
            if name not in written:
                raise TunesmithError(f"{file}: has no {name}")
            tensor = written.pop(name)
            values = _values(reader, source, config, arch)
            back = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(values.shape)
            off = float(np.abs(back - values).max())
            kind = tensor.tensor_type.name.lower()
            same = kind in ("f32", _STORED.get(shapes[source][0]))
            allowed = 0.0 if same else _COARSE[kind] * float(np.abs(values).max()) + 2.0**-24
            if not off <= allowed:
                raise TunesmithError(f"{file}: {name} is off by {off:.3g}, {allowed:.3g} allowed")
            worst, count = max(worst, off), count + 1
    if written:
        raise TunesmithError(
            f"{file}: contains {sorted(written)[0]}, which the model does not have"
        )
    return Figures(count, float(f"{worst:.6g}"))


def read_vocabulary(folder: Path) -> Vocabulary:
    """Return the vocabulary of a byte-level BPE tokenizer.json, padded to the embedding's rows."""
    tokenizer = read_json(folder / "tokenizer.json")
    config = read_json(folder / "config.json")
    settings = read_json(folder / "tokenizer_config.json")
    model, pre = tokenizer["model"], pre_tokenizer(folder)
    if model["type"] != "BPE" or pre is None:
        raise UsageError(
            f"{folder}: its tokenizer ({model['type']}) is none of {_supported_names()}"
        )
    by_id = {number: (token, _NORMAL) for token, number in model["vocab"].items()}
    for added in tokenizer.get("added_tokens", []):
        kind = _CONTROL if added["special"] else _USER_DEFINED
        by_id[added["id"]] = (added["content"], kind)
    size = max(int(config["vocab_size"]), max(by_id) + 1)
    # Rows of the embedding without a token; llama.cpp needs a name for each.
    rows = [by_id.get(number, (f"[PAD{number}]", _UNUSED)) for number in range(size)]
    ids = {token: number for number, (token, _) in by_id.items()}
    special = {}
    for name in ("bos", "eos", "unk", "pad"):
        token = settings.get(f"{name}_token")
        text = token["content"] if isinstance(token, Mapping) else token
        if text in ids:
            special[name] = ids[text]
    return Vocabulary(
        [token for token, _ in rows],
        [kind for _, kind in rows],
        [m if isinstance(m, str) else " ".join(m) for m in model["merges"]],
        pre,
        special,
    )


def _supported_names() -> str:
    return ", ".join(["smollm", *PRE_TOKENIZERS.values()])


def _steps(folder: Path) -> list[ModelConfig]:
    step = read_json(folder / "tokenizer.json").get("pre_tokenizer") or {}
    steps: list[ModelConfig] = step.get("pretokenizers") or ([step] if step else [])
    return steps


def _metadata(writer: Any, folder: Path, config: ModelConfig, quantise: str) -> None:
    import gguf

    heads = int(config["num_attention_heads"])
    writer.add_name(folder.parent.name)
    writer.add_file_type(_file_type(quantise))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_rope_freq_base(float(config.get("rope_theta") or 10000.0))
    width = int(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_rope_dimension_count(width)
    writer.add_vocab_size(int(config["vocab_size"]))


def _file_type(quantise: str) -> int:
    import gguf

    name = "ALL_F32" if quantise == "f32" else f"MOSTLY_{quantise.upper()}"
    return int(gguf.LlamaFileType[name])


def _vocabulary(writer: Any, vocabulary: Vocabulary, folder: Path) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    for name, number in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(templates.adds_bos(folder))
    template = folder / templates.CHAT_TEMPLATE
    if template.is_file():
        writer.add_chat_template(template.read_text(encoding="utf-8"))


def _sources(folder: Path, config: ModelConfig) -> Iterator[str]:
    """Yield the names of the tensors to write; a head tied to the embedding is not one."""
    for name in tensor_shapes(folder):
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        if not name.endswith("rotary_emb.inv_freq"):
            yield name


def _plan(
    folder: Path, config: ModelConfig, arch: str, quantise: str
) -> Iterator[tuple[str, str, tuple[int, ...], Any]]:
    """Yield (name in the file, name in the folder, shape, type) of every tensor."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    names = gguf.get_tensor_name_map(_model_arch(arch), config["num_hidden_layers"])
    shapes = tensor_shapes(folder)
    for source in _sources(folder, config):
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UsageError(f"{folder}: {source} has no place in a {arch} GGUF")
        shape = shapes[source][1]
        kind = kinds[quantise.upper()]
        if len(shape) == 1:
            kind = kinds.F32
        elif quantise.startswith("q") and shape[-1] % _BLOCK:
            kind = kinds.F16
        elif quantise[:2] in ("q4", "q5") and name in ("token_embd.weight", "output.weight"):
            # As in llama.cpp: the first and the last matrix suffer most from coarse steps.
            kind = kinds.Q8_0
        yield name, source, shape, kind


def _model_arch(arch: str) -> Any:
    import gguf

    return next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)


def _stored(kind: Any) -> tuple[Any, int]:
    """Return NumPy's dtype of a written tensor, and the bytes of one item."""
    import numpy as np

    plain = {"F32": (np.dtype(np.float32), 4), "F16": (np.dtype(np.float16), 2)}
    return plain.get(kind.name, (np.dtype(np.uint8), 1))


def _values(reader: TensorReader, name: str, config: ModelConfig, arch: str) -> Any:
    """Return a tensor as a float32 array of its shape, in the order of llama.cpp."""
    values = reader.get(name).float().numpy()
    if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = int(config["num_attention_heads"])
        if "k_proj" in name:
            heads = int(config.get("num_key_value_heads") or heads)
        # transformers stores the two halves of a rotation apart, llama.cpp interleaved.
        split = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        values = split.swapaxes(1, 2).reshape(values.shape)
    return values
