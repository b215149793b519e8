"""Models of a real shape with random weights, written tensor by tensor: memory stays small.

Qwen2's names and dtypes, as DeepSeek-R1-Distill-Qwen has them: biases at q, k and v, an untied
head, everything in bfloat16, in files as large as save_pretrained makes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tunesmith.job.merge.tensors import Tensor, beginning

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 8
_SHARD = 5 * 10**9  # bytes
_NOISE = 1 << 22  # numbers drawn once and repeated from changing places
_SPREAD = 0.02
_ONE = 0x3F80  # 1.0 in bfloat16


@dataclass(frozen=True)
class Shape:
    """What decides the size of a Qwen2 model."""

    hidden: int
    inner: int
    vocabulary: int
    layers: int
    heads: int
    pairs: int  # of key and value heads

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of all tensors, in the model's own order."""
        side = self.hidden // self.heads * self.pairs
        found: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary, self.hidden)
        }
        for layer in range(self.layers):
            for name, out in (("q", self.hidden), ("k", side), ("v", side)):
                found[f"model.layers.{layer}.self_attn.{name}_proj.weight"] = (out, self.hidden)
                found[f"model.layers.{layer}.self_attn.{name}_proj.bias"] = (out,)
            found[f"model.layers.{layer}.self_attn.o_proj.weight"] = (self.hidden, self.hidden)
            for name in ("gate", "up"):
                found[f"model.layers.{layer}.mlp.{name}_proj.weight"] = (self.inner, self.hidden)
            found[f"model.layers.{layer}.mlp.down_proj.weight"] = (self.hidden, self.inner)
            for name in ("input_layernorm", "post_attention_layernorm"):
                found[f"model.layers.{layer}.{name}.weight"] = (self.hidden,)
        found["model.norm.weight"] = (self.hidden,)
        found["lm_head.weight"] = (self.vocabulary, self.hidden)
        return found

    def config(self) -> dict[str, object]:
        """Return config.json."""
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "vocab_size": self.vocabulary,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.pairs,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "use_sliding_window": False,
        }


# DeepSeek-R1-Distill-Qwen-1.5B and Qwen2.5-7B.
SMALL = Shape(1536, 8960, 151936, 28, 12, 2)
LARGE = Shape(3584, 18944, 152064, 28, 28, 4)


def write_base(folder: Path, shape: Shape) -> int:
    """Write config.json and the weights; return the weights' bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2))
    files = list(_files({n: Tensor("BF16", s) for n, s in shape.tensors().items()}))
    noise = np.random.default_rng(1).standard_normal(_NOISE, dtype=np.float32) * _SPREAD
    halves = (noise.view(np.uint32) >> 16).astype(np.uint16)
    places = {}
    for number, tensors in enumerate(files, 1):
        name = "model.safetensors"
        if len(files) > 1:
            name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        places |= dict.fromkeys(tensors, name)
        head, starts = beginning(tensors)
        with (folder / name).open("wb") as file:
            file.write(head)
            for at, tensor in enumerate(sorted(starts, key=starts.__getitem__)):
                count = tensors[tensor].size // 2
                if tensor.endswith("norm.weight"):
                    # Near 0 they would silence the model: every loss would be that of a guess.
                    file.write(np.full(count, _ONE, np.uint16).tobytes())
                else:
                    _repeat(file, halves, count, at * 7919)
    total = sum(tensor.size for tensors in files for tensor in tensors.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def write_adapter(folder: Path, shape: Shape, base: Path) -> int:
    """Write a LoRA adapter in float32 on every linear layer; return its bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(2)
    arrays = {}
    for name, size in shape.tensors().items():
        if name.endswith(tuple(f"{target}.weight" for target in TARGETS)):
            lora = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            for side, dims in (("A", (RANK, size[1])), ("B", (size[0], RANK))):
                values = draw.standard_normal(dims, dtype=np.float32) * np.float32(_SPREAD)
                arrays[f"{lora}{side}.weight"] = values
    head, starts = beginning({n: Tensor("F32", a.shape) for n, a in arrays.items()})
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(head)
        for name in sorted(starts, key=starts.__getitem__):
            file.write(arrays[name].tobytes())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": list(TARGETS),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return (folder / "adapter_model.safetensors").stat().st_size


def _files(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield what each file holds: as many as fit, in order."""
    held: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if held and sum(t.size for t in held.values()) + tensor.size > _SHARD:
            yield held
            held = {}
        held[name] = tensor
    yield held


def _repeat(file: BinaryIO, halves: np.ndarray, count: int, start: int) -> None:
    """Write `count` numbers of the noise from place `start` on, over and over."""
    start %= _NOISE
    while count:
        some = min(count, _NOISE - start)
        file.write(memoryview(halves[start : start + some]).cast("B"))
        count, start = count - some, 0
