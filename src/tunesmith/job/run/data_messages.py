"""What LLaMA-Factory 0.9.3 says to data, and to a base model, that cannot be used.

As in config_messages: by file, `{}` for what differs each time.
"""

from __future__ import annotations

from collections.abc import Mapping

DATA: Mapping[str, tuple[str, ...]] = {
    "data/converter.py": ("Dataset converter {} not found.",),
    "data/data_utils.py": (
        "Path does not exist: {}.",
        "No JSON/JSONL files found in the specified path: {}.",
        "Unsupported protocol in path: {}. Use 's3://' or 'gs://'.",
    ),
    "data/formatter.py": (
        "Invalid JSON format in function message: {}.",
        "Invalid JSON format in tool description: {}.",
        "Expected a string, got {}",
    ),
    "data/loader.py": (
        "Sample num mismatched.",
        "The dataset is not applicable in the current training stage.",
        "Unknown load type: {}.",
        "Cannot find sufficient samples, consider increasing dataset size.",
        "Cannot find valid samples, check `data/README.md` for the data format.",
        "Allowed file types: {}.",
        "File types should be identical.",
        "File {} not found.",
    ),
    "data/mm_plugin.py": (
        "The number of images does not match the number of {} tokens in {}.",
        "The number of videos does not match the number of {} tokens in {}.",
        "The number of audios does not match the number of {} tokens in {}.",
        "MiniCPM-V model does not support input images and videos at the same time.",
        "Expect input is a list of images, but got {}.",
        "Expect input is a list of audios, but got {}.",
        "Invalid image found in video frames.",
        "Number of videos ({}) must match number of audios ({}) when using audio in video.",
        "Each {} must be followed by an {} when using audio in video.",
        # Rows with media, and a template without.
        "This model does not support image input. Please check whether the correct `template` is "
        "used.",
        "This model does not support video input. Please check whether the correct `template` is "
        "used.",
        "This model does not support audio input. Please check whether the correct `template` is "
        "used.",
    ),
    "data/parser.py": (
        "Undefined dataset {} in {}.",
        "Cannot open {} due to {}.",
    ),
    "data/template.py": ("Unexpected role: {}",),
    "data/tool_utils.py": ("GLM-4 does not support parallel functions.",),
}
MODEL: Mapping[str, tuple[str, ...]] = {
    "data/mm_plugin.py": (
        "Processor was not found, please check and update your model file.",
        "Image processor was not found, please check and update your model file.",
        "Video processor was not found, please check and update your model file.",
        "Audio feature extractor was not found, please check and update your model file.",
    ),
    "model/loader.py": ("Failed to load tokenizer.", "Failed to load processor."),
    "model/patcher.py": (
        "Please download the internvl models in a Hugging Face–compatible format (for example, "
        "https://huggingface.co/OpenGVLab/InternVL3-8B-hf).",
        "Please download llava models with hf-compatible format: https://huggingface.co/llava-hf",
        "InternLM3 model requires transformers>=4.47.1, please upgrade it.",
    ),
    "train/tuner.py": ("The model is not a `PreTrainedModel`, export aborted.",),
}
