"""Settings that exclude or need one another in transformers 4.52.4: its trainer's own checks."""

from __future__ import annotations

from tunesmith.plan.rules.pair import Change, Pair
from tunesmith.plan.rules.settings import Settings


def _strategies_differ(settings: Settings) -> bool:
    if not settings.on("load_best_model_at_end") or settings.get("save_strategy") == "best":
        return False
    if settings.get("eval_strategy") != settings.get("save_strategy"):
        return True
    if settings.get("eval_strategy") != "steps":
        return False
    every, kept = _evaluated_every(settings), settings.number("save_steps")
    if (every < 1) != (kept < 1):
        return True
    return every > 0 and round(kept * 1_000_000) % round(every * 1_000_000) != 0


def _evaluated_every(settings: Settings) -> float:
    return settings.number("eval_steps") or settings.number("logging_steps")


def _alike(settings: Settings) -> Change:
    strategy = str(settings.get("save_strategy"))
    if strategy == "no":
        return {"load_best_model_at_end": False}
    if strategy == "steps":
        return {"eval_strategy": "steps", "eval_steps": settings.get("save_steps")}
    return {"eval_strategy": strategy}


def _fsdp(settings: Settings) -> set[str]:
    value = settings.get("fsdp")
    return set(value if isinstance(value, list) else str(value or "").split())


TRAINER_PAIRS = (
    # transformers/trainer_callback.py, EarlyStoppingCallback
    Pair(
        "early_stopping_steps",
        "EarlyStoppingCallback",
        lambda s: (
            s.get("early_stopping_steps") is not None
            and not s.on("load_best_model_at_end")
            and s.get("metric_for_best_model") is None
        ),
        "`early_stopping_steps` needs to know what is best",
        {"metric_for_best_model": "loss"},
    ),
    Pair(
        "early_stopping_steps",
        "EarlyStoppingCallback",
        lambda s: s.get("early_stopping_steps") is not None and s.get("eval_strategy") == "no",
        "`early_stopping_steps` follows the loss of held-out rows",
        {"eval_strategy": "epoch", "val_size": 0.1},
    ),
    # transformers/training_args.py
    Pair(
        "load_best_model_at_end",
        "TrainingArguments",
        _strategies_differ,
        "`load_best_model_at_end` needs `eval_strategy` and `save_strategy` alike, `save_steps` "
        "a multiple of `eval_steps`",
        _alike,
    ),
    Pair(
        "fp16",
        "TrainingArguments",
        lambda s: s.on("fp16") and s.on("bf16"),
        "`fp16` and `bf16` exclude each other",
        {"fp16": False},
    ),
    Pair(
        "fp16_full_eval",
        "TrainingArguments",
        lambda s: s.on("fp16_full_eval") and s.on("bf16_full_eval"),
        "`fp16_full_eval` and `bf16_full_eval` exclude each other",
        {"fp16_full_eval": False},
    ),
    Pair(
        "lr_scheduler_type",
        "TrainingArguments",
        lambda s: (
            s.get("lr_scheduler_type") == "reduce_lr_on_plateau" and s.get("eval_strategy") == "no"
        ),
        "`lr_scheduler_type: reduce_lr_on_plateau` follows the loss of held-out rows",
        {"eval_strategy": "epoch", "val_size": 0.1},
    ),
    Pair(
        "dataloader_prefetch_factor",
        "TrainingArguments",
        lambda s: (
            s.get("dataloader_prefetch_factor") is not None
            and s.number("dataloader_num_workers") == 0
        ),
        "`dataloader_prefetch_factor` needs `dataloader_num_workers`",
        {"dataloader_num_workers": 2},
    ),
    Pair(
        "fsdp",
        "TrainingArguments",
        lambda s: _fsdp(s) == {"offload"},
        "`fsdp: offload` comes with full_shard or shard_grad_op",
        {"fsdp": "full_shard offload"},
    ),
    Pair(
        "fsdp",
        "TrainingArguments",
        lambda s: {"full_shard", "shard_grad_op"} <= _fsdp(s),
        "`fsdp`: full_shard and shard_grad_op exclude each other",
        {"fsdp": "full_shard"},
    ),
)
