"""Adapters and models as files: small, whole for every check that reads no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hubserver import safetensors, tiny_model

# One that fits hubserver.tiny_model: its a.weight has 64 rows of 256.
TENSORS = {
    "base_model.model.a.lora_A.weight": (4, 256),
    "base_model.model.a.lora_B.weight": (64, 4),
}
HEAD = {"v_head.summary.weight": (1, 256), "v_head.summary.bias": (1,)}


def adapter_files(seed: int = 0, **config: Any) -> dict[str, bytes]:
    """Return the files of a LoRA adapter of hubserver.tiny_model; `config` is added to its own."""
    own = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["a"]}
    return {
        "adapter_config.json": json.dumps({**own, **config}).encode(),
        "adapter_model.safetensors": safetensors(TENSORS, seed),
    }


def put(folder: Path, files: dict[str, bytes]) -> Path:
    """Write files into a folder, made if need be; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def an_adapter(folder: Path, **config: Any) -> Path:
    """Write an adapter; return its folder."""
    return put(folder, adapter_files(**config))


def a_model(folder: Path) -> Path:
    """Write a model; return its folder."""
    return put(folder, tiny_model())
