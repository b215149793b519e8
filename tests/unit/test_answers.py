"""The one reader of what hosts say: fields, JSON within bounds, output within bounds."""

from __future__ import annotations

import sys

import pytest

from tunesmith.core.errors import TunesmithError
from tunesmith.hosts.answers import (
    DIGEST,
    HOST_PATH,
    PYTHON,
    RUN_ID,
    AnswerSource,
    Each,
    Free,
    MalformedError,
    Named,
    Number,
    Real,
    Record,
    Shape,
    Text,
    Words,
    fields,
    parse_json,
)
from tunesmith.hosts.remote import MOST_ERRORS, FloodError, execute

pytestmark = pytest.mark.unit

ASKED = AnswerSource("gpu1", "a field")


@pytest.mark.parametrize(
    ("shape", "good", "bad"),
    [
        (
            PYTHON,
            ["/usr/bin/python3", "/opt/conda-3.11/bin/python3.11"],
            [
                "python3",
                "/a b",
                "/a/../b",
                "/x/{{1}}",
                "/x\n",
                "/x;y",
                "/$(x)",
                "/..",
                "/x" * 200,
                "",
                1,
                None,
            ],
        ),
        (
            HOST_PATH,
            ["/", "/root/autodl-tmp/tunesmith", "/mnt/数据 1/x(2)"],
            [
                "x",
                "/a/..",
                "/a\nb",
                "/a\0",
                "/{{x}}",
                "/`x`",
                "/$HOME",
                "/a;b",
                "/a'b",
                "/a\x1bb",
                "/\u202ex",
                "/" + "a" * 2000,
            ],
        ),
        (
            Number(0, 10),
            [0, "10", 7],
            ["11", -1, "1.0", "x", "9" * 5000, True, None, 1.0, "٣", "1\n"],
        ),
        (Real(0, 10), [0, 1.5], ["1", 11.0, float("nan"), float("inf"), True, None]),
        (DIGEST, ["ab" * 32], ["AB" * 32, "ab", "ab" * 33, 1]),
        (
            RUN_ID,
            ["20260101-1.a_b", "实验-1"],
            ["", ".x", "-x", "a/b", "../x", "a\nb", "a b", "a" * 200, 1],
        ),
        (Record({"a": Number()}), [{"a": 1}, {"a": 1, "b": "x"}], [{}, {"a": "x"}, [], "a", None]),
        (Each(Number(), 3), [[], [1, 2]], [{}, [1, "x"], [1, 2, 3, 4], "12"]),
        (Named(Text("[a-z]+", 5), Number()), [{"a": 1}], [{"A": 1}, {"a": "x"}, []]),
    ],
)
def test_a_value_is_what_its_field_says(
    shape: Shape, good: list[object], bad: list[object]
) -> None:
    for value in good:
        shape.read(ASKED, value)
    for value in bad:
        with pytest.raises(
            TunesmithError, match=r"^gpu1: (a key of )?a field.*: expected "
        ) as told:
            shape.read(ASKED, value)
        assert "\n" not in told.value.message and len(told.value.message) < 400


def test_a_text_for_people_is_cleaned_and_cut() -> None:
    assert Words(5).read(ASKED, "\x1b[2Jab{{c}}") == "a"
    assert Words(20).read(ASKED, "\x1b]52;c;x\x07ab\u202e") == "ab"
    assert Free().read(ASKED, {"\x1b[2Ja": ["b\x07", {"c": None}]}) == {"a": ["b", {"c": None}]}
    with pytest.raises(TunesmithError, match="expected a text"):
        Words().read(ASKED, 1)


def test_json_is_read_within_bounds() -> None:
    assert parse_json(ASKED, '{"a": [1, -2.5e3, "x"]}') == {"a": [1, -2500.0, "x"]}
    with pytest.raises(MalformedError, match=r"^gpu1: a field: not JSON"):
        parse_json(ASKED, '{"a": ')
    for text in ("9" * 5000, f'{{"a": {"1" * 21}}}', "[" * 100_000 + "]" * 100_000):
        with pytest.raises(TunesmithError, match=r"^gpu1: a field: JSON that is not read on"):
            parse_json(ASKED, text)
    with pytest.raises(TunesmithError, match="at most 10 B of JSON"):
        parse_json(ASKED, '"' + "x" * 20 + '"', 10)
    deep = parse_json(ASKED, "[" * 100 + "]" * 100)
    with pytest.raises(TunesmithError, match="at most 40 levels"):
        Free().read(ASKED, deep)


def test_only_known_keys_are_taken() -> None:
    lines = ["a=1", "noise", "b=2", "a=3"]
    assert fields(ASKED, lines, {"a": Number()}) == {"a": 3}
    with pytest.raises(TunesmithError, match=r"^gpu1: a field: a: expected a whole number"):
        fields(ASKED, ["a=x"], {"a": Number()})


def shell(script: str, **more: int) -> tuple[int, str]:
    done, began = execute(["sh", "-c"], script, **more)
    assert began
    return done.returncode, done.stdout


def test_a_command_that_floods_is_ended() -> None:
    # It would end by itself, twice as large as what is read.
    script = f"exec {sys.executable} -ISc 'print(\"x\" * 4_000_000)'"
    with pytest.raises(FloodError, match=r"more than 2\.0 MB"):
        shell(script, most=2_000_000)
    assert len(shell(script, most=5_000_000)[1]) == 4_000_001


def test_a_command_that_floods_its_errors_is_ended() -> None:
    size = 4 * MOST_ERRORS
    script = f"{sys.executable} -ISc 'import sys; sys.stderr.write(\"x\" * {size})'; sleep 2"
    with pytest.raises(FloodError, match="of errors"):
        shell(script)
