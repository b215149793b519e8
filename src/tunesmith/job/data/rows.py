"""LLaMA-Factory's own loader, converter, template, tokenizer and processor for one config.

Code of its data/ (0.9.3): rows are what a training would see, and nothing is imitated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.core.documents import AlignedRow, Config
from tunesmith.core.errors import UsageError
from tunesmith.job.inference import engine

IGNORED = -100  # LLaMA-Factory's IGNORE_INDEX: a token without loss
# Keys beside the DataArguments that decide what becomes of the rows.
_TRAINING_KEYS = (
    "seed",
    "stage",
    "finetuning_type",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "dataloader_drop_last",
)


Table = Any  # datasets.Dataset, whose rows are AlignedRow


@dataclass(frozen=True)
class DataPipeline:
    """LLaMA-Factory's arguments, tokenizer and processor for one config."""

    data_args: Any
    model_args: Any
    training_args: Any
    codec: engine.Codec
    processor: Any
    stage: str

    @classmethod
    def of(cls, config: Config, scratch: str) -> DataPipeline:
        """Load tokenizer and template (seconds), no weights; caches go to `scratch`."""
        from llamafactory.data.loader import _get_dataset_processor
        from llamafactory.hparams import DataArguments
        from llamafactory.hparams.parser import _parse_train_args

        stage = str(config.get("stage", "sft"))
        if stage not in ("sft", "pt"):
            raise UsageError(f"stage {stage}: only sft and pt configs can be replayed")
        names = {item.name for item in dataclasses.fields(DataArguments) if item.init}
        keys = {key: value for key, value in config.items() if key in names}
        for key in ("tokenized_path", "preprocessing_num_workers", "streaming"):
            keys.pop(key, None)  # they change how rows are read, not which
        keys |= {key: config[key] for key in _TRAINING_KEYS if key in config}
        keys |= {"output_dir": f"{scratch}/output", "report_to": "none", "overwrite_cache": True}
        base = engine.base_arguments(config)
        model_args, data_args, training_args, _, _ = _parse_train_args({**base, **keys})
        if data_args.packing is None:
            data_args.packing = stage == "pt"  # as get_train_args derives it
        codec = engine.codec(base)
        model_args.cache_dir = f"{scratch}/cache"
        processor = _get_dataset_processor(
            data_args, stage, codec.template, codec.tokenizer, codec.processor
        )
        return cls(data_args, model_args, training_args, codec, processor, stage)

    def rows(self, names: Sequence[str]) -> dict[str, Table]:
        """Return the rows of each data set as LLaMA-Factory's converter leaves them."""
        from llamafactory.data.loader import _get_merged_dataset

        context = (self.model_args, self.data_args, self.training_args)
        tables: dict[str, Table] = {}
        for name in names:
            tables |= _get_merged_dataset([name], *context, self.stage, return_dict=True)
        return tables

    def encode(self, row: AlignedRow) -> tuple[list[int], list[int], list[tuple[Any, Any]]]:
        """Return (ids, labels, (question ids, answer ids) of each turn before any cut)."""
        recorder = _Recorder(self.codec.template)
        processor = dataclasses.replace(self.processor, template=recorder)
        ids, labels = processor._encode_data_example(
            prompt=row["_prompt"],
            response=row["_response"],
            system=row["_system"],
            tools=row["_tools"],
            images=row["_images"] or [],
            videos=row["_videos"] or [],
            audios=row["_audios"] or [],
        )
        return ids, labels, recorder.pairs


class _Recorder:
    """The template, which keeps the turns it has encoded: their lengths before the cut."""

    def __init__(self, template: Any) -> None:
        self._template = template
        self.pairs: list[tuple[Any, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._template, name)

    def encode_multiturn(self, *arguments: Any) -> Any:
        self.pairs = self._template.encode_multiturn(*arguments)
        return self.pairs
