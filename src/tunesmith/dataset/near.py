"""Near-duplicates: MinHash of 8-byte shingles, found through bands; 128 bytes a row.

One permutation, 64 bins (Li, Owen, Zhang 2012): each shingle falls into a bin by its hash,
a bin keeps the smallest. The share of equal bins estimates the Jaccard similarity of two
rows (standard deviation 5 % at 0.8, 4 % at 0.9). Rows that agree in one of 16 bands of 4
bins are compared: that misses 1 pair in 5000 at 0.8.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        self._rows = 0

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
        self._rows += len(texts)

    def pairs(self) -> list[NearPair]:
        """Return each row that is near to one before it, once, with the first such row found."""
        if self._rows < 2:
            return []
        sketches = np.concatenate(self._parts)
        self._parts = [sketches]
        judged = (sketches != _EMPTY).any(axis=1)
        nearest: dict[int, tuple[int, float]] = {}
        bands = sketches.view(np.uint64)
        empty = np.uint64(0xFFFFFFFFFFFFFFFF)
        for band in range(_BANDS):
            keys = bands[:, band]
            order = np.argsort(keys, kind="stable")
            same = (keys[order][1:] == keys[order][:-1]) & (keys[order][1:] != empty)
            starts = np.flatnonzero(np.r_[True, ~same])
            # The first row of each group of equal keys stands for it.
            first = np.repeat(order[starts], np.diff(np.r_[starts, len(order)]))
            for left, right in ((first[1:], order[1:]), (order[:-1], order[1:])):
                _collect(sketches, judged, left[same], right[same], nearest)
        return [
            NearPair(before, again, alike) for again, (before, alike) in sorted(nearest.items())
        ]


def _collect(
    sketches: Any, judged: Any, left: Any, right: Any, nearest: dict[int, tuple[int, float]]
) -> None:
    """Put pairs that are alike enough into `nearest`; both arrays count rows."""
    for start in range(0, len(left), 1 << 16):
        a, b = left[start : start + (1 << 16)], right[start : start + (1 << 16)]
        valid = judged[a] & judged[b] & (a != b)
        a, b = a[valid], b[valid]
        x, y = sketches[a], sketches[b]
        used = (x != _EMPTY) | (y != _EMPTY)
        alike = ((x == y) & used).sum(axis=1) / used.sum(axis=1)
        for before, again, share in zip(a, b, alike, strict=True):
            if share >= ALIKE:
                pair = (int(min(before, again)), int(max(before, again)))
                known = nearest.get(pair[1])
                if known is None or pair[0] < known[0]:
                    nearest[pair[1]] = (pair[0], float(share))


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
