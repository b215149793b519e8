"""`inv host.check`: the verdicts on a host, printed; a critical one ends with exit code 1."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from rich.text import Text

from tunesmith.cli.console import console, moving, write
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.doctor.check import Checked, check
from tunesmith.project import Project

_STYLES = {
    "pass": "green",
    "info": "cyan",
    "warning": "yellow",
    "critical": "bold red",
    "unknown": "magenta",
}
_LEVEL, _WHAT = 10, 15  # columns


def host_check(
    root: Path, on: str, *, mirror: str, flavour: str | None, as_json: bool, config: str = ""
) -> None:
    """Check a host and print a verdict a line, or one JSON object.

    Raises TunesmithError (exit code 1) when a verdict is critical.
    """
    if "," in on:
        raise UsageError(f"--on {on}: one host at a time", hint="`inv host.list` shows them")
    # A reader of JSON wants nothing else.
    with contextlib.nullcontext() if as_json else moving(f"{on}: checking"):
        training = Path(config) if config else None
        checked = check(Project.at(root), on, mirror, flavour or None, training)
    if as_json:
        write(json.dumps(checked.to_json(), ensure_ascii=False, indent=2) + "\n")
    else:
        for line in lines(checked):
            console.print(line, soft_wrap=True)
    if checked.exit_code:
        count = checked.counts["critical"]
        raise TunesmithError(
            f"{on} is not fit: {count} critical verdict{'s' if count > 1 else ''}",
            hint="each has its fix beside it, above",
        )


def lines(checked: Checked) -> list[Text]:
    """Return the verdicts as people read them: level, what, text, and the fix below."""
    found = []
    for verdict in checked.verdicts:
        line = Text(f"{verdict.level:<{_LEVEL}}", style=_STYLES[verdict.level])
        line.append(f"{verdict.what:<{_WHAT}}{verdict.text}", style="default")
        found.append(line)
        if verdict.fix:
            found.append(Text(f"{'':<{_LEVEL + _WHAT}}-> {verdict.fix}"))
    return found
