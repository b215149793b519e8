"""Near-duplicates: MinHash of 8-byte shingles, found through bands; 128 bytes a row.

One permutation, 64 bins (Li, Owen, Zhang 2012): each shingle falls into a bin by its hash,
a bin keeps the smallest. The share of equal bins estimates the Jaccard similarity of two
rows (standard deviation 5 % at 0.8, 4 % at 0.9). Rows that agree in one of 16 bands of 4
bins are compared: that misses 1 pair in 5000 at 0.8.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

ALIKE = 0.8  # estimated similarity from which two rows are near-duplicates
SHORTEST = 40  # bytes of text below which a row has too few shingles to judge
_WIDTH = 8
_AT_ONCE = 1 << 18  # bytes: the arrays made of them fit into a core's cache (measured: 10 x)
_BINS, _BANDS = 64, 16
_EMPTY = np.uint16(0xFFFF)
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class NearPair:
    """Two rows, counted from 0, and how alike they are: 0.8 to 1."""

    first: int
    again: int
    alike: float


def normal(text: str) -> str:
    """Return a text without what makes no difference: case and blanks."""
    return " ".join(text.casefold().split())


class Sketches:
    """One sketch a row, for rows as they come."""

    def __init__(self) -> None:
        self._parts: list[Any] = []

    def add(self, texts: Sequence[str]) -> None:
        """Sketch some rows; their texts are not kept."""
        few: list[bytes] = []
        held = 0
        for text in texts:
            few.append(normal(text).encode("utf-8", "surrogatepass"))
            held += len(few[-1])
            if held >= _AT_ONCE:
                self._parts.append(_sketch(few))
                few, held = [], 0
        if few:
            self._parts.append(_sketch(few))

    def pairs(self) -> list[NearPair]:
        """Return each row that is near to one before it, once, with the first such row found."""
        nearest: dict[int, tuple[int, float]] = {}
        sketches = self._all()
        for order, starts, same in _bands(sketches):
            # The first row of each group of equal keys stands for it; neighbours too.
            first = np.repeat(order[starts], np.diff(np.r_[starts, len(order)]))
            for left, right in ((first[1:], order[1:]), (order[:-1], order[1:])):
                left, right = left[same], right[same]
                low, high = np.minimum(left, right), np.maximum(left, right)
                _collect(sketches, low, high, nearest)
        return _listed(nearest)

    def across(self, held: Sequence[bool]) -> list[NearPair]:
        """Return each held row (`again`) that is near to one not held (`first`), once."""
        nearest: dict[int, tuple[int, float]] = {}
        sketches = self._all()
        out = np.array(held, dtype=bool)
        for order, starts, _ in _bands(sketches):
            group = np.zeros(len(order), dtype=np.int64)
            group[starts[1:]] = 1
            group = np.cumsum(group)
            other = np.full(len(starts), -1, dtype=np.int64)
            known = ~out[order]
            # Backwards, so that the first row of a group is what stays.
            other[group[known][::-1]] = order[known][::-1]
            right = order[~known]
            left = other[group[~known]]
            _collect(sketches, left[left >= 0], right[left >= 0], nearest)
        return _listed(nearest)

    def _all(self) -> Any:
        """Return the sketches as one array, a row each."""
        if not self._parts:
            return np.empty((0, _BINS), dtype=np.uint16)
        self._parts = [np.concatenate(self._parts)]
        return self._parts[0]


def _bands(sketches: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Yield for each band (rows in the order of its key, where groups of equal keys start,
    whether a row has the key of the one before it)."""
    keys_of = sketches.view(np.uint64)
    empty = np.uint64(0xFFFFFFFFFFFFFFFF)
    rows = np.flatnonzero((sketches != _EMPTY).any(axis=1))
    for band in range(_BANDS if len(rows) > 1 else 0):
        judged = rows[keys_of[rows, band] != empty]
        order = judged[np.argsort(keys_of[judged, band], kind="stable")]
        if len(order) < 2:
            continue
        keys = keys_of[order, band]
        same = keys[1:] == keys[:-1]
        yield order, np.flatnonzero(np.r_[True, ~same]), same


def _collect(sketches: Any, left: Any, right: Any, nearest: dict[int, tuple[int, float]]) -> None:
    """Put pairs that are alike enough into `nearest`, right -> (first left, how alike)."""
    for start in range(0, len(left), 1 << 16):
        a, b = left[start : start + (1 << 16)], right[start : start + (1 << 16)]
        a, b = a[a != b], b[a != b]
        x, y = sketches[a], sketches[b]
        used = (x != _EMPTY) | (y != _EMPTY)
        alike = ((x == y) & used).sum(axis=1) / used.sum(axis=1)
        for place in np.flatnonzero(alike >= ALIKE):
            before, again = int(a[place]), int(b[place])
            known = nearest.get(again)
            if known is None or before < known[0]:
                nearest[again] = (before, float(alike[place]))


def _listed(nearest: dict[int, tuple[int, float]]) -> list[NearPair]:
    return [NearPair(before, again, alike) for again, (before, alike) in sorted(nearest.items())]


def _sketch(texts: Sequence[bytes]) -> Any:
    """Return one row of 64 values of 16 bits for each text; all empty for a short text."""
    lengths = np.array([len(text) for text in texts])
    sketch = np.full((len(texts), _BINS), 0xFFFFFFFF, dtype=np.uint32)
    data = b"".join(texts) + bytes(_WIDTH)
    # Every 8 bytes as one number: unaligned on purpose, numpy copies them in blocks.
    windows = np.ndarray((len(data) - _WIDTH,), np.uint64, data, 0, (1,))
    hashes = windows * _FACTOR
    hashes ^= hashes >> np.uint64(29)
    hashes *= _FACTOR
    row_of = np.repeat(np.arange(len(texts)), lengths)
    inside = np.arange(len(windows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    long_enough = (lengths >= SHORTEST)[row_of] & (inside <= lengths[row_of] - _WIDTH)
    hashes, row_of = hashes[long_enough], row_of[long_enough]
    bins = (hashes >> np.uint64(58)).astype(np.int64)
    values = ((hashes >> np.uint64(26)) & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    np.minimum.at(sketch.reshape(-1), row_of * _BINS + bins, values)
    # The smallest values have few leading bits: the low ones tell rows apart.
    low = (sketch & np.uint32(0x7FFF)).astype(np.uint16)
    low[sketch == 0xFFFFFFFF] = _EMPTY
    return low
