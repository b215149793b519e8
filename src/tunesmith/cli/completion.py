"""What a shell offers after TAB: verbs, options, and values that this machine knows.

Nothing is asked of a host, and nothing but candidates is printed.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from invoke import Collection, Exit
from invoke.parser import Argument, ParserContext

from tunesmith.cli.command import Command, Session
from tunesmith.cli.options import HOST, HOSTS, ON, ON_RUNS, ON_SERVICE
from tunesmith.core.errors import TunesmithError
from tunesmith.core.patching import Patch

_TARGETS = {
    ON: ("local", "container"),
    ON_SERVICE: ("local",),
    ON_RUNS: ("local", "container", "all"),
    HOST: (),
    HOSTS: (),
}
# The folder below configs/ that a verb's --config lies in.
_CONFIGS = {"predict": "predict"}


def _completed(original: Any) -> Any:
    def complete(
        names: Sequence[str], core: Any, initial_context: Any, collection: Collection, parser: Any
    ) -> None:
        words = shlex.split(core.remainder)
        if words and words[0].rpartition("/")[2] in names:
            del words[0]
        try:
            found = candidates(words, parser.contexts, initial_context, collection)
        except (TunesmithError, OSError):
            found = []  # a broken inventory is told by the command itself
        sys.stdout.writelines(f"{word}\n" for word in found)
        raise Exit

    complete.__wrapped__ = original  # type: ignore[attr-defined]
    return complete


COMPLETE = Patch(
    target="invoke.program:complete",
    caller="invoke.program:Program.parse_cleanup",
    versions="invoke==3.0.*",
    why="Invoke completes verbs and options, not an option's values, and writes of a word that "
    "is half typed to stderr where MISUSE_IS_TWO is installed",
    removal="Invoke asks a task for the values of its options",
    make=_completed,
)


def candidates(
    words: Sequence[str],
    contexts: Mapping[str, ParserContext],
    initial: ParserContext,
    collection: Collection,
) -> list[str]:
    """Return what may stand at the end of a command line, or continue its last word.

    A shell does not say whether its last word is complete: one that is a value in full is.
    """
    context, flag, missing = initial, None, list[Argument]()
    before: tuple[ParserContext, Argument | None] = (context, None)
    for word in words:
        before = (context, flag or (missing[0] if missing else None))
        if flag is not None:
            flag = None
        elif word in context.flags and not word.endswith((".yaml", ".yml")) and "=" not in word:
            argument = context.flags[word]
            flag = argument if argument.takes_value else None
        elif missing:
            missing = missing[1:]
        elif word in contexts:
            context = contexts[word]
            missing = list(context.positional_args)
    if flag is not None:
        return _values(context, flag, collection)
    last = words[-1] if words else ""
    if before[1] is not None and before[0].name and not last.startswith("-"):
        values = _values(before[0], before[1], collection)
        if last not in values:
            return values
    if missing:
        return _values(context, missing[0], collection)
    options = [name for name in context.flag_names() if name.startswith("--")]
    if last.startswith("-") and last not in (*context.flags, *context.inverse_flags):
        return options
    return [*sorted(contexts), *(options if context.name else ())]


def _values(context: ParserContext, argument: Argument, collection: Collection) -> list[str]:
    """Return the values an option may take, as far as this machine knows them."""
    task = collection[context.name] if context.name else None
    name = argument.names[0]
    if not isinstance(task, Command):
        return []
    if name in task.choices:
        return list(task.choices[name])
    session = Session()
    if (text := task.texts.get(name)) in _TARGETS:
        return [*_TARGETS[text], *_hosts(session)]
    known: dict[str, Callable[[], Iterable[str]]] = {
        "run": lambda: _runs(session),
        "config": lambda: _configs(session.root, _CONFIGS.get(str(context.name), "train")),
        "mirror": lambda: _stems(session.root / "configs" / "mirrors"),
        "flavour": lambda: session.project.stack.flavours,
        "gpu": lambda: _gpus(session.root),
    }
    return sorted(known[name]()) if name in known else []


def _hosts(session: Session) -> tuple[str, ...]:
    from tunesmith.hosts import inventory

    return inventory.names(session.project.inventory)


def _runs(session: Session) -> list[str]:
    return [file.parent.name for file in session.project.runs.glob("*/run.json")]


def _configs(root: Path, kind: str) -> list[str]:
    return [str(file.relative_to(root)) for file in (root / "configs" / kind).rglob("*.yaml")]


def _stems(folder: Path) -> list[str]:
    return [file.stem for file in folder.glob("*.yml")]


def _gpus(root: Path) -> list[str]:
    from tunesmith.core.files import parse_yaml

    return list(parse_yaml((root / "configs" / "gpus.yml").read_text(encoding="utf-8"))["gpus"])
