"""What Invoke lacks for us: `key=value` words, and errors as people should see them."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from invoke import Collection, Exit, ParseError, task
from invoke.parser import Argument, Parser, ParserContext
from invoke.util import Lexicon

from tunesmith.errors import TunesmithError
from tunesmith.job import disk

_OVERRIDE = re.compile(r"^[A-Za-z_]\w*=")
_RUN = re.compile(r"^\w[\w.-]*$")


class _Word(Argument):  # type: ignore[misc]
    """One `key=value` word, posing as a flag without a value: seeing it stores it."""

    def __init__(self, word: str, store: Argument) -> None:
        super().__init__(name=word, kind=bool)
        self._word = word
        self._store = store

    def set_value(self, value: Any, cast: bool = True) -> None:
        self._store.value = self._word


class _Flags(Lexicon):  # type: ignore[misc]
    """The flags of a task that takes bare words: those words are among them."""

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or self._store_of(str(key)) is not None

    def __getitem__(self, key: str) -> Any:
        store = None if super().__contains__(key) else self._store_of(key)
        if store is not None:
            return _Word(key, store)
        flag = super().__getitem__(key)
        # Lexicon turns attributes into items.
        self.__dict__["asked"] = flag
        return flag

    def _store_of(self, word: str) -> Argument | None:
        """Return the argument a bare word belongs to: overrides, or runs after --compare.

        None for the value a flag before it waits for: the parser looks for flags first.
        """
        asked = self.__dict__.get("asked")
        if asked is not None and asked.takes_value and asked.raw_value is None:
            return None
        if super().__contains__("--overrides") and _OVERRIDE.match(word):
            return super().__getitem__("--overrides")
        # Without --compare before it a word is the next task, as everywhere.
        comparing = super().__contains__("--compare") and super().__getitem__("--compare").value
        if comparing and _RUN.match(word):
            return super().__getitem__("--compared")
        return None


def accept_words() -> None:
    """Let every task with an `overrides` argument take bare `key=value` words, and a task with
    --compare the names of runs after it.

    Invoke's parser takes any bare word for the name of a task; LLaMA-Factory's users
    write overrides as bare words. Invoke copies the namespace of tasks.py into a plain
    Collection, so a subclass of ours would be lost: the method itself is wrapped, once.
    """
    original = Collection.to_contexts
    if getattr(original, "accepts_words", False):
        return

    @functools.wraps(original)
    def to_contexts(collection: Collection, *args: Any, **kwargs: Any) -> list[ParserContext]:
        contexts: list[ParserContext] = original(collection, *args, **kwargs)
        for context in contexts:
            if "overrides" in context.args or "compared" in context.args:
                flags = _Flags()
                flags.update(context.flags)
                context.flags = flags
        return contexts

    to_contexts.accepts_words = True  # type: ignore[attr-defined]
    Collection.to_contexts = to_contexts


def refuse_with_two() -> None:
    """Let a command line that Invoke cannot read end with exit code 2, as other misuse does.

    Invoke makes it 1, like a failed task. Its parser is wrapped, once.
    """
    original = Parser.parse_argv
    if getattr(original, "refuses_with_two", False):
        return

    @functools.wraps(original)
    def parse_argv(parser: Parser, argv: list[str]) -> Any:
        try:
            return original(parser, argv)
        except ParseError as error:
            said = str(error).rstrip("!.")
            raise Exit(f"{said}; `inv --list` shows every command", code=2) from None

    parse_argv.refuses_with_two = True  # type: ignore[attr-defined]
    Parser.parse_argv = parse_argv


def door(**options: Any) -> Callable[[Callable[..., None]], Any]:
    """Invoke's `task` for a function that may raise TunesmithError, or be refused by a disk.

    The error's lines go to stderr and its exit code (1 failed, 2 misuse) to the shell.
    """

    def decorate(body: Callable[..., None]) -> Any:
        @functools.wraps(body)
        def guarded(*args: Any, **kwargs: Any) -> None:
            try:
                body(*args, **kwargs)
            except TunesmithError as error:
                raise Exit(error.render(), code=error.exit_code) from None
            except OSError as error:
                if not disk.refused(error):
                    raise
                told = disk.explain(error, Path.cwd())
                raise Exit(told.render(), code=told.exit_code) from None

        return task(auto_shortflags=False, iterable=_iterable(body), **options)(guarded)

    return decorate


def _iterable(body: Callable[..., None]) -> list[str]:
    own = body.__code__.co_varnames[: body.__code__.co_argcount]
    return [name for name in ("overrides", "compared") if name in own]
