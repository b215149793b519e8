"""The texts of a row: what is asked and what is answered, whatever the format."""

from __future__ import annotations

from tunesmith.core.documents import JsonObject
from tunesmith.dataset.entry import Entry


def texts_of(value: JsonObject, entry: Entry) -> tuple[str, str]:
    """Return (question, answer) of a row as far as they are text; of pairs the chosen answer.

    In a conversation the answer is its last message, the question all before it.
    """
    if entry.formatting == "sharegpt":
        content = entry.tag("content_tag") or ""
        messages = value.get(entry.column("messages") or "")
        said = [
            str(message.get(content) or "")
            for message in (messages if isinstance(messages, list) else ())
            if isinstance(message, dict)
        ]
        chosen = value.get(entry.column("chosen") or "")
        if entry.ranking and isinstance(chosen, dict):
            said.append(str(chosen.get(content) or ""))
        return "\n".join(said[:-1]), said[-1] if said else ""
    asked = [value.get(entry.column(role) or "") for role in ("prompt", "query")]
    answer = value.get(entry.column("chosen" if entry.ranking else "response") or "")
    question = "\n".join(text for text in asked if isinstance(text, str) and text)
    return question, answer if isinstance(answer, str) else ""
