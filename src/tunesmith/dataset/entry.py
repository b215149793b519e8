"""One entry of dataset_info.json, read as LLaMA-Factory 0.9.3 reads it (data/parser.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.core.documents import JsonObject
from tunesmith.core.errors import UsageError

FORMATTINGS = ("alpaca", "sharegpt")
ANSWER_ROLES = ("response", "chosen", "rejected", "kto_tag")
# What people call the one column of a text to go on training with.
TEXT_COLUMNS = ("text", "content")
SHARED_ROLES = ("system", "tools", "images", "videos", "audios")
ROLES = ("prompt", "query", "history", "messages", *ANSWER_ROLES, *SHARED_ROLES)
REMOTE_SOURCES = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")

COLUMN_DEFAULTS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "messages": "conversations",
}
TAG_DEFAULTS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}


@dataclass(frozen=True)
class Entry:
    """A data set: where its rows lie and what their columns are called.

    `columns` and `tags` are as written, None when the entry has none: then, and only
    then, LLaMA-Factory's defaults hold. A role that a written `columns` or `tags`
    leaves out does not exist. `other` holds every further key unchanged.
    """

    key: str | None = None
    file_name: str | None = None
    formatting: str = "alpaca"
    columns: Mapping[str, str] | None = None
    tags: Mapping[str, str] | None = None
    other: JsonObject = field(default_factory=dict)

    @property
    def ranking(self) -> bool:
        """Whether the rows are pairs of a chosen and a rejected answer."""
        return bool(self.other.get("ranking", False))

    @property
    def remote(self) -> str | None:
        """The hub, script or cloud address the rows come from, or None for a file."""
        for name in REMOTE_SOURCES:
            if name in self.other:
                return f"{name} {self.other[name]}"
        return None

    def column(self, role: str) -> str | None:
        """Return the column that plays `role`, or None."""
        return (COLUMN_DEFAULTS if self.columns is None else self.columns).get(role)

    def tag(self, role: str) -> str | None:
        """Return the message key or role name that plays `role`, or None."""
        return (TAG_DEFAULTS if self.tags is None else self.tags).get(role)

    def used_roles(self) -> tuple[str, ...]:
        """Return the roles whose columns LLaMA-Factory's converter reads."""
        own = ("messages",) if self.formatting == "sharegpt" else ("prompt", "query", "history")
        if self.ranking:
            answers: tuple[str, ...] = ("chosen", "rejected")
        else:
            answers = ("response",) if self.formatting == "alpaca" else ()
        return (*own, *answers, "kto_tag", *SHARED_ROLES)

    def stage(self) -> str:
        """Return the training stage the entry is made for: sft, pt (texts), rm (pairs) or kto."""
        if self.ranking:
            return "rm"
        alone = self.columns is not None and not self.columns.keys() & set(ANSWER_ROLES)
        if alone and self.formatting == "alpaca" and self.column("prompt") in TEXT_COLUMNS:
            return "pt"
        return "kto" if self.column("kto_tag") else "sft"

    def path(self, dataset_dir: Path) -> Path:
        """Return the data file; an absolute file_name stays what it is."""
        assert self.file_name is not None, "a remote entry has no file"
        return dataset_dir / self.file_name

    def to_raw(self) -> JsonObject:
        """Return the entry as dataset_info.json holds it."""
        raw: JsonObject = {}
        if self.file_name is not None:
            raw["file_name"] = self.file_name
        raw["formatting"] = self.formatting
        raw.update(self.other)
        if self.columns is not None:
            raw["columns"] = dict(self.columns)
        if self.tags is not None:
            raw["tags"] = dict(self.tags)
        return raw


def entry_from_raw(key: str, raw: Any, registry: Path) -> Entry:
    """Read one entry. Raises UsageError naming the registry file and the key."""
    if not isinstance(raw, dict):
        raise UsageError(
            f"{registry}: data set {key} is not an object but {raw!r}",
            hint=f'write "{key}": {{"file_name": "{key}.json"}}',
        )
    for name in ("columns", "tags"):
        value = raw.get(name)
        if name in raw and not (
            isinstance(value, dict) and all(isinstance(v, str) for v in value.values())
        ):
            raise UsageError(
                f"{registry}: data set {key}: {name} must map names to names, found {value!r}"
            )
    if "file_name" in raw and not (isinstance(raw["file_name"], str) and raw["file_name"]):
        raise UsageError(
            f"{registry}: data set {key}: file_name must be a file's name, "
            f"found {raw['file_name']!r}"
        )
    if "file_name" not in raw and not any(name in raw for name in REMOTE_SOURCES):
        raise UsageError(
            f"{registry}: data set {key} has no file_name",
            hint=f"register it again with `inv data.register --file FILE --key {key} --replace`",
        )
    known = ("file_name", "formatting", "columns", "tags")
    return Entry(
        key=key,
        file_name=raw.get("file_name"),
        formatting=str(raw.get("formatting", "alpaca")),
        columns=raw.get("columns"),
        tags=raw.get("tags"),
        other={name: value for name, value in raw.items() if name not in known},
    )
