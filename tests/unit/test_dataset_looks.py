"""What no rule forbids is seen: near-duplicates, personal data, languages, reasoning."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tunesmith.dataset.check import check_file
from tunesmith.dataset.entry import Entry
from tunesmith.dataset.near_duplicates import Sketches
from tunesmith.dataset.pii import hints
from tunesmith.dataset.quality import script
from tunesmith.dataset.report import DatasetReport

pytestmark = pytest.mark.unit

ALPACA = Entry("k", columns={"prompt": "instruction", "response": "output"})
RANDOM = random.Random(3)
WORDS = ["".join(RANDOM.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(3000)]


def text(words: int = 60) -> str:
    return " ".join(RANDOM.choices(WORDS, k=words))


def examine(tmp_path: Path, *rows: tuple[str, str]) -> DatasetReport:
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"instruction": q, "output": a} for q, a in rows]))
    return check_file(path, ALPACA, thorough=True)


def near_pairs(*texts: str) -> list[tuple[int, int]]:
    sketches = Sketches()
    sketches.add(texts)
    return [(pair.first, pair.again) for pair in sketches.pairs()]


def jaccard(a: str, b: str) -> float:
    x, y = ({t[i : i + 8] for i in range(len(t) - 7)} for t in (a, b))
    return len(x & y) / len(x | y)


def test_near_duplicates_are_found_and_others_are_not() -> None:
    base = [text() for _ in range(300)]
    changed = []
    for original in base[:100]:
        words = original.split()
        words[RANDOM.randrange(len(words))] = RANDOM.choice(WORDS)
        changed.append(" ".join(words))
    assert all(jaccard(a, b) > 0.9 for a, b in zip(base, changed, strict=False))
    found = near_pairs(*base, *changed)
    right = {(n, 300 + n) for n in range(100)}
    assert len(set(found) & right) >= 97
    assert set(found) <= right


def test_pairs_across_are_found_beside_pairs_within() -> None:
    base = [text() for _ in range(60)]
    again = [f"{one} more" for one in base]
    held = [False] * 60 + [True] * 120  # each held row has a twin that is held as well
    sketches = Sketches()
    sketches.add([*base, *again, *again])
    found = {(pair.first, pair.again) for pair in sketches.across(held)}
    assert found == {(n % 60, 60 + n) for n in range(120)}
    assert sketches.across([True] * 180) == sketches.across([False] * 180) == []


def test_case_and_blanks_make_no_difference_and_short_texts_are_not_judged() -> None:
    one = text()
    assert near_pairs(one, one.upper().replace(" ", "  \n")) == [(0, 1)]
    assert near_pairs("yes, of course", "yes, of course") == []


def test_half_the_same_is_not_the_same() -> None:
    half = text(40)
    assert near_pairs(*(f"{half} {text(40)}" for _ in range(50))) == []


def test_estimate_is_near_the_real_similarity() -> None:
    a = text(100)
    b = " ".join(a.split()[:96] + text(4).split())
    sketches = Sketches()
    sketches.add([a, b])
    (pair,) = sketches.pairs()
    assert abs(pair.alike - jaccard(a, b)) < 0.12


def test_near_duplicates_are_told_with_their_rows(tmp_path: Path) -> None:
    long = text()
    found = examine(tmp_path, ("q one", long), ("another", text()), ("q one!", long))
    (warning,) = [f for f in found.warnings if "the same as" in f.message]
    assert (warning.row, found.looks["near_duplicates"]) == (3, 1)
    assert "row 1" in warning.message


def test_a_duplicate_is_told_once(tmp_path: Path) -> None:
    one = ("q", text())
    found = examine(tmp_path, one, ("other", text()), one)
    assert [f.message for f in found.warnings] == ["the same as row 1 (line 1)"]
    assert (found.looks["duplicates"], found.looks["near_duplicates"]) == (1, 0)


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("write to anna.lee@corp.cn today", "an e-mail address"),
        ("call 13912345678 now", "a mobile number"),
        ("call +49 151 2345 6789 now", "a phone number"),
        ("id 11010519491231002X", "an identity number"),
        ("key sk-abcdefghijklmnopqrstuvwx", "an API key"),
        ("AKIAIOSFODNN7EXAMPLE is one", "an AWS access key"),
        ("ghp_" + "a1" * 18, "a GitHub token"),
        ("-----BEGIN RSA PRIVATE KEY-----", "a private key"),
    ],
)
def test_personal_data_is_hinted_at_and_hidden(said: str, kind: str) -> None:
    ((what, shown),) = hints(said)
    assert what == kind
    assert shown not in said and "..." in shown


@pytest.mark.parametrize(
    "said",
    [
        "anna@example.com",
        "a @ b",
        "0139123456789",
        "3.14159265358979",
        "110105194912310021",
        "order 12345678901",
        "1 + 1 = 2",
        "sk-short",
        "x13912345678",
    ],
)
def test_no_hint(said: str) -> None:
    assert list(hints(said)) == []


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("Who are you?", "Latin"),
        ("你是谁？I am GPT", "Chinese"),
        ("これはペンです", "Japanese"),
        ("東京へ行きます", "Japanese"),
        ("안녕하세요", "Korean"),
        ("Привет", "Cyrillic"),
        ("42", "none"),
        ("naïve café", "Latin"),
    ],
)
def test_script(said: str, expected: str) -> None:
    assert script(said) == expected


def test_answers_that_are_short_or_in_another_language(tmp_path: Path) -> None:
    found = examine(tmp_path, ("你是谁？", "I am a model."), ("ok?", "y"), ("hi", "hello"))
    assert [(f.row, f.severity) for f in found.findings] == [(1, "warning"), (2, "warning")]
    assert "Chinese, the answer Latin" in found.findings[0].message
    assert "one character: y" in found.findings[1].message
    assert found.looks["scripts"] == {"Latin": 3}


def test_reasoning_in_some_answers_and_in_disorder(tmp_path: Path) -> None:
    good = "<think>\nwell\n</think>\n\nyes"
    found = examine(tmp_path, ("a", good), ("b", "plain text"), ("c", good), ("d", "<think>no end"))
    messages = [f.message for f in found.warnings]
    assert "<think> stands 1 and </think> 0 times in the answer" in messages
    assert any("2 of 4 answers are with <think>" in message for message in messages)
    sound = examine(tmp_path, ("a", good), ("c", good + "!"))
    assert [f for f in sound.warnings if "think" in f.message] == []


def test_many_of_a_kind_are_counted(tmp_path: Path) -> None:
    found = examine(tmp_path, *((f"q{n}", f"mail a{n}@corp{n}.cn") for n in range(30)))
    assert len(found.warnings) == 10
    assert [f.message for f in found.findings if f.severity == "note"] == [
        "30 rows look as if they held personal data or keys; the first 10 are told"
    ]
