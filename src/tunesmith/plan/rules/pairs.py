"""Settings that exclude or need one another in LLaMA-Factory 0.9.3.

Each rule stands for one check of theirs (hparams/parser.py, hparams/*_args.py), whose `source` it
names; those of the trainer are in trainer_pairs. tests/data/settings.yml holds a setting for each,
and what their own parser says to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tunesmith.plan.rules.fault import REMOVE, Fault
from tunesmith.plan.rules.pair import Change, Pair, given
from tunesmith.plan.rules.settings import Settings
from tunesmith.plan.rules.trainer_pairs import TRAINER_PAIRS

# RayArguments without use_ray, which is no key of a YAML.
_RAY = (
    *("ray_run_name", "ray_num_workers", "ray_storage_path", "ray_storage_filesystem"),
    *("resources_per_worker", "placement_strategy", "ray_init_kwargs"),
)


def _other_stage(settings: Settings) -> bool:
    return settings.stage != "sft"


def _probabilities(settings: Settings, key: str) -> bool:
    wanted = settings.names("interleave_probs")
    return bool(wanted) and bool(settings.get(key)) and len(settings.names(key)) != len(wanted)


def _equal_shares(settings: Settings) -> Change:
    number = len(settings.names("dataset")) or 1
    share = round(1 / number, 3)
    # The last takes the rest: datasets refuses shares that do not add up to 1.
    last = round(1 - share * (number - 1), 3)
    return {"interleave_probs": ",".join(f"{x:g}" for x in (*[share] * (number - 1), last))}


def _memory_optimizers(settings: Settings) -> list[str]:
    return [key for key in ("use_galore", "use_apollo", "use_badam") if settings.on(key)]


def _reference_model(settings: Settings) -> bool:
    return settings.stage == "dpo" and settings.get("pref_loss") not in ("orpo", "simpo")


def _several(settings: Settings, key: str) -> bool:
    return len(settings.names(key)) > 1


def _names_twice(key: str) -> Callable[[Settings], bool]:
    return lambda settings: len(settings.names(key)) != len(set(settings.names(key)))


def _without_lora(key: str) -> Callable[[Settings], bool]:
    return lambda settings: settings.method != "lora" and settings.on(key)


def _other_bits(key: str) -> Callable[[Settings], bool]:
    return lambda settings: settings.get(key) not in (None, 4, 8)


def _once(key: str) -> Callable[[Settings], Change]:
    return lambda settings: {key: ",".join(dict.fromkeys(settings.names(key)))}


_LLAMAFACTORY = (
    # data/loader.py keeps the sets in a dict by name.
    *(
        Pair(
            key,
            "_get_merged_dataset",
            _names_twice(key),
            f"`{key}` names a data set twice, and LLaMA-Factory would use it once",
            _once(key),
            "`num_samples` in dataset_info.json takes a set more often",
        )
        for key in ("dataset", "eval_dataset")
    ),
    # hparams/data_args.py
    Pair(
        "val_size",
        "DataArguments",
        lambda s: not s.names("dataset") and s.number("val_size") > 1e-6,
        "`val_size` holds out rows of `dataset`, and there is none",
        {"val_size": REMOVE},
    ),
    Pair(
        "val_size",
        "DataArguments",
        lambda s: bool(s.names("eval_dataset")) and s.number("val_size") > 1e-6,
        "`val_size` and `eval_dataset` exclude each other: rows are held out, or given",
        {"val_size": REMOVE},
    ),
    Pair(
        "interleave_probs",
        "DataArguments",
        lambda s: bool(s.names("interleave_probs")) and s.get("mix_strategy") == "concat",
        "`interleave_probs` has no meaning with `mix_strategy: concat`",
        {"mix_strategy": "interleave_under"},
    ),
    Pair(
        "interleave_probs",
        "DataArguments",
        lambda s: _probabilities(s, "dataset") and s.get("mix_strategy") != "concat",
        "`interleave_probs` needs one number for each data set of `dataset`",
        _equal_shares,
    ),
    Pair(
        "interleave_probs",
        "DataArguments",
        lambda s: _probabilities(s, "eval_dataset") and s.get("mix_strategy") != "concat",
        "`interleave_probs` needs one number for each data set of `eval_dataset` too",
        {"eval_dataset": REMOVE},
    ),
    Pair(
        "val_size",
        "DataArguments",
        lambda s: s.on("streaming") and 1e-6 < s.number("val_size") < 1,
        "`val_size` must be a number of rows with `streaming`: how many there are is not known",
        {"val_size": 100},
    ),
    Pair(
        "max_samples",
        "DataArguments",
        lambda s: s.on("streaming") and s.get("max_samples") is not None,
        "`max_samples` and `streaming` exclude each other; `max_steps` ends a stream",
        {"max_samples": REMOVE},
    ),
    Pair(
        "max_steps",
        "get_train_args",
        lambda s: s.on("streaming") and s.number("max_steps") == -1,
        "`streaming` needs `max_steps`: a stream has no end that is known",
        {"max_steps": 1000},
        "as many steps as you want",
    ),
    Pair(
        "mask_history",
        "DataArguments",
        lambda s: s.on("mask_history") and s.on("train_on_prompt"),
        "`mask_history` and `train_on_prompt` exclude each other",
        {"train_on_prompt": False},
    ),
    # hparams/finetuning_args.py
    Pair(
        "reward_model",
        "FinetuningArguments",
        lambda s: s.stage == "ppo" and s.get("reward_model") is None,
        "`stage: ppo` needs `reward_model`, the adapter or folder of a `stage: rm` run",
        {},
        "train one with `stage: rm`, then name its result as `reward_model`",
    ),
    Pair(
        "reward_model_type",
        "FinetuningArguments",
        lambda s: s.stage == "ppo" and s.get("reward_model_type") == "lora" and s.method != "lora",
        "`reward_model_type: lora` needs `finetuning_type: lora`",
        {"reward_model_type": "full"},
    ),
    Pair(
        "dpo_label_smoothing",
        "FinetuningArguments",
        lambda s: (
            s.stage == "dpo"
            and s.get("pref_loss") != "sigmoid"
            and s.number("dpo_label_smoothing") > 1e-6
        ),
        "`dpo_label_smoothing` belongs to `pref_loss: sigmoid` alone",
        {"dpo_label_smoothing": REMOVE},
    ),
    Pair(
        "use_llama_pro",
        "FinetuningArguments",
        lambda s: s.on("use_llama_pro") and s.method == "full",
        "`use_llama_pro` is for `finetuning_type: freeze` or `lora`",
        {"finetuning_type": "freeze"},
    ),
    Pair(
        "finetuning_type",
        "FinetuningArguments",
        lambda s: s.method == "lora" and bool(_memory_optimizers(s)),
        "GaLore, APOLLO and BAdam train all weights: they exclude `finetuning_type: lora`",
        lambda s: given(s, "use_galore", "use_apollo", "use_badam"),
    ),
    Pair(
        "use_galore",
        "FinetuningArguments",
        lambda s: len(_memory_optimizers(s)) > 1,
        "GaLore, APOLLO and BAdam exclude one another",
        lambda s: given(s, *_memory_optimizers(s)[1:]),
    ),
    Pair(
        "pissa_init",
        "FinetuningArguments",
        lambda s: s.on("pissa_init") and (s.stage in ("ppo", "kto") or _reference_model(s)),
        "`pissa_init` changes the base model, which this stage compares with",
        {"pissa_init": REMOVE},
    ),
    *(
        Pair(
            key,
            "FinetuningArguments",
            _without_lora(key),
            f"`{key}` is for `finetuning_type: lora`",
            {key: REMOVE},
        )
        for key in ("loraplus_lr_ratio", "use_rslora", "use_dora", "pissa_init")
    ),
    *(
        Pair(
            key,
            "FinetuningArguments",
            _other_bits(key),
            f"`{key}` is 4 or 8",
            {key: 4},
        )
        for key in ("ref_model_quantization_bit", "reward_model_quantization_bit")
    ),
    # hparams/training_args.py, RayArguments: read only where USE_RAY is set, which no job here has.
    Pair(
        "ray_num_workers",
        "RayArguments",
        lambda s: s.on("ray_run_name") or s.number("ray_num_workers") > 1,
        "Ray is not used here: the training runs on the GPUs of one machine, whatever `ray_*` say",
        lambda s: given(s, *_RAY),
    ),
    # hparams/model_args.py
    Pair(
        "split_special_tokens",
        "ModelArguments",
        lambda s: s.on("split_special_tokens") and s.on("use_fast_tokenizer"),
        "`split_special_tokens` needs the slow tokenizer",
        {"use_fast_tokenizer": False},
    ),
    Pair(
        "image_max_pixels",
        "ProcessorArguments",
        lambda s: s.number("image_max_pixels") < s.number("image_min_pixels"),
        "`image_max_pixels` is smaller than `image_min_pixels`",
        lambda s: given(s, "image_max_pixels", "image_min_pixels"),
    ),
    Pair(
        "video_max_pixels",
        "ProcessorArguments",
        lambda s: s.number("video_max_pixels") < s.number("video_min_pixels"),
        "`video_max_pixels` is smaller than `video_min_pixels`",
        lambda s: given(s, "video_max_pixels", "video_min_pixels"),
    ),
    # hparams/parser.py
    Pair(
        "predict_with_generate",
        "get_train_args",
        lambda s: _other_stage(s) and s.on("predict_with_generate"),
        "`predict_with_generate` is for `stage: sft`",
        {"predict_with_generate": REMOVE},
    ),
    Pair(
        "neat_packing",
        "get_train_args",
        lambda s: _other_stage(s) and s.on("neat_packing"),
        "`neat_packing` is for `stage: sft`",
        {"neat_packing": REMOVE},
    ),
    Pair(
        "train_on_prompt",
        "get_train_args",
        lambda s: _other_stage(s) and (s.on("train_on_prompt") or s.on("mask_history")),
        "`train_on_prompt` and `mask_history` are for `stage: sft`",
        lambda s: given(s, "train_on_prompt", "mask_history"),
    ),
    Pair(
        "do_predict",
        "get_train_args",
        lambda s: s.stage == "sft" and s.on("do_predict") and not s.on("predict_with_generate"),
        "`do_predict` needs `predict_with_generate`",
        {"do_predict": REMOVE},
        "`inv predict` answers a data set after the training",
    ),
    Pair(
        "load_best_model_at_end",
        "get_train_args",
        lambda s: s.stage in ("rm", "ppo") and s.on("load_best_model_at_end"),
        "`load_best_model_at_end` does not work with `stage: rm` and `stage: ppo`",
        {"load_best_model_at_end": REMOVE},
    ),
    # model/model_utils/longlora.py asks for transformers < 4.48, in every stage.
    Pair(
        "shift_attn",
        "longlora",
        lambda s: s.on("shift_attn"),
        "`shift_attn` needs transformers < 4.48, and this stack has 4.52.4",
        {"shift_attn": REMOVE},
    ),
    Pair(
        "eval_strategy",
        "get_train_args",
        lambda s: (s.evaluates or s.on("do_predict")) and not s.has_validation,
        "the trainer is to evaluate, and no rows are held out",
        {"val_size": 0.1},
        "or write `eval_strategy: 'no'`",
    ),
    Pair(
        "predict_with_generate",
        "get_train_args",
        lambda s: s.on("predict_with_generate") and not s.names("eval_dataset"),
        "`predict_with_generate` needs `eval_dataset`",
        {"predict_with_generate": REMOVE},
        "`inv predict` answers held-out rows after the training",
    ),
    Pair(
        "compute_accuracy",
        "get_train_args",
        lambda s: s.on("predict_with_generate") and s.on("compute_accuracy"),
        "`compute_accuracy` and `predict_with_generate` exclude each other",
        {"compute_accuracy": REMOVE},
    ),
    Pair(
        "quantization_device_map",
        "get_train_args",
        lambda s: s.on("do_train") and s.get("quantization_device_map") == "auto",
        "`quantization_device_map: auto` is for answers, not for a training",
        {"quantization_device_map": REMOVE},
    ),
    Pair(
        "infer_backend",
        "get_train_args",
        lambda s: s.get("infer_backend") != "huggingface",
        "`infer_backend` vllm and sglang are for chat and API, not for a training",
        {"infer_backend": REMOVE},
    ),
    Pair(
        "adapter_name_or_path",
        "_verify_model_args",
        lambda s: bool(s.names("adapter_name_or_path")) and s.method != "lora",
        "`adapter_name_or_path` needs `finetuning_type: lora`",
        {"finetuning_type": "lora"},
    ),
    Pair(
        "quantization_bit",
        "_verify_model_args",
        lambda s: s.get("quantization_bit") is not None and s.method != "lora",
        "quantised weights cannot be trained: `quantization_bit` needs `finetuning_type: lora`",
        {"finetuning_type": "lora"},
    ),
    Pair(
        "pissa_init",
        "_verify_model_args",
        lambda s: s.get("quantization_bit") is not None and s.on("pissa_init"),
        "`pissa_init` changes the base model, which `quantization_bit` has quantised",
        {"pissa_init": REMOVE},
    ),
    Pair(
        "resize_vocab",
        "_verify_model_args",
        lambda s: s.get("quantization_bit") is not None and s.on("resize_vocab"),
        "`resize_vocab` does not work on a quantised model",
        {"resize_vocab": REMOVE},
    ),
    Pair(
        "create_new_adapter",
        "_verify_model_args",
        lambda s: (
            s.get("quantization_bit") is not None
            and bool(s.names("adapter_name_or_path"))
            and s.on("create_new_adapter")
        ),
        "`create_new_adapter` does not work on a quantised model",
        {"create_new_adapter": REMOVE},
    ),
    Pair(
        "adapter_name_or_path",
        "_verify_model_args",
        lambda s: s.get("quantization_bit") is not None and _several(s, "adapter_name_or_path"),
        "a quantised model takes one adapter",
        lambda s: {"adapter_name_or_path": s.names("adapter_name_or_path")[-1]},
        "merge the earlier ones first",
    ),
)
PAIRS: tuple[Pair, ...] = (*_LLAMAFACTORY, *TRAINER_PAIRS)


def faults(settings: Settings) -> Iterator[Fault]:
    """Yield a fault for each rule that a config breaks."""
    for pair in PAIRS:
        if pair.broken(settings):
            yield pair.fault(settings)
