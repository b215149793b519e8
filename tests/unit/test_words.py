"""The command line: key=value words beside Invoke's own ways."""

from __future__ import annotations

import errno
import os

import pytest
from invoke import Collection, Context, Exit
from invoke.parser import Parser

from tunesmith.cli.command import Session, command
from tunesmith.cli.invoke_patches import BARE_WORDS, MISUSE_IS_TWO, nearest
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.patching import install

pytestmark = pytest.mark.unit


@command(example="inv train", choices={"kind": ("lora", "full")})
def train(
    _session: Session,
    config: str = "",
    fast: bool = False,
    steps: int = 0,
    kind: str = "",
    overrides: list[str] | None = None,
) -> None:
    """Train."""
    raise UsageError(f"{config}: bad", ["more"])


@command(example="inv other")
def other(_session: Session) -> None:
    """Do something else."""
    raise TunesmithError("failed")


@command(example="inv needy")
def needy(_session: Session, path: str) -> None:
    """Need a path."""


def parse(*words: str) -> list[tuple[str, dict[str, object]]]:
    install(BARE_WORDS)
    contexts = Collection(train, other, needy).to_contexts()
    return [(c.name, c.as_kwargs) for c in Parser(contexts).parse_argv(list(words))]


PLAIN = {"config": "", "fast": False, "steps": 0, "kind": "", "overrides": []}


def test_words_are_collected_in_order_and_tasks_still_follow() -> None:
    words = ["train", "--config", "a.yaml", "lr=1e-4", "--fast", "dataset=x y=z", "other"]
    given = {"config": "a.yaml", "fast": True, "overrides": ["lr=1e-4", "dataset=x y=z"]}
    assert parse(*words) == [("train", PLAIN | given), ("other", {})]


def test_a_config_may_be_a_bare_word() -> None:
    given = {"config": "configs/a.yaml", "overrides": ["lr=1"]}
    for words in (("configs/a.yaml", "lr=1"), ("lr=1", "configs/a.yaml")):
        assert parse("train", *words) == [("train", PLAIN | given)]
    # The value that an option waits for is no bare word.
    assert parse("train", "--kind", "x.yaml")[0][1]["kind"] == "x.yaml"


def test_two_calls_do_not_share_words() -> None:
    first, second = parse("train", "a=1", "train", "b=2")
    assert (first[1]["overrides"], second[1]["overrides"]) == (["a=1"], ["b=2"])


def test_without_words_there_are_none() -> None:
    assert parse("train")[0][1]["overrides"] == []


def test_errors_become_lines_and_exit_codes() -> None:
    with pytest.raises(Exit) as misuse:
        train(Context(), config="c.yaml")
    assert (misuse.value.code, misuse.value.message) == (2, "error: c.yaml: bad\n  more")
    with pytest.raises(Exit) as failed:
        other(Context())
    assert failed.value.code == 1


def test_an_option_takes_only_its_choices() -> None:
    with pytest.raises(Exit) as misuse:
        train(Context(), config="c.yaml", kind="loar")
    assert (misuse.value.code, misuse.value.message) == (
        2,
        "error: --kind loar: not one of the values it takes\nhint: --kind takes lora, full",
    )
    with pytest.raises(Exit, match="bad"):
        train(Context(), config="c.yaml", kind="lora")


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (("train", "--no-such"), "`inv train` has no option --no-such", "`inv train --help`"),
        (("train", "--confg", "x"), "`inv train` has no option --confg", "did you mean --config?"),
        (("trian",), "there is no command 'trian'", "did you mean `inv train`?"),
        (("no.such",), "there is no command 'no.such'", "`inv --list` shows every command"),
        (("other", "a=1"), "there is no command 'a=1'", "`inv --list` shows every command"),
        (("train", "--config"), "--config needs a value", "`inv train --help`"),
        (("train", "--steps", "two"), "'two' is not a whole number", "`inv --list`"),
        (("needy",), "`inv needy` needs path", "`inv needy --help`"),
    ],
)
def test_what_invoke_cannot_read_is_misuse_with_the_nearest_word(
    words: tuple[str, ...], message: str, hint: str
) -> None:
    install(MISUSE_IS_TWO)
    with pytest.raises(Exit) as misuse:
        parse(*words)
    assert misuse.value.code == 2
    first, second = misuse.value.message.splitlines()
    assert first == f"error: {message}"
    assert second.startswith(f"hint: {hint}")


def test_what_is_like_nothing_has_no_nearest_word() -> None:
    assert nearest("trian", ["train", "stop"]) == "train"
    assert nearest("xyz", ["train", "stop"]) is None


def test_a_disk_that_takes_nothing_is_named_in_one_line() -> None:
    @command(example="inv write")
    def write(_session: Session) -> None:
        """Write."""
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/no/such/run.json")

    with pytest.raises(Exit) as ended:
        write(Context())
    assert ended.value.code == 1
    assert ended.value.message.startswith(
        "error: /no/such: its disk is full (No space left on device; "
    )
    assert "\n" not in ended.value.message


def test_a_file_system_without_locks_is_named() -> None:
    @command(example="inv write")
    def write(_session: Session) -> None:
        """Write."""
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with pytest.raises(Exit) as ended:
        write(Context())
    assert ended.value.code == 1
    assert ended.value.message.startswith("error: this file system has no locks")
    assert "TUNESMITH_HOME" in ended.value.message.splitlines()[1]
