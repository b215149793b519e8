"""What Invoke lacks for us: `key=value` words, and errors as people should see them."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from invoke import Collection, Exit, task
from invoke.parser import Argument, ParserContext
from invoke.util import Lexicon

from tunesmith.errors import TunesmithError

_OVERRIDE = re.compile(r"^[A-Za-z_]\w*=")


class _Word(Argument):  # type: ignore[misc]
    """One `key=value` word, posing as a flag without a value: seeing it stores it."""

    def __init__(self, word: str, store: Argument) -> None:
        super().__init__(name=word, kind=bool)
        self._word = word
        self._store = store

    def set_value(self, value: Any, cast: bool = True) -> None:
        self._store.value = self._word


class _Flags(Lexicon):  # type: ignore[misc]
    """The flags of a task that has an `overrides` argument: override words are among them."""

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or bool(_OVERRIDE.match(str(key)))

    def __getitem__(self, key: str) -> Any:
        if not super().__contains__(key) and _OVERRIDE.match(key):
            return _Word(key, super().__getitem__("--overrides"))
        return super().__getitem__(key)


def accept_words() -> None:
    """Let every task with an `overrides` argument take bare `key=value` words.

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
            if "overrides" in context.args:
                flags = _Flags()
                flags.update(context.flags)
                context.flags = flags
        return contexts

    to_contexts.accepts_words = True  # type: ignore[attr-defined]
    Collection.to_contexts = to_contexts


def door(**options: Any) -> Callable[[Callable[..., None]], Any]:
    """Invoke's `task` for a function that may raise TunesmithError.

    The error's lines go to stderr and its exit code (1 failed, 2 misuse) to the shell.
    """

    def decorate(body: Callable[..., None]) -> Any:
        @functools.wraps(body)
        def guarded(*args: Any, **kwargs: Any) -> None:
            try:
                body(*args, **kwargs)
            except TunesmithError as error:
                raise Exit(error.render(), code=error.exit_code) from None

        return task(auto_shortflags=False, iterable=_iterable(body), **options)(guarded)

    return decorate


def _iterable(body: Callable[..., None]) -> list[str]:
    return ["overrides"] if "overrides" in body.__code__.co_varnames else []
