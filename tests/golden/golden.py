"""Expectations kept as data: a YAML file with what is given and what came of it.

A test that finds something else fails with the difference; with TUNESMITH_UPDATE_GOLDEN=1 it
writes what it found into the file instead, to be read in the diff of a commit.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any

import yaml

_UPDATE = "TUNESMITH_UPDATE_GOLDEN"


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, no aliases."""

    def ignore_aliases(self, _data: object) -> bool:
        return True


def _text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def dumped(value: Any) -> str:
    """Return a value as YAML."""
    return yaml.dump(value, Dumper=_Dumper, allow_unicode=True, sort_keys=False, width=100)


def load(file: Path) -> dict[str, Any]:
    """Return the content of a golden file."""
    content: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return content


def hold(file: Path, **found: Any) -> None:
    """Assert that what was found is what the file ends with, key by key; or write that anew.

    What is given stands before it, and stays as it was written, comments too.
    """
    text = file.read_text(encoding="utf-8")
    given = re.split(rf"(?m)^(?:{'|'.join(found)}):", text)[0]
    after = given + dumped(found)
    if os.environ.get(_UPDATE):
        file.write_text(after, encoding="utf-8")
        return
    lines = [one.splitlines() for one in (text, after)]
    change = "\n".join(difflib.unified_diff(*lines, "expected", "found", lineterm="", n=2))
    assert not change, f"{file.name} differs; if it should, {_UPDATE}=1 writes it anew:\n{change}"
