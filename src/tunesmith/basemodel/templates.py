"""Whether a template of LLaMA-Factory fits a model, told from the tokenizer's files.

Nothing of a model is run for it: a chat template is text to look into. Standard library, Python
3.10.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tunesmith.basemodel.files import json_object
from tunesmith.basemodel.known import known
from tunesmith.core.bounded import read_bytes

# Where a tokenizer keeps its vocabulary; in .model and .tiktoken as plain bytes between others.
_VOCABULARIES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "added_tokens.json")
_NEAREST = 3  # templates named in a hint
# Of those that write the same, the ones that most people mean.
_USUAL = ("chatml", "qwen", "llama3", "mistral", "gemma", "deepseek3", "phi4", "zephyr")


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a model as its tokenizer loads it: `text`, or `names` of several."""

    text: str
    names: tuple[str, ...] = ()


def chat_template(folder: Path) -> ChatTemplate | None:
    """Return a model's chat template; None: it has none.

    The file beats the key, as in transformers 4.52.4 (tokenization_utils_base.py).
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        return ChatTemplate(read_bytes(file).decode("utf-8", "replace"))
    stored, _ = json_object(folder / "tokenizer_config.json")
    value = stored.get("chat_template")
    if isinstance(value, str):
        return ChatTemplate(value)
    if isinstance(value, list):
        named = [one for one in value if isinstance(one, dict)]
        names = tuple(str(one.get("name"))[:40] for one in named)
        return ChatTemplate("\n".join(str(one.get("template")) for one in named), names)
    return None


def missing_tokens(folder: Path, template: str) -> tuple[str, ...]:
    """Return the tokens of a template that a model's tokenizer has not."""
    wanted = known().templates[template].tokens if template in known().templates else ()
    return tuple(token for token in wanted if not _has(folder, token)) if wanted else ()


def own_template(name: str) -> str | None:
    """Return the template that LLaMA-Factory itself has for a model of the hub."""
    return known().models.get(name)


def is_other(template: str, chat: ChatTemplate) -> bool:
    """Whether a template asks otherwise than a model's own chat template does.

    Looked at is what it writes around a question: one of these stands in the other, or it is
    another prompt.
    """
    marks = known().templates[template].marks if template in known().templates else ()
    return bool(marks) and not any(mark in chat.text for mark in marks)


def nearest(chat: ChatTemplate | None) -> tuple[str, ...]:
    """Return templates of LLaMA-Factory that write what a chat template writes."""
    if chat is None:
        return ()
    found = [
        name
        for name, one in known().templates.items()
        if one.marks and all(mark in chat.text for mark in (*one.marks, *one.tokens))
    ]
    usual = [name for name in _USUAL if name in found]
    return tuple((usual or found)[:_NEAREST])


def _has(folder: Path, token: str) -> bool:
    return any(form in data for data, forms in _searched(folder, token) for form in forms)


def _searched(folder: Path, token: str) -> Iterator[tuple[bytes, tuple[bytes, ...]]]:
    """Yield each vocabulary with how a token would stand in it.

    Searched, not parsed: a tokenizer.json of 17 MB costs milliseconds so.
    """
    quoted = tuple({json.dumps(token, ensure_ascii=flag).encode() for flag in (True, False)})
    for name in _VOCABULARIES:
        if (folder / name).is_file():
            yield read_bytes(folder / name), quoted
    for file in (*folder.glob("*.model"), *folder.glob("*.tiktoken")):
        yield file.read_bytes(), (token.encode(),)
