"""Errors that one process of ours prints and another raises again."""

from __future__ import annotations

import pytest

from tunesmith.core.errors import TunesmithError, UsageError, printed_error

pytestmark = pytest.mark.unit

ERRORS = (
    UsageError("x.yaml: unknown key `a`", ["a second", "a third"], hint="`inv runs` lists them"),
    TunesmithError("run r: failed"),
    UsageError("no such run", hint="`inv runs` lists them"),
    TunesmithError("run r: failed", ["log: /x"]),
)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.message)
def test_a_printed_error_is_the_same_again(error: TunesmithError) -> None:
    for before in ("", "a warning of a library\n"):
        again = printed_error(f"{before}{error.render()}\n", error.exit_code, "none")
        assert type(again) is type(error)
        assert (again.message, again.detail, again.hint) == (
            error.message,
            error.detail,
            error.hint,
        )
        assert again.render() == error.render()


def test_what_is_no_error_of_ours_is_told_as_it_is() -> None:
    killed = printed_error("Killed\n", 137, "none")
    assert (type(killed), killed.message, killed.detail) == (TunesmithError, "Killed", ())
    assert printed_error("", 1, "it did not start").message == "it did not start"
