"""The questions a model is asked before and after training: configs/prompts/*.yaml."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from tunesmith.core.bounded import MOST_OF_YAML, read_text
from tunesmith.core.errors import UsageError


@dataclass(frozen=True)
class Prompt:
    """One question.

    `expect`: regular expression that a good answer holds (re.search), `reference`: an
    answer to show beside the model's, `system`: the system message. Each may be None.
    """

    prompt: str
    expect: str | None = None
    reference: str | None = None
    system: str | None = None


_KEYS = tuple(field.name for field in fields(Prompt))


def load_prompts(path: Path) -> tuple[Prompt, ...]:
    """Read a prompts file. Raises UsageError naming the file and the number of each bad entry."""
    try:
        value = yaml.safe_load(read_text(path, MOST_OF_YAML))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", hint="correct the path") from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path}: not UTF-8 at byte {error.start}", hint="save it as UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        why = str(error) if isinstance(error, ValueError) else "nested too deep to be read"
        raise UsageError(f"{path}: {why}", hint="check that it is a file of prompts") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise UsageError(f"{path}: not YAML{place}: {problem}", hint="correct that line") from error
    if not isinstance(value, dict) or list(value) != ["prompts"]:
        raise UsageError(f"{path}: the one key at the top must be prompts:, found {_told(value)}")
    entries = value["prompts"]
    if not isinstance(entries, list) or not entries:
        raise UsageError(f"{path}: prompts: must be a list with at least one - prompt: QUESTION")
    faults = [
        f"entry {number}: {fault}"
        for number, entry in enumerate(entries, 1)
        for fault in _faults(entry)
    ]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise UsageError(f"{path}: {faults[0]}{more}", detail=faults if more else ())
    return tuple(Prompt(**entry) for entry in entries)


def _told(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__


def _faults(entry: Any) -> list[str]:
    if not isinstance(entry, dict):
        return [f"{entry!r} is no mapping; write - prompt: QUESTION"]
    faults = [
        f"unknown key {key}; known are {', '.join(_KEYS)}" for key in entry if key not in _KEYS
    ]
    for key in _KEYS:
        held = entry.get(key)
        if key == "prompt" and (not isinstance(held, str) or not held.strip()):
            faults.append("no prompt; write prompt: QUESTION")
        elif held is not None and not isinstance(held, str):
            faults.append(f"{key} is {held!r}, not a string; put it in quotes")
    expect = entry.get("expect")
    if isinstance(expect, str):
        try:
            re.compile(expect)
        except re.error as error:
            faults.append(f"expect {expect!r} is no regular expression: {error}; correct it")
    return faults
