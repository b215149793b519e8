"""A run that comes from another machine, made one of this machine: of named, checked fields.

What the host wrote (run.json, config.yaml, status.json, adjustments.json) stays beside as
RUN/host/NAME, to be looked at; nothing is started from it. The run's own files are written anew:
what a merge, a proof, a prediction, a chat and a report need to know of the training. Commands,
variables, limits, orders, code of others and every path of the other machine have no field.
Standard library and yaml only.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from tunesmith.core.files import write_json, write_text
from tunesmith.job.run.codec import Fault, decode, encode, optional
from tunesmith.job.run.folder import HOST_FOLDER, PHASES, RunFolder
from tunesmith.job.run.schema import (
    Adjustments,
    Count,
    DataFile,
    Figure,
    Limits,
    ModelRef,
    Price,
    PromptItem,
    RunRequest,
    Values,
)
from tunesmith.job.run.stored import DamagedError, read_mapping, read_record

# Keys of LLaMA-Factory's config (0.9.3) that are figures and names of the training itself. Not
# among them: paths, addresses, keys of services, other models, programs, and trust_remote_code.
_KEYS = """
adafactor adam_beta1 adam_beta2 adam_epsilon add_special_tokens add_tokens additional_target
apollo_layerwise apollo_proj apollo_proj_type apollo_rank apollo_scale apollo_scale_front
apollo_scale_type apollo_target apollo_update_interval audio_sampling_rate auto_find_batch_size
average_tokens_across_devices badam_mask_mode badam_mode badam_start_block badam_switch_interval
badam_switch_mode badam_update_ratio badam_verbose batch_eval_metrics bf16 bf16_full_eval
buffer_size compute_accuracy create_new_adapter crop_to_patches cutoff_len data_seed
data_shared_file_system dataloader_drop_last dataloader_num_workers dataloader_persistent_workers
dataloader_pin_memory dataloader_prefetch_factor dataset ddp_broadcast_buffers ddp_bucket_cap_mb
ddp_find_unused_parameters ddp_timeout default_system disable_gradient_checkpointing
disable_shuffling disable_tqdm do_eval do_predict do_sample do_train double_quantization
dpo_label_smoothing early_stopping_steps enable_liger_kernel enable_thinking
eval_accumulation_steps eval_dataset eval_delay eval_do_concat_batches eval_num_beams
eval_on_each_dataset eval_on_start eval_steps eval_strategy finetuning_type flash_attn fp16
fp16_full_eval freeze_extra_modules freeze_language_model freeze_multi_modal_projector
freeze_trainable_layers freeze_trainable_modules freeze_vision_tower full_determinism
galore_layerwise galore_proj_type galore_rank galore_scale galore_target galore_update_interval
generation_max_length generation_num_beams gradient_accumulation_steps gradient_checkpointing
greater_is_better group_by_length ignore_data_skip ignore_pad_token_for_loss image_do_pan_and_scan
image_max_pixels image_min_pixels include_effective_tokens_per_second include_inputs_for_metrics
include_num_input_tokens_seen include_tokens_per_second infer_dtype interleave_probs
kto_chosen_weight kto_rejected_weight label_smoothing_factor ld_alpha learning_rate length_penalty
load_best_model_at_end log_level logging_first_step logging_nan_inf_filter logging_steps
logging_strategy lora_alpha lora_dropout lora_rank lora_target loraplus_lr_embedding
loraplus_lr_ratio low_cpu_mem_usage lr_scheduler_type mask_history max_grad_norm max_length
max_new_tokens max_samples max_steps metric_for_best_model mix_strategy mixture_of_depths
moe_aux_loss_coef neat_packing neftune_noise_alpha num_beams num_train_epochs optim packing
per_device_eval_batch_size per_device_train_batch_size pissa_convert pissa_init pissa_iter
plot_loss ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards
predict_with_generate prediction_loss_only pref_beta pref_ftx pref_loss preprocessing_batch_size
preprocessing_num_workers print_param_status pure_bf16 quantization_bit quantization_method
quantization_type remove_unused_columns repetition_penalty resize_vocab rope_scaling
save_only_model save_safetensors save_steps save_strategy save_total_limit seed shift_attn
simpo_gamma skip_special_tokens sortish_sampler split_special_tokens stage streaming template
temperature tf32 tool_format top_k top_p torch_empty_cache_steps train_from_scratch
train_on_prompt upcast_layernorm upcast_lmhead_output use_adam_mini use_apollo use_audio_in_video
use_badam use_cache use_dora use_fast_tokenizer use_galore use_liger_kernel use_llama_pro use_muon
use_reentrant_gc use_rslora use_unsloth use_unsloth_gc val_size video_fps video_max_pixels
video_maxlen video_min_pixels warmup_ratio warmup_steps weight_decay
"""
CONFIG_KEYS = frozenset(_KEYS.split())
# Free text: the words that stand before every conversation.
_WORDS = ("default_system",)
_PATH = re.compile(r"[/~\\]|\.{1,2}[/\\]|[A-Za-z]:[/\\]|[a-z][a-z0-9+.-]*://")
_LONGEST = 100_000  # characters of a text
_MOST = 10_000  # items of a list

_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_RUN = re.compile(r"run:[A-Za-z0-9][A-Za-z0-9_.+@=,-]{0,127}")
# Keys that may name them (plan/models.py).
_MODEL_KEYS = (
    "model_name_or_path",
    "adapter_name_or_path",
    "ref_model",
    "ref_model_adapters",
    "reward_model",
    "reward_model_adapters",
)
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@/-]{0,199}")


@dataclass(frozen=True)
class _MergeOptions:
    """What of a merge holds here."""

    export_size: Count | None = optional()
    export_device: Literal["cpu", "auto"] | None = optional()
    export_legacy_format: bool | None = optional()
    infer_dtype: Literal["auto", "bfloat16", "float16", "float32"] | None = optional()


@dataclass(frozen=True)
class _DataFigures:
    """What of the check of a data set is told here."""

    formatting: Literal["alpaca", "sharegpt"] | None = optional()
    kept: Count | None = optional()
    warnings: Count | None = optional()
    prompt_characters: Mapping[str, Figure] | None = optional()
    response_characters: Mapping[str, Figure] | None = optional()


def adopt(folder: Path, run_id: str, final: Path) -> None:
    """Make the host's files in `folder`, those of a run that will lie in `final`, ours.

    Raises DamagedError for a run.json or config.yaml that cannot be read; then nothing is changed.
    """
    run = RunFolder(folder)
    remedy = "the host's copy of it has to be mended first"
    request = read_record(run.request_file, RunRequest, remedy)
    if request.run_id not in ("", run_id):
        why = f"it is run {ascii(request.run_id)[:90]}, in the folder of run {run_id}"
        raise DamagedError(run.request_file, why, remedy)
    config = None
    if run.config_file.exists():
        config = read_mapping(run.config_file, remedy)
    try:
        adjustments = run.adjustments()
    except DamagedError:
        adjustments = Adjustments()
    status = run.last_status()
    for file in (run.config_file, run.status_file, run.adjustments_file):
        _set_aside(file)
    if config is not None:
        ours = config_of(config) | {"output_dir": str(final / run.output.name)}
        ours["model_name_or_path"] = _model_of(request.model).name or ""
        body = yaml.safe_dump(ours, allow_unicode=True, sort_keys=True)
        write_text(run.config_file, body)
    if status:
        # Who works on it is a process of the host's.
        kept = replace(status, run_id=run_id, supervisor=None, gpu=None, paused=None, ahead=())
        write_json(run.status_file, encode(replace(kept, eta_seconds=None)))
    # Gradient checkpointing stays as the config here says.
    if kept_of := encode(replace(adjustments, disable_gradient_checkpointing=None)):
        write_json(run.adjustments_file, kept_of)
    # Last: its place says that the whole was done.
    _set_aside(run.request_file)
    write_json(run.request_file, encode(request_of(request, run_id)))


def ensure(run: RunFolder) -> None:
    """Adopt a copy that an earlier version left as its host wrote it. Raises as `adopt` does."""
    if run.is_copy and not foreign_file(run, "run.json").is_file():
        adopt(run.path, run.run_id, run.path)


def foreign_file(run: RunFolder, name: str) -> Path:
    """Return where what the host wrote under a name lies in a copy."""
    return run.path / HOST_FOLDER / name


def foreign_config(run: RunFolder) -> Values:
    """Return the config as the host has it, to be looked at; empty where it has none."""
    try:
        return read_mapping(foreign_file(run, run.config_file.name), "")
    except FileNotFoundError:
        return {}


def request_of(foreign: RunRequest, run_id: str) -> RunRequest:
    """Return the run.json of this machine for one of another.

    The base model has no path, and the run no variables, until somebody here gives it both.
    """
    return RunRequest(
        run_id=run_id,
        created=_text(foreign.created, 40),
        config_file=_text(foreign.config_file, 300),
        stem=_text(foreign.stem, 100),
        title=_text(foreign.title, 300),
        model=_model_of(foreign.model),
        overrides=config_of(foreign.overrides),
        data=tuple(map(_data_of, foreign.data[:_MOST])),
        owned=tuple(
            replace(item, why=_text(item.why, 300))
            for item in foreign.owned[:_MOST]
            if item.key in CONFIG_KEYS and _plain(item.value) and _plain(item.was)
        ),
        # The base model comes otherwise here, and before the run.
        phases=tuple(
            p for p in PHASES if p in (foreign.phases or ()) and p not in ("check", "fetch")
        ),
        prompts=tuple(map(_cut, foreign.prompts[:_MOST])),
        guard=tuple(map(_cut, foreign.guard[:_MOST])),
        evaluate=foreign.evaluate,
        merge=None if foreign.merge is None else _fitting(_MergeOptions, foreign.merge),
        limits=Limits(),
        env={},
        preset=foreign.preset if foreign.preset in ("fast", "none") else None,
        price=_price_of(foreign.price),
        origins=tuple(o for o in foreign.origins if o.key in _MODEL_KEYS and _named(o.written)),
    )


def config_of(foreign: Values) -> dict[str, Any]:
    """Return the keys of a config that hold on every machine, where their values are plain."""
    return {
        key: value
        for key, value in foreign.items()
        if key in CONFIG_KEYS and (_plain(value) or (key in _WORDS and isinstance(value, str)))
    }


def _named(written: str) -> bool:
    """Whether a config named a run's result or a model of a hub, no path of the other machine."""
    return _RUN.fullmatch(written) is not None or _MODEL_NAME.fullmatch(written) is not None


