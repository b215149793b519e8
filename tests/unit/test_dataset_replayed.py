"""What a replay found, in words and bars; steps, time and cost."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tunesmith.core.errors import UsageError
from tunesmith.dataset import histogram
from tunesmith.dataset.cost import Model, estimate, load_gpu, model_of, price_of, steps_of
from tunesmith.dataset.entry import Entry
from tunesmith.dataset.overlap import overlap
from tunesmith.dataset.replay_report import lines, overlap_lines, thinking

pytestmark = pytest.mark.unit


def found(**change: Any) -> dict[str, Any]:
    part = {
        "rows": 4,
        "kept": 3,
        "tokens": 300,
        "trained_tokens": 120,
        "counts": {"dropped": 1, "truncated": 1, "no_think": 3},
        "told": [
            {"kind": "dropped", "row": 2, "reason": "no answer that is a string"},
            {"kind": "truncated", "row": 4, "reason": "300 tokens, 128 stay"},
        ],
        "full": [[50, 1], [122, 1], [300, 1]],
    }
    return {
        "datasets": {"d": part},
        "train": ["d"],
        "eval": [],
        "cutoff_len": 128,
        "template": "deepseekr1",
        "reasoning": True,
        "enable_thinking": False,
        "sequences": 100,
        "batch_size": 2,
        "accumulation": 8,
        "epochs": 3.0,
        "max_steps": -1,
        "drop_last": False,
        "packing": False,
        "validation": [],
        "taken": {"d": 3},
        "seen": {"d": 3},
        "padded_tokens_an_epoch": 30_000,
        **change,
    }


def test_rows_cut_and_dropped_are_told_with_their_numbers() -> None:
    told = "\n".join(lines(found()))
    for part in (
        "d: 4 rows, 3 kept, 1 dropped, 1 cut",
        "row 2: no answer that is a string",
        "row 4: 300 tokens, 128 stay",
        "cut at cutoff_len 128: 33.3% of the rows; cutoff_len 300 keeps 99 %",
        "trained tokens: 40% of 300",
        "> cutoff_len",
        "enable_thinking: false fits the data",
    ):
        assert part in told, part


@pytest.mark.parametrize(
    ("counts", "mode", "says"),
    [
        ({"no_think": 3}, True, "write `enable_thinking: false` (an empty <think>"),
        ({"no_think": 3}, None, "training and chat then differ"),
        ({"no_think": 3}, False, "fits"),
        ({"think": 3}, True, "fits"),
        ({"think": 3}, False, "write `enable_thinking: true` (the reasoning is deleted"),
        ({"think": 3}, None, "chat then asks it not to think"),
        ({"think": 1, "no_think": 2}, True, "make them one kind"),
    ],
)
def test_thinking_mode(counts: dict[str, int], mode: bool | None, says: str) -> None:
    value = found(enable_thinking=mode)
    value["datasets"]["d"]["counts"] = counts
    (line,) = thinking(value)
    assert says in line
    assert list(thinking({**value, "reasoning": False})) == (
        []
        if "think" not in counts
        else [
            f"{counts['think']} answers hold <think>, which template "
            "deepseekr1 takes for plain text"
        ]
    )


def test_quantile_is_the_least_length_that_is_enough() -> None:
    lengths = [(n, 1) for n in range(1, 101)]
    assert [histogram.quantile(lengths, share) for share in (0.5, 0.99, 1.0)] == [50, 99, 100]
    assert histogram.quantile([(7, 1000), (9, 1)], 0.99) == 7


def test_bars_hold_every_row_once() -> None:
    generator = random.Random(2)
    for _ in range(50):
        lengths = sorted(
            {generator.randint(1, 5000): generator.randint(1, 9) for _ in range(40)}.items()
        )
        made = histogram.bars(lengths)
        assert sum(bar.rows for bar in made) == sum(count for _, count in lengths)
        assert len(made) <= 16
        for bar in made:
            inside = sum(count for length, count in lengths if bar.low <= length <= bar.high)
            assert inside == bar.rows


def test_picture_is_a_png(tmp_path: Path) -> None:
    path = tmp_path / "made" / "x.png"
    histogram.picture([(10, 5), (40, 2), (900, 1)], 64, "title", path)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "steps"),
    [({}, 21), ({"sequences": 1}, 3), ({"max_steps": 5}, 5), ({"epochs": 0.5}, 4)],
)
def test_steps_are_the_trainers(change: dict[str, Any], steps: int) -> None:
    assert steps_of(found(**change)) == steps  # ceil(ceil(100 / 2) / 8) = 7 an epoch


def test_time_is_bound_by_launches_or_by_arithmetic(root: Path) -> None:
    gpu = load_gpu(root / "configs/gpus.yml", "rtx 4090")
    small, large = Model(135_000_000, 30), Model(8_000_000_000, 32)
    value = found()
    launches = estimate(value, small, {}, gpu, None)
    micro_steps = 21 * 8
    assert launches.seconds == pytest.approx(
        (micro_steps * 30 * 0.0018, micro_steps * 30 * 0.0043), rel=1e-6
    )
    work = 30_000 * micro_steps / 50 * 6 * 8e9
    made = estimate({**value, "padded_tokens_an_epoch": 30_000}, large, {}, gpu, 1.98)
    assert made.seconds[0] == pytest.approx(
        max(work / (165.2e12 * 0.55), micro_steps * 32 * 0.0018)
    )
    assert made.cost == pytest.approx(tuple(s / 3600 * 1.98 for s in made.seconds))
    full = estimate(value, large, {"finetuning_type": "full"}, gpu, None)
    assert full.seconds[1] >= made.seconds[1]


def test_parameters_that_multiply() -> None:
    shapes = {
        "model.embed_tokens.weight": ("BF16", (1000, 10)),
        "model.layers.0.q.weight": ("BF16", (10, 10)),
        "model.norm.weight": ("BF16", (10,)),
    }
    assert model_of({"num_hidden_layers": 3}, shapes) == Model(10_100, 3)  # tied: it is the head
    shapes["lm_head.weight"] = ("BF16", (1000, 10))
    assert model_of({"num_hidden_layers": 3}, shapes) == Model(10_100, 3)


def test_every_gpu_has_a_source(root: Path) -> None:
    text = (root / "configs/gpus.yml").read_text()
    for line in text.partition("gpus:\n")[2].splitlines():
        assert "source: " in line
        assert load_gpu(root / "configs/gpus.yml", line.partition(":")[0].strip()).tflops > 50
    with pytest.raises(UsageError, match="--gpu RTX9999 is unknown; known are RTX3090"):
        load_gpu(root / "configs/gpus.yml", "RTX9999")


@pytest.mark.parametrize(("text", "price"), [("", None), ("1.98/h", 1.98), ("2", 2.0)])
def test_price(text: str, price: float | None) -> None:
    assert price_of(text) == price


@pytest.mark.parametrize("text", ["cheap", "-1", "nan", "1.98/day"])
def test_no_price(text: str) -> None:
    with pytest.raises(UsageError, match="--price"):
        price_of(text)


def test_overlap_of_validation_and_training_rows(tmp_path: Path) -> None:
    generator = random.Random(4)
    texts = ["".join(generator.choices("abcdefghij klmnop", k=150)) for _ in range(40)]
    rows = [{"instruction": f"q{n}", "output": text} for n, text in enumerate(texts)]
    rows.append({"instruction": "Q3", "output": "something else"})  # row 41: the question of row 4
    rows.append({"instruction": "q_9", "output": texts[9]})  # row 42: nearly row 10
    path = tmp_path / "x.json"
    path.write_text(json.dumps(rows))
    entry = Entry("k", columns={"prompt": "instruction", "response": "output"})
    seen = overlap([(entry, path)], {"k": frozenset({1, 2, 41, 42})})
    assert (seen.validation, seen.same, seen.near) == (4, 1, 1)
    assert "row 41 of k asks what row 4 of k asks" in seen.examples
    assert any("row 42 of k" in text and "row 10 of k" in text for text in seen.examples)
    told = list(overlap_lines(seen, by_split=True))
    assert "`inv data.split`" in told[-1]
    none = overlap([(entry, path)], {"k": frozenset({1, 2})})
    assert list(overlap_lines(none, by_split=True)) == [
        "validation: 2 rows, none of them in the training rows"
    ]
    other = Entry("other", columns=entry.columns)
    whole = overlap([(entry, path), (other, path)], {"other": None})
    assert (whole.validation, whole.same) == (42, 42)
