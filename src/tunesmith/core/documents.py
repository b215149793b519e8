"""Types of other projects' documents, named after their owner; our own documents have classes.

The other project defines and changes their keys, so a value is read key by key where it is used,
and unread keys pass through unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

# A flat config of LLaMA-Factory 0.9.3: keys of the dataclasses in its hparams/.
Config = Mapping[str, Any]
# The same keys, prepared for one of its functions, which may change them.
Arguments = dict[str, Any]
# config.json, generation_config.json, tokenizer_config.json and tokenizer.json of a model folder.
ModelConfig = Mapping[str, Any]
# A JSON object from another program's answer or file.
JsonObject = dict[str, Any]
# Rows, or columns by name, as the datasets library and trainers pass them.
Columns = dict[str, Any]
# {"role": "user" | "assistant" | ..., "content": str}
Message = Mapping[str, str]


class AlignedRow(TypedDict):
    """A row of data after LLaMA-Factory's converter (data/converter.py)."""

    _prompt: list[Message]
    _response: list[Message]
    _system: str
    _tools: str
    _images: list[Any] | None
    _videos: list[Any] | None
    _audios: list[Any] | None


class TokenizedRow(TypedDict):
    """A row after LLaMA-Factory's processor: three lists of equal length, and media."""

    input_ids: list[int]
    attention_mask: list[int]
    labels: list[int]
    images: list[Any] | None
    videos: list[Any] | None
    audios: list[Any] | None
