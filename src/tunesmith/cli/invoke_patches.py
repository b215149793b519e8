"""What Invoke lacks for us: bare words, errors with a suggestion, pages in reading order."""

from __future__ import annotations

import difflib
import functools
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from invoke import Collection, Exit, ParseError, Program
from invoke.parser import Argument, Parser, ParserContext
from invoke.util import Lexicon, helpline

from tunesmith.cli.command import Command, as_typed
from tunesmith.core.errors import UsageError
from tunesmith.core.patching import Patch

# A heading and its commands.
Step = tuple[str, Sequence[Command]]

_OVERRIDE = re.compile(r"^[A-Za-z_]\w*=")
_CONFIG = re.compile(r"^[^-].*\.ya?ml$")
_OPTION = re.compile(r" (--[a-z-]+)(?: [^-\s]\S*)?")
_RUN = re.compile(r"^\w[\w.-]*$")
_UNKNOWN = re.compile(r"^No idea what '(.*)' is!$", re.DOTALL)
_MISSING = re.compile(r"^'(.*)' did not receive required positional arguments: (.*)$")
_NUMBER = re.compile(r"^invalid literal for int\(\) with base 10: (.*)$", re.DOTALL)


class _Word(Argument):  # type: ignore[misc]
    """One bare word, posing as a flag without a value: seeing it stores it."""

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
        self.__dict__["latest"] = flag
        return flag

    def _store_of(self, word: str) -> Argument | None:
        """Return the argument a bare word belongs to: config, overrides, or runs after --compare.

        None for the value a flag before it waits for: the parser looks for flags first.
        """
        latest = self.__dict__.get("latest")
        if latest is not None and latest.takes_value and latest.raw_value is None:
            return None
        if super().__contains__("--overrides") and _OVERRIDE.match(word):
            return super().__getitem__("--overrides")
        if super().__contains__("--config") and _CONFIG.match(word):
            return super().__getitem__("--config")
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
            if {"overrides", "config", "compared"} & set(context.args):
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
    "the config and its overrides as bare words. It copies the namespace of tasks.py into a plain "
    "Collection, so a subclass of ours would be lost",
    removal="Invoke's tasks take a rest of positional words",
    make=_with_words,
)


def _ends_with_two(original: Any) -> Any:
    @functools.wraps(original)
    def parse_argv(parser: Parser, argv: list[str]) -> Any:
        if verb := _asked_help(parser, argv):
            result = original(parser, [])
            result[0].args["help"].value = verb
            return result
        try:
            return original(parser, argv)
        except (ParseError, ValueError) as error:
            misuse = _misuse(parser, error)
            raise Exit(as_typed(misuse.render()), code=misuse.exit_code) from None

    return parse_argv


def _asked_help(parser: Parser, argv: list[str]) -> str | None:
    """Return the verb of `VERB ... --help`, or None."""
    asked = next((n for n, word in enumerate(argv) if word in ("--help", "-h")), 0)
    return next((word for word in argv[:asked] if word in parser.contexts), None)


def _misuse(parser: Parser, error: Exception) -> UsageError:
    """Return what is wrong with a command line, and the nearest thing that is right."""
    context = getattr(error, "context", None)
    verb = context.name if context is not None else None
    more = f"`inv {verb} --help` shows its options" if verb else "`inv --list` shows every command"
    text = str(error)
    if unknown := _UNKNOWN.match(text):
        word = unknown[1]
        if not word.startswith("-"):
            near = nearest(word, parser.contexts)
            hint = f"did you mean `inv {near}`? `inv --list` shows every command" if near else ""
            return UsageError(
                f"there is no command {word!r}", hint=hint or "`inv --list` shows every command"
            )
        known = () if context is None else (*context.flags, *context.inverse_flags)
        near = nearest(word, known)
        message = f"`inv {verb}` has no option {word}" if verb else f"`inv` has no option {word}"
        return UsageError(message, hint=f"did you mean {near}? {more}" if near else more)
    if missing := _MISSING.match(text):
        names = missing[2].replace("'", "")
        return UsageError(f"`inv {missing[1]}` needs {names}", hint=more)
    if number := _NUMBER.match(text):
        return UsageError(f"{number[1]} is not a whole number", hint=more)
    if "needed value and was not given one" in text:
        flag = re.search(r"<Argument: ([\w-]+)", text)
        return UsageError(f"--{flag[1]} needs a value" if flag else text, hint=more)
    return UsageError(text.rstrip("!."), hint=more)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that a mistyped one is nearest to, or None."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return found[0] if found else None


