"""Durations, sizes and counts as people read them."""

from __future__ import annotations

import pytest

from tunesmith.core.formats import count, duration, share, size


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (-1, "0 s"),
        (0.06, "0.1 s"),
        (0.44, "0.4 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (5400, "1 h 30 min"),
        (86_399, "1 d 00 h"),
        (2 * 86_400 + 3 * 3600, "2 d 03 h"),
    ],
)
def test_a_duration_has_at_most_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_960, "1.0 MB"),
        (3.6e9, "3.6 GB"),
        (8.1e12, "8.1 TB"),
        (5e15, "5000.0 TB"),
    ],
)
def test_sizes_are_in_powers_of_a_thousand(number: float, text: str) -> None:
    assert size(number) == text


def test_counts_are_grouped() -> None:
    assert count(12_000) == "12,000"


def test_a_share_names_both_and_the_part() -> None:
    assert share(1.2e9, 3.6e9) == "1.2 GB of 3.6 GB (33 %)"
    assert share(6, 10, count, "prompts") == "6 of 10 prompts (60 %)"
    assert share(5e6, 0) == "5.0 MB"
