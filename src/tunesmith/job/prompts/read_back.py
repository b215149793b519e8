"""Whether a template that was read from a model is read from its export as the same one.

A config that names no template has the one that LLaMA-Factory reads from the model's chat template.
A merged model is asked so, too, by chat, API and proof: from its own chat template.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tunesmith.job.inference.engine import Codec
from tunesmith.job.prompts import templates
from tunesmith.job.run.failures import JobError


def require(codec: Codec, folder: Path, asked: Callable[[Codec], list[list[int]]]) -> None:
    """Raise JobError where a template of no name is read from `folder` as another one.

    `asked` returns the prompts' ids that a codec makes.
    """
    if not templates.is_read(codec.template):
        return
    again = _again(codec, folder)
    if again is None or asked(again) != asked(codec):
        raise JobError(
            "config",
            "`template` is missing, and the chat template that the merged model needs is none "
            "that LLaMA-Factory reads as it was trained: write the template of its family and "
            "train again",
        )


def _again(codec: Codec, folder: Path) -> Codec | None:
    """Return the codec of the template that `folder` has; None where none can be read."""
    from llamafactory.data.template import parse_template
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False
    )
    try:
        template = parse_template(tokenizer)
    except ValueError:  # a part of it has no place for a text
        return None
    template.enable_thinking = codec.template.enable_thinking
    return replace(codec, template=template)
