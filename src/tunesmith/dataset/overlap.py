"""Rows to validate on that the training has seen: the same, or nearly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tunesmith.dataset.entry import Entry
from tunesmith.dataset.near_duplicates import Sketches, normal
from tunesmith.dataset.reading import Reader, Tables, values_of
from tunesmith.dataset.texts import texts_of

_EXAMPLES = 5


@dataclass
class Overlap:
    """Validation rows in all, those with a question that the training has too, and near ones."""

    validation: int = 0
    same: int = 0
    near: int = 0
    examples: list[str] = field(default_factory=list)


def overlap(
    entries: Iterable[tuple[Entry, Path]],
    validation: Mapping[str, frozenset[int] | None],
    tables: Tables | None = None,
) -> Overlap:
    """Compare the validation rows with all others; questions by text, whole rows by MinHash.

    `validation` maps a data set's key to the numbers (from 1) of its rows that are held out,
    None for all of them; the rows of a key that is not there are training rows. Memory is
    some hundred bytes a row.
    """
    found = Overlap()
    sketches = Sketches()
    held: list[bool] = []
    places: list[tuple[str, int]] = []
    questions: dict[int, int] = {}  # hash of a question -> 1 training, 2 validation, 3 both
    first: dict[int, tuple[str, int]] = {}
    asked: list[int] = []
    for entry, path in entries:
        key = entry.key or path.stem
        chosen = validation.get(key, frozenset())
        batch = []
        for number, value in enumerate(values_of(Reader(path, tables).pieces()), 1):
            question, answer = texts_of(value, entry)
            out = chosen is None or number in chosen
            name = hash(normal(question))
            questions[name] = questions.get(name, 0) | (2 if out else 1)
            if not out:
                first.setdefault(name, (key, number))
            held.append(out)
            asked.append(name)
            places.append((key, number))
            batch.append(f"{question}\n{answer}")
            if len(batch) >= 2000:
                sketches.add(batch)
                batch = []
        sketches.add(batch)
    found.validation = sum(held)
    seen: set[int] = set()
    for ordinal, out in enumerate(held):
        if out and questions[asked[ordinal]] == 3:
            seen.add(ordinal)
            found.same += 1
            if found.same <= _EXAMPLES:
                key, number = places[ordinal]
                other, row = first[asked[ordinal]]
                found.examples.append(f"row {number} of {key} asks what row {row} of {other} asks")
    for pair in sketches.across(held):
        if pair.again in seen:
            continue
        found.near += 1
        if found.near <= _EXAMPLES:
            (key, number), (other, row) = places[pair.again], places[pair.first]
            share = f"about {pair.alike:.0%}"
            found.examples.append(
                f"row {number} of {key} is {share} the same as row {row} of {other}"
            )
    return found
