"""What the stack knows of models, as JSON: `python -m tunesmith.job.data.model_facts`.

From the packages themselves, so that a model can be judged by its config.json alone, without
torch, before its weights are fetched: the model types that transformers has and LLaMA-Factory's
loader takes, the tokens its templates put into every prompt, and which template it has for which
model. Read by `tunesmith.basemodel.known`.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

# Where LLaMA-Factory 0.9.3 looks for a model's class, in this order (model/loader.py, load_model);
# the last one takes what no other did.
_LOADERS = ("VISION_2_SEQ", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "TEXT_TO_WAVEFORM")
# What only a chat template writes: <|im_start|>, <start_of_turn>, [INST].
_MARK = re.compile(r"<[^<>\s]{2,40}>|\[/?[A-Z_]{3,}\]")


def types() -> dict[str, bool | None]:
    """Return every model_type of transformers: whether its head is tied to the embedding where
    config.json does not say so, None for one that LLaMA-Factory cannot load."""
    from transformers.models.auto import configuration_auto, modeling_auto

    loadable: set[str] = set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    for loader in _LOADERS:
        loadable |= set(getattr(modeling_auto, f"MODEL_FOR_{loader}_MAPPING_NAMES"))
    found: dict[str, bool | None] = {}
    for name in sorted(configuration_auto.CONFIG_MAPPING_NAMES):
        kind = configuration_auto.CONFIG_MAPPING[name] if name in loadable else None
        found[name] = None if kind is None else bool(_default(kind, "tie_word_embeddings"))
    return found


def _default(kind: Any, key: str) -> Any:
    """Return what a config class has for a key that config.json lacks."""
    named = inspect.signature(kind.__init__).parameters
    if key in named:
        return named[key].default
    # PretrainedConfig takes it from the keywords, True where it is not among them.
    return True


def templates() -> dict[str, dict[str, list[str]]]:
    """Return by template its `tokens`, which the tokenizer must have, and its `marks`: what it
    writes around a question, by which it is told from another."""
    from llamafactory.data.template import TEMPLATES

    found = {}
    for name, template in sorted(TEMPLATES.items()):
        slots = [
            slot
            for part in ("prefix", "system", "user", "assistant")
            for slot in getattr(template, f"format_{part}").slots
        ]
        texts = "".join(slot for slot in slots if isinstance(slot, str))
        tokens = [slot["token"] for slot in slots if isinstance(slot, dict)]
        # The others never stand in a prompt: llama3 has <|eom_id|> for tools, Llama 3.0 has not.
        tokens += [word for word in template.stop_words if word in texts]
        tokens += template.stop_words[:1] if template.replace_eos else []
        asked = "".join(s for s in template.format_user.slots if isinstance(s, str))
        found[name] = {"tokens": _once(tokens), "marks": _once(_MARK.findall(asked))}
    return found


def models() -> Iterator[tuple[str, str]]:
    """Yield the hub's name of each chat model that LLaMA-Factory knows, and its template."""
    from llamafactory.extras.constants import DEFAULT_TEMPLATE, SUPPORTED_MODELS, DownloadSource

    for name, sources in SUPPORTED_MODELS.items():
        if DEFAULT_TEMPLATE.get(name) and DownloadSource.DEFAULT in sources:
            yield str(sources[DownloadSource.DEFAULT]), str(DEFAULT_TEMPLATE[name])


def _once(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(words))


def main() -> int:
    """Print all of it."""
    import llamafactory
    import transformers

    facts: dict[str, Any] = {
        "transformers": transformers.__version__,
        "llamafactory": llamafactory.__version__,
        "types": types(),
        "templates": templates(),
        "models": dict(sorted(models())),
    }
    json.dump(facts, sys.stdout, ensure_ascii=False, indent=1)
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
