"""Which trainings end in a result that a merge can make and a proof can compare. Pure.

Asked before a training that is to be merged (`--then merge`) and before each merge. Standard
library, Python 3.10.
"""

from __future__ import annotations

from tunesmith.basemodel.architecture import EMBEDDINGS, Misfit, is_tied, quantization
from tunesmith.core.documents import Config, ModelConfig

_NEW_TOKENS = ("resize_vocab", "add_tokens", "add_special_tokens")
_WITHOUT = "train without `--then merge`"


def by_settings(values: Config) -> Misfit | None:
    """Return why a training by this config cannot be merged, whatever its base model is."""
    tuning = values.get("finetuning_type", "lora")
    if tuning != "lora":
        return Misfit(
            f"finetuning_type {tuning} trains the model's own weights: there is no adapter to "
            f"merge, {values.get('output_dir', 'the output')} is the whole model already",
            f"{_WITHOUT}; the result needs no merge",
        )
    for key in _NEW_TOKENS:
        if values.get(key):
            return Misfit(
                f"{key}: a merged model with a changed vocabulary cannot be compared with its "
                "base tensor by tensor",
                f"{_WITHOUT}, export it with `llamafactory-cli export` and test it yourself",
            )
    return None


def by_model(values: Config, model: ModelConfig) -> Misfit | None:
    """Return why a training by this config cannot be merged into a base model of this config.json.

    A head that is tied to the embedding is one tensor in the merged model, which is loaded as
    either; trained apart they are two.
    """
    if method := quantization(model):
        return Misfit(
            f"base model is quantized ({method}); adapters merge only into full weights",
            "give the unquantized model as model_name_or_path; `quantization_bit: 4` quantises it "
            "while it is loaded",
        )
    for key in ("additional_target", "lora_target"):
        touched = sorted(EMBEDDINGS & set(_names(values.get(key))))
        if touched and is_tied(model):
            return Misfit(
                f"{key} trains {' and '.join(touched)}, but head and embedding of this model are "
                "one tensor (tie_word_embeddings): trained apart, they cannot be merged into one",
                f"remove them from `{key}`, or {_WITHOUT}",
            )
    return None


def _names(value: object) -> list[str]:
    words = value if isinstance(value, list) else str(value or "").split(",")
    return [str(word).strip() for word in words]
