"""What a LLaMA-Factory YAML is for, and the verb that runs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Kind = Literal["train", "predict", "merge", "evaluate", "chat"]
# The verb for each; None: none of ours runs it.
VERBS: Mapping[Kind, str] = {
    "train": "inv train --config {file}",
    "predict": "inv predict --config {file}",
    "merge": "inv merge --config {file}",
    "chat": "inv chat --run RUN",
    "evaluate": "inv predict --config {file}",
}


def kind_of(values: Mapping[str, object]) -> Kind:
    """Return what a config asks LLaMA-Factory for, by the keys that only one of its commands reads.

    A file that asks for nothing is for `chat`, `webchat` or `api`: those need no more than a model
    and a template.
    """
    if values.get("do_train"):
        return "train"
    if values.get("export_dir"):
        return "merge"
    if values.get("do_predict") or values.get("predict_with_generate"):
        return "predict"
    if values.get("task") or values.get("do_eval"):
        return "evaluate"
    return "chat"
