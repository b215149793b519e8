"""What LLaMA-Factory 0.9.3 says to a config that cannot work, and the keys that it speaks of.

By file of the package; `{}` stands for what differs each time. The rest of what it raises is about
data and models (data_messages) or a fault of code (tests/training/test_messages.py, which finds
every text in the installed package).
"""

from __future__ import annotations

from collections.abc import Mapping

# Their sentence: the keys of the config, with spaces between them.
Sentences = Mapping[str, str]

CONFIG: Mapping[str, Sentences] = {
    "hparams/data_args.py": {
        "Cannot specify `val_size` if `dataset` is None.": "val_size",
        "Cannot specify `val_size` if `eval_dataset` is not None.": "val_size",
        "Streaming mode should have an integer val size.": "val_size",
        "`max_samples` is incompatible with `streaming`.": "max_samples",
        "`mask_history` is incompatible with `train_on_prompt`.": "mask_history",
        "`interleave_probs` is only valid for interleaved mixing.": "interleave_probs",
        "The length of dataset and interleave probs should be identical.": "interleave_probs",
        "The length of eval dataset and interleave probs should be identical.": "interleave_probs",
    },
    "hparams/evaluation_args.py": {
        "`save_dir` already exists, use another one.": "save_dir",
    },
    "hparams/finetuning_args.py": {
        "Invalid fine-tuning method.": "finetuning_type",
        "We only accept 4-bit or 8-bit quantization.": (
            "ref_model_quantization_bit reward_model_quantization_bit"
        ),
        "`reward_model` is necessary for PPO training.": "reward_model",
        "`reward_model_type` cannot be lora for Freeze/Full PPO training.": "reward_model_type",
        "`dpo_label_smoothing` is only valid for sigmoid loss function.": "dpo_label_smoothing",
        "`use_llama_pro` is only valid for Freeze or LoRA training.": "use_llama_pro",
        "Cannot use LoRA with GaLore, APOLLO or BAdam together.": "finetuning_type",
        "Cannot use GaLore, APOLLO or BAdam together.": "use_galore use_apollo use_badam",
        "Cannot use PiSSA for current training stage.": "pissa_init",
        "`loraplus_lr_ratio` is only valid for LoRA training.": "loraplus_lr_ratio",
        "`use_rslora` is only valid for LoRA training.": "use_rslora",
        "`use_dora` is only valid for LoRA training.": "use_dora",
        "`pissa_init` is only valid for LoRA training.": "pissa_init",
    },
    "hparams/model_args.py": {
        "Please provide `model_name_or_path`.": "model_name_or_path",
        "`split_special_tokens` is only supported for slow tokenizers.": "split_special_tokens",
        "`image_max_pixels` cannot be smaller than `image_min_pixels`.": "image_max_pixels",
        "`video_max_pixels` cannot be smaller than `video_min_pixels`.": "video_max_pixels",
        "Quantization dataset is necessary for exporting.": "export_quantization_dataset",
    },
    "hparams/training_args.py": {
        "ray_storage_filesystem must be one of ['s3', 'gs', 'gcs'], got {}": (
            "ray_storage_filesystem"
        ),
    },
    "hparams/parser.py": {
        "Some specified arguments are not used by the HfArgumentParser: {}": "",
        "Adapter is only valid for the LoRA method.": "adapter_name_or_path",
        "Please enable `predict_with_generate` to save model predictions.": "do_predict",
        "RM and PPO stages do not support `load_best_model_at_end`.": "load_best_model_at_end",
        "Please launch distributed training with `llamafactory-cli` or `torchrun`.": "",
        "Please use `FORCE_TORCHRUN=1` to launch DeepSpeed training.": "deepspeed",
        "Please specify `max_steps` in streaming mode.": "max_steps",
        "Please specify dataset for training.": "dataset",
        "Please specify dataset for evaluation.": "eval_strategy val_size eval_dataset",
        "Cannot use device map for quantized models in training.": "quantization_device_map",
        "Please use scripts/pissa_init.py to initialize PiSSA in DeepSpeed ZeRO-3.": "pissa_init",
        "GaLore and APOLLO are incompatible with DeepSpeed yet.": "deepspeed",
        "vLLM/SGLang backend is only available for API, CLI and Web.": "infer_backend",
        "Unsloth is incompatible with DeepSpeed ZeRO-3.": "use_unsloth",
        "Quantization is only compatible with the LoRA method.": "quantization_bit",
        "Please use scripts/pissa_init.py to initialize PiSSA for a quantized model.": "pissa_init",
        "Cannot resize embedding layers of a quantized model.": "resize_vocab",
        "Cannot create new adapter upon a quantized model.": "create_new_adapter",
        "Quantized model only accepts a single adapter. Merge them first.": "adapter_name_or_path",
        "`predict_with_generate` cannot be set as True except SFT.": "predict_with_generate",
        "`neat_packing` cannot be set as True except SFT.": "neat_packing",
        "`train_on_prompt` or `mask_history` cannot be set as True except SFT.": (
            "train_on_prompt mask_history"
        ),
        "PPO training does not support evaluation, use the SFT stage to evaluate models.": "stage",
        "PPO training is incompatible with S^2-Attn.": "shift_attn",
        "Unsloth does not support lora reward model.": "use_unsloth",
        "PPO only accepts wandb or tensorboard logger.": "report_to",
        "`predict_with_generate` is incompatible with DeepSpeed ZeRO-3.": "predict_with_generate",
        "Cannot use `predict_with_generate` if `eval_dataset` is None.": "predict_with_generate",
        "Cannot use `predict_with_generate` and `compute_accuracy` together.": "compute_accuracy",
        "This device does not support `pure_bf16`.": "pure_bf16",
        "`pure_bf16` is incompatible with DeepSpeed ZeRO-3.": "pure_bf16",
        "Distributed training does not support layer-wise GaLore.": "galore_layerwise",
        "Distributed training does not support layer-wise APOLLO.": "apollo_layerwise",
        (
            "Output directory already exists and is not empty. Please set `overwrite_output_dir`."
        ): "output_dir",
        "vLLM engine only supports auto-regressive models.": "infer_backend",
        "vLLM engine does not support bnb quantization (GPTQ and AWQ are supported).": (
            "quantization_bit"
        ),
        "vLLM engine does not support RoPE scaling.": "rope_scaling",
        "vLLM only accepts a single adapter. Merge them first.": "adapter_name_or_path",
        (
            "Radio-based BAdam does not yet support distributed training, use layer-wise BAdam."
        ): "badam_mode",
        "Layer-wise BAdam only supports DeepSpeed ZeRO-3 training.": "use_badam",
    },
    "chat/chat_model.py": {"Unknown backend: {}": "infer_backend"},
    "chat/hf_engine.py": {
        "The current model does not support `chat`.": "stage",
        "The current model does not support `stream_chat`.": "stage",
        "Cannot get scores using an auto-regressive model.": "stage",
    },
    "data/data_utils.py": {"Unknown mixing strategy: {}.": "mix_strategy"},
    "data/loader.py": {
        "Turn off `streaming` when saving dataset to disk.": "streaming tokenized_path",
    },
    "data/template.py": {
        "Current template does not support `train_on_prompt`.": "train_on_prompt",
        "Template {} does not exist.": "template",
    },
    "data/tool_utils.py": {"Tool utils `{}` not found.": "tool_format"},
    "eval/template.py": {"Template {} does not exist.": "lang"},
    "model/adapter.py": {
        "Current model does not support freeze tuning.": "finetuning_type",
        "`num_layers` {} should be divisible by `num_layer_trainable` {}.": (
            "freeze_trainable_layers"
        ),
        "Module {} is not found, please choose from {}": (
            "freeze_trainable_modules freeze_extra_modules"
        ),
        "Quantized model only accepts a single adapter.": "adapter_name_or_path",
        "Cannot use multiple adapters in DeepSpeed ZeRO-3.": "adapter_name_or_path",
        "Unsloth model only accepts a single adapter.": "adapter_name_or_path",
        "DoRA is not compatible with PTQ-quantized models.": "use_dora",
        "Quantized models can only be used for the LoRA tuning.": "finetuning_type",
        "Cannot initialize PiSSA adapter on quantized models.": "pissa_init",
        "Unknown finetuning type: {}.": "finetuning_type",
    },
    "model/model_utils/attention.py": {"Unknown attention type: {}": "flash_attn"},
    "model/model_utils/checkpointing.py": {
        "{} does not support gradient checkpointing.": "disable_gradient_checkpointing",
    },
    "model/model_utils/embedding.py": {
        "Cannot resize embedding layers of a quantized model.": "resize_vocab",
        "Current model does not support resizing embedding layers.": "resize_vocab",
    },
    "model/model_utils/longlora.py": {
        "q_len {} should be divisible by group size {}.": "shift_attn",
    },
    "model/model_utils/misc.py": {
        "Model was not supported.": "use_llama_pro",
        "`num_layers` {} should be divisible by `num_layer_trainable` {}.": (
            "freeze_trainable_layers"
        ),
    },
    "model/model_utils/mod.py": {
        "Current model is not supported by mixture-of-depth.": "mixture_of_depths",
    },
    "model/model_utils/quantization.py": {
        "DeepSpeed ZeRO-3 or FSDP is incompatible with PTQ-quantized models.": "deepspeed fsdp",
        "Cannot find satisfying example, considering decrease `export_quantization_maxlen`.": (
            "export_quantization_maxlen"
        ),
        "AutoGPTQ only accepts 2/3/4/8-bit quantization.": "export_quantization_bit",
        "ChatGLM model is not supported yet.": "export_quantization_bit",
        "Bitsandbytes only accepts 4-bit or 8-bit quantization.": "quantization_bit",
        "Only 4-bit quantized model can use fsdp+qlora or auto device map.": "quantization_bit",
        "HQQ only accepts 1/2/3/4/5/6/8-bit quantization.": "quantization_bit",
        "HQQ quantization is incompatible with DeepSpeed ZeRO-3 or FSDP.": "quantization_method",
        "EETQ only accepts 8-bit quantization.": "quantization_bit",
        "EETQ quantization is incompatible with DeepSpeed ZeRO-3 or FSDP.": "quantization_method",
    },
    "model/model_utils/unsloth.py": {
        "Unsloth does not support model type {}.": "use_unsloth",
    },
    "train/dpo/trainer.py": {"Unknown loss type: {}.": "pref_loss"},
    "train/ppo/trainer.py": {
        "PPOTrainer does not support eval dataset yet.": "eval_dataset",
        "`resume_from_checkpoint` will be supported in the future version.": (
            "resume_from_checkpoint"
        ),
    },
    "train/trainer_utils.py": {
        "Please provide full url.": "reward_model",
        "Reward model is not correctly loaded.": "reward_model",
        "Unknown optim: {}.": "optim",
        "Ray was not enabled. Please set `USE_RAY=1` to enable ray.": "ray_run_name",
        "Per-layer GaLore does not support gradient accumulation.": "galore_layerwise",
        "Per-layer APOLLO does not support gradient accumulation.": "apollo_layerwise",
    },
    "train/tuner.py": {
        "Please specify `export_dir` to save model.": "export_dir",
        "Please merge adapters before quantizing the model.": "export_quantization_bit",
        "Cannot merge adapters to a quantized model.": "quantization_bit",
        "Unknown task: {}.": "stage",
    },
}
# What ends those that our rules cannot say before: they are of the machine, the model or files.
REMEDIES: Mapping[str, str] = {
    "This device does not support `pure_bf16`.": "write `pure_bf16: false` and write `bf16: true`",
    "Please use `FORCE_TORCHRUN=1` to launch DeepSpeed training.": "remove `deepspeed`",
    "Distributed training does not support layer-wise GaLore.": "write `galore_layerwise: false`",
    "Distributed training does not support layer-wise APOLLO.": "write `apollo_layerwise: false`",
    "Layer-wise BAdam only supports DeepSpeed ZeRO-3 training.": "remove `use_badam`",
    "Per-layer GaLore does not support gradient accumulation.": "write `galore_layerwise: false`",
    "Per-layer APOLLO does not support gradient accumulation.": "write `apollo_layerwise: false`",
    "PPO training does not support evaluation, use the SFT stage to evaluate models.": (
        "write `do_train: true`"
    ),
    "`resume_from_checkpoint` will be supported in the future version.": (
        "begin a new run: a PPO training cannot be continued"
    ),
    "`save_dir` already exists, use another one.": "remove `save_dir`",
}
