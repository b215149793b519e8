"""Rows packed into lines without padding between them, each computed as if it were alone.

A padded batch is [rows, length], each row padded to the longest one. A packed batch is
[lines, length]: a line contains rows end to end, `segment_ids` separate them, and position ids
start at 0 in each row.

Imports LLaMA-Factory's constants: only the worker of the train phase loads this module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from llamafactory.extras.constants import IGNORE_INDEX

from tunesmith.core.documents import Columns

# The most tokens of a line of packed rows: its mask grows quadratically.
LINE_TOKENS = 2048
# Lengths are rounded up to this: few shapes need few graphs, and SDPA's kernels need 8.
MULTIPLE = 128
# A CPU spends its time on the attention of long lines and does not wait for launches (measured: 4
# lines of 320 tokens take 0.7 of the time of 8 of 176, and 0.5 of that of one of 1,024).
CPU_LINE_TOKENS = 320
CPU_MULTIPLE = 32

# Tensors of a batch by name; each [rows, length] or [lines, length], int64.
Batch = Mapping[str, torch.Tensor]


def bin_pack(lengths: Sequence[int], line_tokens: int = LINE_TOKENS) -> list[list[int]]:
    """Return balanced lines of row numbers, each with at most `line_tokens` tokens.

    `lengths` are in tokens. A longer row makes its own length the limit of all lines.
    """
    limit = max(line_tokens, *lengths)
    count = -(-sum(lengths) // limit)
    while True:
        lines: list[list[int]] = [[] for _ in range(count)]
        fill = [0] * count
        for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
            least = fill.index(min(fill))
            lines[least].append(row)
            fill[least] += lengths[row]
        if max(fill) <= limit:
            return lines
        count += 1


def pack_rows(
    batch: Batch, pad_id: int, line_tokens: int = LINE_TOKENS, multiple: int = MULTIPLE
) -> dict[str, torch.Tensor]:
    """Convert a right-padded batch [rows, length] to a packed one [lines, length].

    The length is a multiple of `multiple`. `segment_ids` number the rows of a line from 1; 0 is
    padding. A row's first label is IGNORE_INDEX because no preceding token predicts it; the padded
    batch's shift drops it too. All four tensors (input_ids, labels, segment_ids, position_ids) are
    int64.
    """
    lengths = [int(n) for n in batch["attention_mask"].sum(dim=1)]
    lines = bin_pack(lengths, line_tokens)
    longest = max(sum(lengths[row] for row in line) for line in lines)
    shape = (len(lines), -(-longest // multiple) * multiple)
    packed = {
        "input_ids": torch.full(shape, pad_id),
        "labels": torch.full(shape, IGNORE_INDEX),
        "segment_ids": torch.zeros(shape, dtype=torch.long),
        "position_ids": torch.zeros(shape, dtype=torch.long),
    }
    for number, line in enumerate(lines):
        at = 0
        for segment, row in enumerate(line, start=1):
            length = lengths[row]
            target = (number, slice(at, at + length))
            packed["input_ids"][target] = batch["input_ids"][row, :length]
            packed["labels"][target] = batch["labels"][row, :length]
            packed["labels"][number, at] = IGNORE_INDEX
            packed["segment_ids"][target] = segment
            packed["position_ids"][target] = torch.arange(length)
            at += length
    return packed


def segment_mask(segment_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the causal mask that separates rows, to be added to attention scores.

    `segment_ids` is [lines, length], int64. The mask is [lines, 1, length, length] of `dtype`: 0
    where a token may attend, the lowest value of the dtype elsewhere.
    """
    length = segment_ids.shape[1]
    same = (segment_ids[:, None, :] == segment_ids[:, :, None]) & (segment_ids[:, None, :] != 0)
    causal = torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).tril()
    mask = torch.zeros(same.shape, dtype=dtype, device=segment_ids.device)
    return mask.masked_fill(~(same & causal), torch.finfo(dtype).min).unsqueeze(1)


@dataclass
class PackedCollator:
    """A collator: LLaMA-Factory's own, then `pack`."""

    plain: Callable[[list[Columns]], dict[str, torch.Tensor]]
    pack: Callable[[Batch], dict[str, torch.Tensor]]

    def __call__(self, features: list[Columns]) -> dict[str, torch.Tensor]:
        """Return a packed micro-batch of rows: [lines, length], int64."""
        return self.pack(self.plain(features))
