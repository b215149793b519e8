"""The fast preset computes the same steps: losses, adapters, resumes, and its guard."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from jobs import STANDINS, Job
from tunesmith.core.files import write_json
from tunesmith.job.system.resources import multiplies_bf16

pytestmark = pytest.mark.e2e

# Dropout would draw other numbers for rows in another order.
PLAIN = {"lora_dropout": 0.0, "max_steps": 12, "save_steps": 6, "warmup_ratio": 0.0}
SMALL = PLAIN | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
WHOLE = PLAIN | {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "disable_gradient_checkpointing": True,
}

# What pack_rows must give: each row's logits as if it were alone.
ALONE = """
import sys, torch
from transformers import AutoModelForCausalLM
from tunesmith.job.training import packing

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="sdpa").eval()
torch.manual_seed(1)
lengths = [5, 90, 17, 64, 33, 120, 8]
width = max(lengths)
ids = torch.randint(5, 1000, (len(lengths), width))
attention = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
labels = torch.where(attention == 1, ids, packing.IGNORE_INDEX)
batch = {"input_ids": ids, "attention_mask": attention, "labels": labels}
limit = int(sys.argv[2])
packed = packing.pack_rows(batch, 0, limit)
lines = packing.bin_pack(lengths, limit)
with torch.no_grad():
    logits = model(
        input_ids=packed["input_ids"],
        position_ids=packed["position_ids"],
        attention_mask=packing.segment_mask(packed["segment_ids"], torch.float32),
    ).logits
    worst = 0.0
    for number, line in enumerate(lines):
        at = 0
        for row in line:
            n = lengths[row]
            alone = model(input_ids=ids[row : row + 1, :n]).logits[0]
            worst = max(worst, float((logits[number, at : at + n] - alone).abs().max()))
            at += n
assert sorted(row for line in lines for row in line) == list(range(len(lengths)))
assert int((packed["labels"] != packing.IGNORE_INDEX).sum()) == sum(lengths) - len(lengths)
print(len(lines), packed["input_ids"].shape[1], worst)
"""

# What cpu_lora must give: PEFT's and transformers' own loss and gradients.
CHEAPER = """
import json, sys, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from tunesmith.job.training import cpu_lora, packing

found = {}
for kind, options, numbers in (
    ("float32", {}, None),
    ("bfloat16", {}, torch.bfloat16),
    ("dropout", {"lora_dropout": 0.3}, None),
    ("DoRA", {"use_dora": True}, None),
    ("bias", {"lora_bias": True}, None),
):
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(sys.argv[1], torch_dtype=numbers)
    # A scale that is no power of two, and an adapter that adds something.
    wanted = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", **options)
    model = get_peft_model(base, wanted).train()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
        if weight.requires_grad:
            weight.data = weight.data.float()
    ids = torch.randint(5, 1000, (3, 40))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.4, packing.IGNORE_INDEX)
    head = model.get_output_embeddings()
    sizes = []
    head.register_forward_hook(lambda module, given, made: sizes.append(made.shape[:-1].numel()))

    def once(inputs):
        torch.manual_seed(2)
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=numbers is not None):
            loss = model(input_ids=ids, labels=labels, num_items_in_batch=50, **inputs).loss
        loss.backward()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        return loss.item(), {n: p.grad.clone() for n, p in trained.items()}

    loss, gradients = once({})
    changed = cpu_lora.add_in_place(model)
    positions, tokens = cpu_lora.target_positions(labels)
    with cpu_lora.select_positions(head, positions):
        cheap, cheaper = once({"shift_labels": tokens})
    again = model(input_ids=ids).logits.shape[1]
    apart = max(float((cheaper[n] - g).norm() / g.norm()) for n, g in gradients.items())
    found[kind] = [changed, abs(cheap - loss) / loss, apart, sizes, len(tokens), again]
