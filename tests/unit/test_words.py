"""The command line: key=value words beside Invoke's own ways."""

from __future__ import annotations

import errno
import os

import pytest
from invoke import Collection, Context, Exit, ParseError
from invoke.parser import Parser

from tunesmith.cli.command import BARE_WORDS, MISUSE_IS_TWO, door
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.patching import install

pytestmark = pytest.mark.unit


@door()
def train(
    _c: Context, config: str = "", fast: bool = False, overrides: list[str] | None = None
) -> None:
    """Train."""
    raise UsageError(f"{config}: bad", ["more"])


@door()
def other(_c: Context) -> None:
    """Do something else."""
    raise TunesmithError("failed")


def parse(*words: str) -> list[tuple[str, dict[str, object]]]:
    install(BARE_WORDS)
    contexts = Collection(train, other).to_contexts()
    return [(c.name, c.as_kwargs) for c in Parser(contexts).parse_argv(list(words))]


def test_words_are_collected_in_order_and_tasks_still_follow() -> None:
    words = ["train", "--config", "a.yaml", "lr=1e-4", "--fast", "dataset=x y=z", "other"]
    assert parse(*words) == [
        ("train", {"config": "a.yaml", "fast": True, "overrides": ["lr=1e-4", "dataset=x y=z"]}),
        ("other", {}),
    ]


def test_two_calls_do_not_share_words() -> None:
    first, second = parse("train", "a=1", "train", "b=2")
    assert (first[1]["overrides"], second[1]["overrides"]) == (["a=1"], ["b=2"])


def test_without_words_there_are_none() -> None:
    assert parse("train")[0][1]["overrides"] == []


def test_a_word_is_no_task() -> None:
    with pytest.raises((Exit, ParseError), match="No idea what 'a=1' is"):
        parse("other", "a=1")


def test_errors_become_lines_and_exit_codes() -> None:
    with pytest.raises(Exit) as misuse:
        train(Context(), config="c.yaml")
    assert (misuse.value.code, misuse.value.message) == (2, "error: c.yaml: bad\n  more")
    with pytest.raises(Exit) as failed:
        other(Context())
    assert failed.value.code == 1


@pytest.mark.parametrize("words", [("train", "--no-such"), ("no.such",), ("train", "--config")])
def test_what_invoke_cannot_read_is_misuse(words: tuple[str, ...]) -> None:
    install(MISUSE_IS_TWO)
    with pytest.raises(Exit) as misuse:
        parse(*words)
    assert misuse.value.code == 2
    assert "`inv --list` shows every command" in misuse.value.message


def test_a_disk_that_takes_nothing_is_named_in_one_line() -> None:
    @door()
    def write(_c: Context) -> None:
        """Write."""
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/no/such/run.json")

    with pytest.raises(Exit) as ended:
        write(Context())
    assert ended.value.code == 1
    assert ended.value.message.startswith(
        "error: /no/such: its disk is full (No space left on device; "
    )
    assert "\n" not in ended.value.message


def test_a_file_system_without_locks_is_told_in_one_line() -> None:
    @door()
    def write(_c: Context) -> None:
        """Write."""
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with pytest.raises(Exit) as ended:
        write(Context())
    assert ended.value.code == 1
    assert "gives no locks" in ended.value.message
