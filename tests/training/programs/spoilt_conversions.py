"""Spoil a converted model in three ways, and print what the guard says of each as JSON.

spoilt_conversions.py FOLDER: ways in which a conversion goes wrong without an error. The folder is
not put right again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tunesmith.core.errors import TunesmithError
from tunesmith.job.export.gguf_import import prove


def verdict(folder: Path) -> str:
    """What the guard says."""
    try:
        prove(folder)
    except TunesmithError as error:
        return error.message
    return "no complaint"


def main(folder: Path) -> None:
    """A token before each text, line breaks lost, the last weights zero."""
    said = []
    tokenizer = folder / "tokenizer.json"
    right = json.loads(tokenizer.read_text())
    bos = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    pair = [bos, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}}
    processor = {
        "type": "TemplateProcessing",
        "single": pair,
        "pair": pair,
        "special_tokens": special,
    }
    tokenizer.write_text(json.dumps({**right, "post_processor": processor}))
    said.append(verdict(folder))
    normalizer = {"type": "Replace", "pattern": {"String": "\n"}, "content": ""}
    tokenizer.write_text(json.dumps({**right, "normalizer": normalizer}))
    said.append(verdict(folder))
    tokenizer.write_text(json.dumps(right))
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-200_000_000:] = bytes(200_000_000)
    weights.write_bytes(data)
    said.append(verdict(folder))
    print(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
