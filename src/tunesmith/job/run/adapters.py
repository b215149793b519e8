"""What an adapter's own config may not say, whoever loads it. Standard library only."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

from tunesmith.core.errors import UsageError
from tunesmith.job.run.shapes import anything
from tunesmith.job.run.stored import read_object

ADAPTER_CONFIG = "adapter_config.json"
# PEFT imports the modules these name, when it loads the adapter.
_NAME_CODE = ("auto_mapping", "megatron_config")


def refuse_code(folder: Path) -> None:
    """Raise UsageError where an adapter's config names code, or cannot be read.

    With a pulled run it comes from a host. A folder without one is no adapter.
    """
    file = folder / ADAPTER_CONFIG
    try:
        config = read_object(file, anything, "copy the adapter folder again")
    except FileNotFoundError:
        return
    for key in _NAME_CODE:
        if config.get(key):
            raise UsageError(
                f"{file}: {key} is set, which names code: no adapter of ours; "
                f"`rm -r {quote(str(folder))}` deletes it"
            )