def _plain(value: Any) -> bool:
    """Whether it is a figure, a word, or a list of them, and no path or address."""
    if isinstance(value, list):
        return len(value) <= _MOST and all(
            not isinstance(item, list) and _plain(item) for item in value
        )
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, str):
        return len(value) <= _LONGEST and _PATH.match(value) is None
    return value is None or isinstance(value, (bool, int))


def _model_of(foreign: ModelRef | None) -> ModelRef:
    if foreign is None:
        return ModelRef()
    name = foreign.name or ""
    known = _MODEL_NAME.fullmatch(name) is not None and ".." not in name
    return ModelRef(
        name=name if known else None,
        source=_text(foreign.source, 100),
        revision=_text(foreign.revision, 100),
        files={n: r for n, r in foreign.files.items() if _FILE_NAME.fullmatch(n) is not None},
    )


def _data_of(item: DataFile) -> DataFile:
    """Return what is told of a data set; its file is a name only, none of this machine."""
    return DataFile(
        file=_text(item.file.rpartition("/")[2], 200),
        key=_text(item.key, 100),
        rows=item.rows,
        sha256=item.sha256,
        figures=_fitting(_DataFigures, item.figures),
    )


def _price_of(price: float | Price | None) -> float | Price | None:
    if isinstance(price, Price):
        return replace(price, currency=price.currency and _text(price.currency, 20))
    return price


def _fitting(kind: type, values: Values) -> Values:
    """Return the values that fit the fields of a dataclass, each by itself."""
    found: dict[str, Any] = {}
    for item in fields(kind):
        with contextlib.suppress(Fault):
            found |= encode(decode(kind, {k: v for k, v in values.items() if k == item.name}))
    return found


def _cut(item: PromptItem) -> PromptItem:
    return PromptItem(
        item.prompt[:_LONGEST],
        *(text and text[:_LONGEST] for text in (item.expect, item.reference, item.system)),
    )


def _text(text: str | None, longest: int) -> str:
    """Return a text in printable characters, cut; empty for none."""
    return "".join(letter if letter.isprintable() else " " for letter in (text or "")[:longest])


def _set_aside(file: Path) -> None:
    aside = file.parent / HOST_FOLDER / file.name
    if file.exists():
        aside.parent.mkdir(exist_ok=True)
        file.replace(aside)