print(json.dumps(found))
"""


@pytest.fixture(scope="session")
def padded(
    tmp_path_factory: pytest.TempPathFactory, training_python: Path, tiny_model: Path, data: Path
) -> Job:
    """A training as LLaMA-Factory does it: one row after the other, checkpointing on."""
    made = Job(training_python, tmp_path_factory.mktemp("runs") / "padded")
    made.make(tiny_model, data, **SMALL)
    made.call("start")
    made.wait_for_end("succeeded")
    return made


def test_the_same_steps_as_padded_rows(job: Job, padded: Job, tiny_model: Path, data: Path) -> None:
    job.make(tiny_model, data, preset="fast", **WHOLE)
    job.call("start")
    job.wait_for_end("succeeded")
    assert job.events("changed") == []
    losses = job.losses()
    assert losses.keys() == padded.losses().keys()
    assert max(abs(losses[step] - padded.losses()[step]) for step in losses) < 2e-4
    assert losses[12] < losses[1] - 0.03, "it learns"
    # Its rows are laid end to end: no more tokens, padding included, than rows one by one.
    seen = json.loads((job.folder.output / "trainer_state.json").read_text())
    theirs = json.loads((padded.folder.output / "trainer_state.json").read_text())
    assert 0 < seen["num_input_tokens_seen"] <= theirs["num_input_tokens_seen"]
    assert seen["global_step"] == theirs["global_step"] == 12


def test_a_smaller_micro_batch_after_a_checkpoint_keeps_the_step(
    job: Job, padded: Job, tiny_model: Path, data: Path
) -> None:
    """What the supervisor does after a GPU ran out of memory in the middle of a training."""
    job.make(tiny_model, data, preset="fast", **WHOLE)
    job.call("start")
    job.wait(lambda: job.step() >= 7, "a checkpoint")
    job.call("stop")
    job.wait(lambda: not job.folder.busy(), "the stop", 60)
    change = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    write_json(job.folder.adjustments_file, change)
    job.call("start")
    job.wait_for_end("succeeded")
    losses = job.losses()
    assert max(abs(losses[step] - padded.losses()[step]) for step in losses) < 2e-4


def test_bf16_stays_where_the_processor_multiplies_it(
    job: Job, padded: Job, tiny_model: Path, data: Path
) -> None:
    job.make(tiny_model, data, preset="fast", **WHOLE, bf16=True)
    job.call("start")
    job.wait_for_end("succeeded")
    told = [(event["what"], event["to"]) for event in job.events("changed")]
    assert told == [("use_cpu", True) if multiplies_bf16() else ("bf16", False)]
    losses, expected = job.losses(), padded.losses()
    assert max(abs(losses[step] - expected[step]) / expected[step] for step in losses) < 0.01
    rounded = any(abs(losses[step] - expected[step]) > 2e-4 for step in losses)
    assert rounded == multiplies_bf16()


def test_rows_that_see_one_another_are_noticed(job: Job, tiny_model: Path, data: Path) -> None:
    """The guard's check: with a mask that does not keep rows apart it pads as ever."""
    job.make(
        tiny_model,
        data,
        preset="fast",
        standin=STANDINS / "leaking_mask.py",
        **WHOLE,
    )
    job.call("start")
    job.wait_for_end("succeeded")
    (told,) = job.events("changed")
    assert told["what"] == "packed rows"
    assert "the first rows' logits would differ by" in told["why"]


def test_a_micro_batch_that_memory_does_not_hold_is_lowered(
    job: Job, padded: Job, tiny_model: Path, data: Path
) -> None:
    job.make(tiny_model, data, preset="fast", standin=STANDINS / "little_memory.py", **WHOLE)
    job.call("start")
    job.wait_for_end("succeeded")
    (told,) = job.events("changed")
    assert (told["what"], told["from"], told["to"]) == ("per_device_train_batch_size", 8, 1)
    losses = job.losses()
    assert max(abs(losses[step] - padded.losses()[step]) for step in losses) < 2e-4
    kept = json.loads(job.folder.adjustments_file.read_text())
    assert kept == {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}


@pytest.mark.parametrize("line", [64, 128, 2048])
def test_each_row_is_computed_as_if_alone(
    training_python: Path, tiny_model: Path, line: int
) -> None:
    argv = [training_python, "-c", ALONE, tiny_model, str(line)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    lines, width, worst = done.stdout.split()
    assert float(worst) < 2e-4
    assert int(width) % 128 == 0
    assert int(lines) == {64: 3, 128: 3, 2048: 1}[line]


def test_a_processors_cheaper_step_has_the_same_loss_and_gradients(
    training_python: Path, tiny_model: Path
) -> None:
    argv = [training_python, "-c", CHEAPER, tiny_model]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    layers = found["float32"][0]
    assert layers > 0
    for kind, (changed, loss, gradient, sizes, targets, after) in found.items():
        # What PEFT computes in another way stays PEFT's.
        assert changed == (0 if kind in ("DoRA", "bias") else layers), kind
        rounding = (0.01, 0.05) if kind == "bfloat16" else (1e-5, 1e-4)
        assert loss < rounding[0] and gradient < rounding[1], kind
        assert sizes[:2] == [3 * 40, targets] and targets < 120, "the head computes targets"
        assert after == 40, "and afterwards all of it"
