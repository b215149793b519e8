"""What the image's benchmark counts as changed."""

from __future__ import annotations

import pytest

from benchmarks.harness import CommandFailed
from benchmarks.image import layers_of, moved_bytes, rebuilt_bytes

BEFORE = [("base", 100), ("wheels", 50), ("configs", 7), ("modules", 3), ("job", 2)]


def history(*made: tuple[str, int]) -> list[dict[str, object]]:
    """As the engine tells it: newest first."""
    return [{"CreatedBy": by, "Size": size} for by, size in reversed(made)]


def test_a_layer_that_is_the_same_on_another_one_is_not_moved_again() -> None:
    after = [*BEFORE[:3], ("other", 4), BEFORE[4]]
    assert moved_bytes(BEFORE, after) == 4
    assert rebuilt_bytes(BEFORE, after) == 6


def test_nothing_changed_moves_nothing() -> None:
    assert moved_bytes(BEFORE, BEFORE) == rebuilt_bytes(BEFORE, BEFORE) == 0


def test_everything_from_the_copy_on_counts() -> None:
    after = [*BEFORE[:2], ("source", 1), ("installed", 30)]
    assert moved_bytes(BEFORE, after) == rebuilt_bytes(BEFORE, after) == 31


def test_instructions_without_a_layer_are_left_out() -> None:
    told = history(
        ("", 100),
        ("ARG FLAVOUR", 0),
        ("WORKDIR /reference", 0),
        ("COPY source /reference # buildkit", 5),
        ("USER 1000:1000", 0),
    )
    assert layers_of(["a", "b", "c"], told) == [("a", 100), ("b", 0), ("c", 5)]


def test_sizes_that_cannot_be_told_apart_are_refused() -> None:
    with pytest.raises(CommandFailed, match="2 layers, but 1 in the image's history"):
        layers_of(["a", "b"], history(("", 100), ("ENV A=b", 0)))
