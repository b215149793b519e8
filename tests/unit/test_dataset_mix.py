"""What a pass takes of mixed data sets, in words; the numbers themselves are held against
LLaMA-Factory's own in tests/training/test_row_counts.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith.core.errors import UsageError
from tunesmith.dataset import mix
from tunesmith.plan import rows as planned
from tunesmith.plan.build import check_data

pytestmark = pytest.mark.unit

FEW, MANY = mix.Source("few", 3), mix.Source("many", 120)
BATCH = {"per_device_train_batch_size": 2, "num_train_epochs": 1.0}
UNDER = {**BATCH, "mix_strategy": "interleave_under"}


def told(config: dict[str, Any], *sources: mix.Source) -> list[str]:
    return list(mix.lines(mix.training_pass(config, sources), config))


def test_rows_that_a_mixture_never_takes_are_told() -> None:
    assert told(UNDER, FEW, MANY) == [
        "rows a pass: few 3, many 3 of 120 (6 in all)",
        "steps: 3 on one GPU or CPU",
        "warning: 117 of 120 rows of many are never seen (mix_strategy)",
    ]
    assert told({**UNDER, "mix_strategy": "interleave_over"}, FEW, MANY)[:2] == [
        "rows a pass: few 120 (3 different), many 120 (240 in all)",
        "steps: 120 on one GPU or CPU",
    ]


def test_rows_that_are_left_out_say_by_which_key() -> None:
    sampled = mix.Source("sampled", 50, 10)
    lines = told({**BATCH, "max_samples": 20, "val_size": 0.1}, sampled, MANY)
    assert lines[0] == "rows a pass: sampled 10 of 50, many 20 of 120 (30 in all), 3 held out"
    assert lines[2:] == [
        "warning: 40 of 50 rows of sampled are never seen (num_samples)",
        "warning: 100 of 120 rows of many are never seen (max_samples)",
    ]


def test_a_stream_says_what_it_never_reaches() -> None:
    stream = {**BATCH, "streaming": True, "max_steps": 10, "buffer_size": 30}
    far = [mix.Source("near", 60), mix.Source("far", 60)]
    (warning,) = [line for line in told(stream, *far) if line.startswith("warning")]
    assert warning == (
        "warning: max_steps reads 20 of 120 rows of the stream: none of far, which come after"
    )
    assert not any("warning" in line for line in told({**stream, "max_steps": 60}, *far))
    (close,) = [line for line in told({**stream, "buffer_size": 50}, *far) if "warning" in line]
    assert "far" not in close


@pytest.mark.parametrize(
    ("config", "write"),
    [
        ({"warmup_steps": 60}, "`warmup_steps: 6`"),
        ({"warmup_steps": 100}, "`warmup_steps: 6`"),
        ({"warmup_ratio": 1.0}, "`warmup_ratio: 0`"),
    ],
)
def test_a_warmup_that_never_ends_is_told(config: dict[str, Any], write: str) -> None:
    lines = told({**BATCH, **config}, MANY)
    assert lines[-1].startswith("warning: the warmup takes")
    assert lines[-1].endswith(write)
    assert not any("warmup" in line for line in told({**BATCH, "warmup_steps": 59}, MANY))


def test_steps_that_the_plan_cannot_know_say_who_does() -> None:
    assert "packing decides" in told({**BATCH, "packing": True}, MANY)[1]
    assert "packing decides" in told({**BATCH, "stage": "pt"}, MANY)[1]
    assert "counts its own" in told({**BATCH, "stage": "ppo"}, MANY)[1]
    assert told({**BATCH, "packing": True, "max_steps": 7}, MANY)[1].startswith("steps: 7")


@pytest.mark.parametrize(
    ("config", "sources", "message"),
    [
        ({"val_size": 200}, [MANY], "is 200 of 120 rows"),
        ({"val_size": 1}, [mix.Source("one", 1)], "is 1 of 1 rows"),
        ({**UNDER, "interleave_probs": "0.5,0.4"}, [FEW, MANY], "these to 0.9"),
        ({**UNDER, "interleave_probs": "1.5,-0.5"}, [FEW, MANY], "none below 0"),
        ({**UNDER, "interleave_probs": "0.5,0.2,0.3"}, [FEW, MANY], "3 numbers for 2"),
        ({**UNDER, "interleave_probs": "half,half"}, [FEW, MANY], "half,half"),
    ],
)
def test_a_mixture_that_stops_is_refused_and_the_hint_mends_it(
    config: dict[str, Any], sources: list[mix.Source], message: str
) -> None:
    with pytest.raises(UsageError) as refused:
        mix.training_pass({**BATCH, **config}, sources)
    assert message in refused.value.message
    key, value = refused.value.hint.split("`")[1].split(": ")
    mended = mix.training_pass({**BATCH, **config, key: value}, sources)
    assert mended.sequences


def test_a_set_without_a_share_is_refused_where_all_must_be_used_up() -> None:
    over = {**BATCH, "mix_strategy": "interleave_over", "interleave_probs": "0,1"}
    with pytest.raises(UsageError, match="gives few no share") as refused:
        mix.training_pass(over, [FEW, MANY])
    assert "remove few" in refused.value.hint


def test_the_plan_counts_what_the_check_has_counted(tmp_path: Path) -> None:
    for name, number in (("few", 3), ("many", 120)):
        rows = [{"instruction": f"{name} {n}", "output": f"answer {n}"} for n in range(number)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    columns = {"prompt": "instruction", "response": "output"}
    registry: dict[str, Any] = {
        n: {"file_name": f"{n}.json", "columns": columns} for n in ("few", "many")
    }
    registry["few"]["num_samples"] = 30
    (tmp_path / "dataset_info.json").write_text(json.dumps(registry))
    values = {**BATCH, "dataset": "few, many", "dataset_dir": str(tmp_path), "stage": "sft"}
    made = planned.planned(values, check_data(values))
    assert made is not None
    assert [(share.key, share.taken, share.seen) for share in made.shares] == [
        ("few", 30, 3),
        ("many", 120, 120),
    ]
    uneven = {**values, "eval_dataset": "few,many", "mix_strategy": "interleave_under"}
    with pytest.raises(UsageError, match="`eval_dataset`"):
        planned.planned({**uneven, "interleave_probs": "0.2,0.3,0.5"}, check_data(uneven))
    assert planned.planned({**values, "tokenized_path": "x"}, check_data(values)) is None