MISUSE_IS_TWO = Patch(
    target="invoke.parser:Parser.parse_argv",
    caller="invoke.program:Program.parse_core_args",
    versions="invoke==3.0.*",
    why="a command line that cannot be read ends with 1, like a failed task, and names nothing "
    "that would be right; other misuse is 2. `--help` is taken for the value of a positional "
    "argument",
    removal="Invoke's exit code and message of a parse error can be chosen",
    make=_ends_with_two,
)


def _with_example(original: Any) -> Any:
    @functools.wraps(original)
    def print_task_help(program: Program, name: str) -> None:
        original(program, name)
        task = program.collection[name]
        if isinstance(task, Command):
            line = example(task, program.parser.contexts[name])
            sys.stdout.write(f"Example:\n  {line}\n\n")

    return print_task_help


def example(task: Command, context: ParserContext) -> str:
    """Return a command's example as it is typed here, without options that it has not here."""

    def kept(option: re.Match[str]) -> str:
        return option[0] if option[1] in context.flags else ""

    here = _OPTION.sub(kept, task.example)
    return as_typed(f"`{here}").removeprefix("`")


TASK_HELP = Patch(
    target="invoke:Program.print_task_help",
    caller="invoke.program:Program.parse_cleanup",
    versions="invoke==3.0.*",
    why="a command's help ends with an example, for which Invoke has no place",
    removal="Invoke's tasks have an epilogue",
    make=_with_example,
)


def _in_steps(original: Any, steps: Sequence[Step]) -> Any:
    @functools.wraps(original)
    def list_tasks(program: Program) -> None:
        if program.list_root or program.list_depth or program.list_format != "flat":
            original(program)
            return
        write_page(steps)

    return list_tasks


def write_page(steps: Sequence[Step], head: str = "", tail: str = "") -> None:
    """Print the commands with a line each below their headings, between two other texts."""
    width = max(len(command.name) for _, commands in steps for command in commands)
    lines = [head] if head else []
    for heading, commands in steps:
        lines += [f"{heading}:"]
        lines += [f"  {command.name:<{width}}   {helpline(command)}" for command in commands]
        lines += [""]
    sys.stdout.write("\n".join([*lines, *([tail] if tail else [])]) + "\n")


LIST = Patch(
    target="invoke:Program.list_tasks",
    caller="invoke.program:Program.parse_cleanup",
    versions="invoke==3.0.*",
    why="commands are listed by the steps of the work; Invoke sorts them by name",
    removal="Invoke's list can be ordered",
    make=_in_steps,
)

_FIRST_PAGE = """\
tunesmith: fine-tune, merge and serve a language model on a GPU machine that answers SSH

  inv demo                                       the whole path with a small model, no GPU
  inv host.add gpu1 "ssh -p 42151 root@HOST"     add the machine you rented
  inv provision --on gpu1                        install everything it needs
  inv train --on gpu1 --config CONFIG.yaml       train, measured before and after
  inv pull --on gpu1                             download the result
"""
_LAST_LINES = """\
`inv VERB --help` shows a command's options and an example; `inv --dry VERB ...` shows what it
would do. `inv --help` lists Invoke's own options."""


def _first_page(original: Any, steps: Sequence[Step]) -> Any:
    @functools.wraps(original)
    def no_tasks_given(_program: Program) -> None:
        write_page(steps, _FIRST_PAGE, _LAST_LINES)
        raise Exit

    return no_tasks_given


FIRST_PAGE = Patch(
    target="invoke:Program.no_tasks_given",
    caller="invoke.program:Program.parse_cleanup",
    versions="invoke==3.0.*",
    why="`inv` alone shows Invoke's own options and not one command",
    removal="Invoke's page without a task can be chosen",
    make=_first_page,
)
