"""What an adapter's own config may not say, whoever loads it. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from tunesmith.core.errors import UsageError
from tunesmith.job.run.stored import read_record

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class _CodeKeys:
    """The keys of an adapter's config that name modules: PEFT imports them."""

    auto_mapping: Any = None
    megatron_config: Any = None


def refuse_code(folder: Path) -> None:
    """Raise UsageError where an adapter's config names code, or cannot be read.

    With a pulled run it comes from a host. A folder without one is no adapter.
    """
    file = folder / ADAPTER_CONFIG
    try:
        config = read_record(file, _CodeKeys, "copy the adapter folder again")
    except FileNotFoundError:
        return
    for key, value in vars(config).items():
        if value:
            raise UsageError(
                f"{file}: {key} is set, which names code: no adapter of ours; "
                f"`rm -r {quote(str(folder))}` deletes it"
            )
