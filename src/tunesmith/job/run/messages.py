"""Sentences of LLaMA-Factory 0.9.3, found in a text: of which class, of which keys, what to do."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from tunesmith.job.run.config_messages import CONFIG, REMEDIES
from tunesmith.job.run.data_messages import DATA, MODEL

# Stands in a sentence for what differs each time.
HOLE = "{}"


@dataclass(frozen=True)
class Known:
    """A sentence: the failure's class, the keys of a config it speaks of, and a remedy or ""."""

    sentence: str
    failure: str
    keys: tuple[str, ...] = ()
    remedy: str = ""


@functools.cache
def known() -> tuple[Known, ...]:
    """Return every sentence, the longest first: one may be a part of another."""
    config = {
        text: Known(text, "config", tuple(keys.split()), REMEDIES.get(text, ""))
        for sentences in CONFIG.values()
        for text, keys in sentences.items()
    }
    others = [
        Known(text, failure)
        for failure, table in (("data", DATA), ("model", MODEL))
        for sentences in table.values()
        for text in sentences
    ]
    return tuple(sorted((*config.values(), *others), key=lambda item: -len(item.sentence)))


def find(text: str) -> Known | None:
    """Return the sentence that a text holds, the first of `known`; None where it holds none."""
    return next((item for item in known() if _pattern(item.sentence).search(text)), None)


@functools.cache
def _pattern(sentence: str) -> re.Pattern[str]:
    # Within one line: `File {} not found.` must not begin in a traceback and end elsewhere.
    parts = [re.escape(part) for part in sentence.split(HOLE) if part]
    return re.compile(".{1,2000}?".join(parts))
