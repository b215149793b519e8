"""What the fast preset does to a step: packed rows, and a processor's cheaper step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from llamafactory.extras.constants import IGNORE_INDEX
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tunesmith.job.training import cpu_lora, packing


@pytest.mark.parametrize(("limit", "count"), [(64, 3), (128, 3), (2048, 1)])
def test_each_row_is_computed_as_if_alone(tiny_model: Path, limit: int, count: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="sdpa").eval()
    torch.manual_seed(1)
    lengths = [5, 90, 17, 64, 33, 120, 8]
    width = max(lengths)
    ids = torch.randint(5, 1000, (len(lengths), width))
    attention = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
    labels = torch.where(attention == 1, ids, IGNORE_INDEX)
    batch = {"input_ids": ids, "attention_mask": attention, "labels": labels}
    packed = packing.pack_rows(batch, 0, limit)
    lines = packing.bin_pack(lengths, limit)
    worst = 0.0
    with torch.no_grad():
        logits = model(
            input_ids=packed["input_ids"],
            position_ids=packed["position_ids"],
            attention_mask=packing.segment_mask(packed["segment_ids"], torch.float32),
        ).logits
        for number, line in enumerate(lines):
            at = 0
            for row in line:
                n = lengths[row]
                alone = model(input_ids=ids[row : row + 1, :n]).logits[0]
                worst = max(worst, float((logits[number, at : at + n] - alone).abs().max()))
                at += n
    assert worst < 2e-4
    assert sorted(row for line in lines for row in line) == list(range(len(lengths)))
    trained = int((packed["labels"] != IGNORE_INDEX).sum())
    assert trained == sum(lengths) - len(lengths)
    assert packed["input_ids"].shape[1] % 128 == 0
    assert len(lines) == count


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({}, None),
        ({}, torch.bfloat16),
        ({"lora_dropout": 0.3}, None),
        # What PEFT computes in another way stays PEFT's.
        ({"use_dora": True}, None),
        ({"lora_bias": True}, None),
    ],
    ids=["float32", "bfloat16", "dropout", "DoRA", "bias"],
)
def test_a_processors_cheaper_step_has_the_same_loss_and_gradients(
    tiny_model: Path, options: dict[str, Any], numbers: torch.dtype | None
) -> None:
    """PEFT's and transformers' own."""
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, torch_dtype=numbers)
    # A scale that is no power of two, and an adapter that adds something.
    wanted = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", **options)
    model = get_peft_model(base, wanted).train()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
        if weight.requires_grad:
            weight.data = weight.data.float()
    ids = torch.randint(5, 1000, (3, 40))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.4, IGNORE_INDEX)
    head = model.get_output_embeddings()
    sizes: list[int] = []
    head.register_forward_hook(lambda _module, _given, made: sizes.append(made[..., 0].numel()))

    def once(inputs: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
        torch.manual_seed(2)
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=numbers is not None):
            loss = model(input_ids=ids, labels=labels, num_items_in_batch=50, **inputs).loss
        loss.backward()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        return loss.item(), {n: p.grad.clone() for n, p in trained.items()}

    loss, gradients = once({})
    layers = sum(name.endswith("lora_A.default.weight") for name, _ in model.named_parameters())
    changed = cpu_lora.add_in_place(model)
    assert changed == (0 if {"use_dora", "lora_bias"} & options.keys() else layers)
    assert layers == 2 * 7
    positions, tokens = cpu_lora.target_positions(labels)
    with cpu_lora.select_positions(head, positions):
        cheap, cheaper = once({"shift_labels": tokens})
    apart = max(float((cheaper[n] - g).norm() / g.norm()) for n, g in gradients.items())
    loss_limit, gradient_limit = (1e-5, 1e-4) if numbers is None else (0.01, 0.05)
    assert abs(cheap - loss) / loss < loss_limit
    assert apart < gradient_limit
    assert sizes == [3 * 40, len(tokens)] and len(tokens) < 120, "the head computes targets"
    assert model(input_ids=ids).logits.shape[1] == 40, "and afterwards all of it"
