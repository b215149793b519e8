"""Rows in lines, the head at target positions, and a step that cannot be recorded."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from llamafactory.extras.constants import IGNORE_INDEX

from tunesmith.job.training import cpu_lora, cuda_graphs, packing

PAD = 9


def padded(lengths: list[int]) -> dict[str, torch.Tensor]:
    """A right-padded batch whose tokens say which row and place they are of."""
    width = max(lengths)
    ids = torch.arange(len(lengths))[:, None] * 1000 + torch.arange(width) + 10
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return {
        "input_ids": torch.where(mask, ids, PAD),
        "attention_mask": mask.long(),
        "labels": torch.where(mask, ids, IGNORE_INDEX),
    }


@pytest.mark.parametrize("seed", range(20))
def test_each_row_is_in_one_line_that_holds_it(seed: int) -> None:
    draw = random.Random(seed)
    lengths = [draw.randint(1, 300) for _ in range(draw.randint(1, 40))]
    lines = packing.bin_pack(lengths, 256)
    assert sorted(row for line in lines for row in line) == list(range(len(lengths)))
    limit = max(256, *lengths, 1)
    assert all(sum(lengths[row] for row in line) <= limit for line in lines)
    # No more lines than twice as many as the tokens need.
    assert len(lines) <= 2 * -(-sum(lengths) // limit)


def test_a_packed_batch_has_every_token_in_its_row() -> None:
    lengths = [5, 90, 17, 64]
    batch = padded(lengths)
    packed = packing.pack_rows(batch, PAD, 100, 32)
    width = packed["input_ids"].shape[1]
    assert width % 32 == 0
    for tensor in packed.values():
        assert tensor.shape == packed["input_ids"].shape
        assert tensor.dtype == torch.int64
    found = {}
    for line in range(len(packed["input_ids"])):
        for segment in packed["segment_ids"][line].unique().tolist():
            here = packed["segment_ids"][line] == segment
            if segment == 0:
                assert (packed["input_ids"][line][here] == PAD).all()
                assert (packed["labels"][line][here] == IGNORE_INDEX).all()
                continue
            tokens = packed["input_ids"][line][here]
            row = int(tokens[0]) // 1000
            found[row] = tokens.tolist()
            assert packed["position_ids"][line][here].tolist() == list(range(lengths[row]))
            labels = packed["labels"][line][here]
            assert labels[0] == IGNORE_INDEX
            assert (labels[1:] == tokens[1:]).all()
    assert found == {
        row: batch["input_ids"][row, :length].tolist() for row, length in enumerate(lengths)
    }


def test_a_token_sees_its_own_row_up_to_itself() -> None:
    segments = torch.tensor([[1, 1, 2, 2, 2, 0]])
    mask = packing.segment_mask(segments, torch.float32)
    assert mask.shape == (1, 1, 6, 6)
    sees = [[place for place in range(6) if mask[0, 0, at, place] == 0] for at in range(6)]
    assert sees == [[0], [0, 1], [2], [2, 3], [2, 3, 4], []]
    assert mask.min() == torch.finfo(torch.float32).min


def test_the_head_computes_target_positions_and_no_others() -> None:
    labels = torch.tensor(
        [[IGNORE_INDEX, 7, IGNORE_INDEX, 8], [IGNORE_INDEX, IGNORE_INDEX, 5, IGNORE_INDEX]]
    )
    positions, tokens = cpu_lora.target_positions(labels)
    assert (positions.tolist(), tokens.tolist()) == ([0, 2, 5], [7, 8, 5])
    head = torch.nn.Linear(3, 11, bias=False)
    hidden = torch.randn(2, 4, 3)
    whole = head(hidden)
    with cpu_lora.select_positions(head, positions):
        selected = head(hidden)
    assert selected.shape == (1, 3, 11)
    assert torch.allclose(selected[0], whole.flatten(0, 1)[positions])
    assert head(hidden).shape == (2, 4, 11), "and afterwards all of it"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU records it")
def test_a_step_that_cannot_be_recorded_is_left_to_the_caller() -> None:
    """Once, with the reason; gradients that other micro-batches left are as they were."""
    model = torch.nn.Linear(2, 1)
    before = [torch.ones_like(parameter) for parameter in model.parameters()]
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        parameter.grad = gradient
    reasons: list[str] = []

    def step(module: Any, inputs: Any, items: torch.Tensor) -> torch.Tensor:
        loss = module(inputs["input_ids"].float()).sum() / items
        loss.backward()
        return loss.detach()

    steps = cuda_graphs.GraphedSteps(
        step, list(model.parameters()), torch.device("cpu"), 0.001, reasons.append
    )
    inputs = {"input_ids": torch.ones(1, 2, dtype=torch.long)}
    for _ in range(2):
        assert steps.run(model, inputs, torch.tensor(1), whole=True) is None
    assert len(reasons) == 1 and reasons[0]
    assert all(
        parameter.grad is gradient
        for parameter, gradient in zip(model.parameters(), before, strict=True)
    )


@pytest.mark.parametrize(
    ("values", "near"), [([1.0, 2.0], True), ([1.1, 2.0], False), ([float("nan"), 2.0], False)]
)
def test_near_is_a_share_of_the_expected_value(values: list[float], near: bool) -> None:
    assert cuda_graphs.close(values, [1.0, 2.0], 0.05) is near
