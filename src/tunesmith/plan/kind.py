"""What a LLaMA-Factory YAML is for, and the verb that runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from tunesmith.core.errors import UsageError

Kind = Literal["train", "predict", "evaluate loss", "merge", "benchmark", "chat"]
# What runs each; {file} is the config.
REMEDIES: Mapping[Kind, str] = {
    "train": "`inv train --config {file}` runs it",
    "predict": "`inv predict --config {file}` runs it",
    "evaluate loss": "`inv predict --config {file}` runs it",
    "merge": "`inv merge --run RUN` merges what a run has trained, and proves it",
    "benchmark": "no verb runs it: LLaMA-Factory's package lacks the tasks of its benchmarks; "
    "`inv predict` scores a data set",
    "chat": "`inv chat --run RUN`, `inv api --run RUN` and `inv webui` answer",
}
_GPTQ = "no verb runs it: GPTQ needs auto-gptq and optimum, which no lock has; "
_GPTQ += "`inv export --run RUN --format gguf --quantise q4_0` quantises a merged model"


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
    if values.get("do_eval"):
        return "evaluate loss"
    return "benchmark" if values.get("task") else "chat"


def remedy_of(values: Mapping[str, object], file: object) -> str:
    """Return which verb runs a config, or why none does."""
    kind = kind_of(values)
    if kind == "merge" and values.get("export_quantization_bit"):
        return _GPTQ
    return REMEDIES[kind].format(file=file)


def refuse_kind(file: object, values: Mapping[str, object], wanted: Sequence[Kind]) -> None:
    """Raise UsageError for a config that is for something else, with the verb that does it."""
    kind = kind_of(values)
    if kind in wanted:
        return
    also = "; write `do_train: true` for a training" if "train" in wanted else ""
    raise UsageError(
        f"{file}: a config to {kind}, not to {wanted[0]}"
        + (": it has no `do_train: true`" if "train" in wanted else ""),
        hint=f"{remedy_of(values, file)}{also}",
    )
