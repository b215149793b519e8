"""Which files of a run leave its host, and which are taken: an allow-list, used at both ends.

A run is data: text, JSON, safetensors, GGUF. Code, pickles, links, pipes and devices are never
part of one, whoever offers them. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tunesmith.core.bounded import MOST_OF_YAML
from tunesmith.job.run.folder import MERGED

RECORD = "record"
# The folders of a pull, and the part each belongs to. `bundle` is what a merge on another machine
# needs besides the adapter.
FOLDERS = {
    "output": "adapter",
    "bundle": "adapter",
    "merged": MERGED,
    "predict": "predict",
    "export": "export",
}
# Files of one pull; of the largest models a few hundred.
MOST_FILES = 4096
_DEEPEST = 3  # folders below RUN
_LONGEST = 120  # characters of a name

# What describes a run: these files, beside the folders.
_RECORD = frozenset(
    {
        "run.json",
        "config.yaml",
        "status.json",
        "events.jsonl",
        "heartbeat.json",
        "adjustments.json",
        "versions.json",
        "before.jsonl",
        "after.jsonl",
        "evaluation.json",
        "proof.json",
        "parity.json",
        "export.json",
        "seals.json",
    }
)
_LOG = re.compile(r"[a-z][a-z_-]*\.log")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@-]*")
# Of weights, tokenizers and results.
_SUFFIXES = {
    "output": (".safetensors", ".json", ".jsonl", ".jinja", ".txt", ".model", ".tiktoken", ".md"),
    "bundle": (".json", ".jsonl", ".jinja", ".txt", ".model", ".tiktoken"),
    "merged": (".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken"),
    "predict": (".json", ".jsonl", ".txt", ".csv"),
    "export": (".gguf", ".json", ".safetensors", ".jinja", ".txt", ".model", ".tiktoken"),
}
_WHOLE_NAMES = ("Modelfile", "README.md", "LICENSE", "NOTICE")
# Bytes: weights, then what grows with a run, then what is read in one piece.
_LARGEST = (
    ((".safetensors", ".gguf"), 4 << 40),
    ((".jsonl", ".log", ".csv"), 8 << 30),
    ((".yaml",), MOST_OF_YAML),
    ((), 64 << 20),
)
# What lies in a run folder as a rule and is not for others: our own pages (each machine makes
# them of the data), marks, locks and the trainer's pickle. Left without a word.
_STAYS = re.compile(
    r"(?:.*/)?(?:\..*|.*\.lock|.*\.html|.*\.png|.*\.svg|report\.md|training_args\.bin|events\.out\.tfevents.*)"
)


def part_of_allowed(name: str) -> str | None:
    """Return the part of a pull that a file belongs to, by its name below RUN; None: to none.

    `name` has parts of ordinary characters, of which none begins with a dot or a dash.
    """
    parts = name.split("/")
    plain = all(len(part) <= _LONGEST and _NAME.fullmatch(part) for part in parts)
    if not plain or len(parts) > _DEEPEST:
        return None
    folder, own = parts[0], parts[-1]
    if len(parts) == 1:
        if own in _RECORD:
            return RECORD
        return "log" if _LOG.fullmatch(own) else None
    if folder not in FOLDERS:
        return None
    fits = own.endswith(_SUFFIXES[folder]) or own in _WHOLE_NAMES
    return FOLDERS[folder] if fits else None


def stays(name: str) -> bool:
    """Return whether a file is one that is left where it is as a rule."""
    return _STAYS.fullmatch(name) is not None


def largest(name: str) -> int:
    """Return how many bytes a file of this name may have."""
    return next(size for suffixes, size in _LARGEST if not suffixes or name.endswith(suffixes))


def told(names: Iterable[str], count: int) -> str:
    """Return some of `count` names as one line of printable characters."""
    shown = [ascii(name) if len(name) <= 60 else f"{name[:60]!a}..." for name in names]
    more = f" and {count - len(shown)} more" if count > len(shown) else ""
    return ", ".join(shown) + more
