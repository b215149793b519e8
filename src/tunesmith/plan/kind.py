"""What a LLaMA-Factory YAML is for, and the verb that runs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Kind = Literal["train", "predict", "merge", "evaluate", "chat"]
# The verb that runs each, where one of ours does.
VERBS: Mapping[Kind, str] = {
    "predict": "inv predict --config {file}",
    "merge": "inv merge --run RUN",
    "chat": "inv chat --run RUN",
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
