"""A verb, declared once: its options with type, default and help, an example, what it does.

The declaration is an Invoke task: `tasks.py` collects it for `inv`, `cli/container.py` for the
image. Modules of declarations import nothing heavy, since `inv --list` loads them all.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invoke import Context, Exit, Task

from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.job.system import disk

if TYPE_CHECKING:
    from tunesmith.project import Project

# The clone, or the image's own copy of it.
ROOT = Path(__file__).absolute().parents[3]
# What commands begin with where this runs: the image's entry point sets it.
COMMAND = "TUNESMITH_COMMAND"
_INV = re.compile(r"`inv (?=[a-z-])")
# Options whose values are bare words.
WORDS = ("overrides", "compared")


@dataclass(frozen=True)
class Session:
    """Where a command works, and whether it only shows what it would do (`inv --dry VERB`)."""

    root: Path = ROOT
    dry: bool = False

    @property
    def project(self) -> Project:
        """The clone's settings and folders."""
        from tunesmith.project import Project

        return Project.at(self.root)


class Command(Task):  # type: ignore[misc]
    """An Invoke task with an example and the values that options are limited to.

    `function` is the declared function, which takes a Session and raises TunesmithError; `texts`
    are the help texts by option.
    """

    def __init__(
        self,
        function: Callable[..., None],
        *,
        example: str,
        choices: Mapping[str, Sequence[str]],
        name: str | None,
        help: Mapping[str, str],
    ) -> None:
        @functools.wraps(function)
        def run(context: Context, **options: Any) -> None:
            with exit_codes():
                self._check_choices(options)
                function(Session(dry=bool(context.config.run.dry)), **options)

        self.function = function
        self.example = example
        self.choices = dict(choices)
        # Invoke empties its own when it has read it.
        self.texts = dict(help)
        own = function.__code__.co_varnames[: function.__code__.co_argcount]
        super().__init__(
            run,
            name=name,
            help=dict(help),
            auto_shortflags=False,
            iterable=[word for word in WORDS if word in own],
        )

    def _check_choices(self, options: Mapping[str, Any]) -> None:
        for option, allowed in self.choices.items():
            value = options.get(option.replace("-", "_"))
            if value and value not in allowed:
                raise UsageError(
                    f"--{option} {value}: not one of the values it takes",
                    hint=f"--{option} takes {', '.join(allowed)}",
                )


def command(
    name: str | None = None,
    *,
    example: str,
    help: Mapping[str, str] | None = None,
    choices: Mapping[str, Sequence[str]] | None = None,
) -> Callable[[Callable[..., None]], Any]:
    """Declare a verb. `name` is how it is typed (default: the function's), as in `data.check`.

    `example` is a command line that works, `help` has a text for each option; an option in
    `choices` takes only the values listed there, or none.
    """

    def declare(function: Callable[..., None]) -> Command:
        return Command(function, example=example, choices=choices or {}, name=name, help=help or {})

    return declare


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """Turn an error meant for people into its text on stderr and its exit code.

    1: the work failed; 2: misuse. What a disk refuses is such an error, too.
    """
    try:
        yield
    except TunesmithError as error:
        raise _exit(error) from None
    except OSError as error:
        if error.errno == errno.ENOLCK:
            # Locks are taken by a descriptor: the error does not say of which file.
            raise _exit(
                TunesmithError(
                    "this file system has no locks, so two commands could write one file",
                    hint="a network disk? set TUNESMITH_HOME to keep .tunesmith on another disk",
                )
            ) from None
        if not disk.refused(error):
            raise
        raise _exit(disk.explain(error, Path.cwd())) from None


def _exit(error: TunesmithError) -> Exit:
    return Exit(as_typed(error.render()), code=error.exit_code)


def as_typed(text: str) -> str:
    """Return a message with its commands as they are typed where this runs."""
    prefix = os.environ.get(COMMAND, "inv")
    return _INV.sub(f"`{prefix} ", text)
