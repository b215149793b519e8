"""What Invoke lacks for us: `key=value` words, and errors as people should see them."""

from __future__ import annotations

import errno
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from invoke import Collection, Exit, ParseError, task
from invoke.parser import Argument, Parser, ParserContext
from invoke.util import Lexicon

from tunesmith.core.errors import TunesmithError
from tunesmith.core.patching import Patch
from tunesmith.job.system import disk

_OVERRIDE = re.compile(r"^[A-Za-z_]\w*=")
# The error does not say which file: locks are taken by a descriptor.
_NO_LOCKS = (
    "a file system gives no locks, without which two commands could write one file: is it a "
    "network disk? TUNESMITH_HOME names another place for .tunesmith"
)
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


def _with_words(original: Any) -> Any:
    @functools.wraps(original)
    def to_contexts(collection: Collection, *args: Any, **kwargs: Any) -> list[ParserContext]:
        contexts: list[ParserContext] = original(collection, *args, **kwargs)
        for context in contexts:
            if "overrides" in context.args or "compared" in context.args:
                flags = _Flags()
                flags.update(context.flags)
                context.flags = flags
        return contexts

    return to_contexts


BARE_WORDS = Patch(
    target="invoke:Collection.to_contexts",
    caller="invoke.program:Program._make_parser",
    versions="invoke==3.0.*",
    why="Invoke takes any bare word for the name of a task, and LLaMA-Factory's users write "
    "overrides as bare words. It copies the namespace of tasks.py into a plain Collection, so a "
    "subclass of ours would be lost",
    removal="Invoke's tasks take a rest of positional words",
    make=_with_words,
)


def _ends_with_two(original: Any) -> Any:
    @functools.wraps(original)
    def parse_argv(parser: Parser, argv: list[str]) -> Any:
        try:
            return original(parser, argv)
        except ParseError as error:
            said = str(error).rstrip("!.")
            raise Exit(f"{said}; `inv --list` shows every command", code=2) from None

    return parse_argv


MISUSE_IS_TWO = Patch(
    target="invoke.parser:Parser.parse_argv",
    caller="invoke.program:Program.parse_core_args",
    versions="invoke==3.0.*",
    why="a command line that cannot be read ends with 1, like a failed task; other misuse is 2",
    removal="Invoke's own exit code of a parse error can be chosen",
    make=_ends_with_two,
)
PATCHES = (BARE_WORDS, MISUSE_IS_TWO)


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
                if error.errno == errno.ENOLCK:
                    raise Exit(_NO_LOCKS, code=1) from None
                if not disk.refused(error):
                    raise
                told = disk.explain(error, Path.cwd())
                raise Exit(told.render(), code=told.exit_code) from None

        return task(auto_shortflags=False, iterable=_iterable(body), **options)(guarded)

    return decorate


def _iterable(body: Callable[..., None]) -> list[str]:
    own = body.__code__.co_varnames[: body.__code__.co_argcount]
    return [name for name in ("overrides", "compared") if name in own]
