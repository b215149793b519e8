"""The held-out rows: LLaMA-Factory's own validation split, with the texts of the ids.

LLaMA-Factory's get_dataset creates the rows from the train config (data/loader.py and
data/data_utils.py of 0.9.3), so they are exactly those that were not trained on.
"""

from __future__ import annotations

import dataclasses
import itertools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.core.documents import AlignedRow, Config, TokenizedRow
from tunesmith.job.inference import engine
from tunesmith.job.inference.engine import Codec, Question
from tunesmith.job.run.failures import JobError

# A stream has no length: this many of its validation rows are used.
_STREAMED_ROWS = 1000
_STAGES = ("sft", "pt")
# Keys besides the DataArguments that determine the held-out rows.
_SPLIT_KEYS = ("seed", "stage", "finetuning_type", "dataloader_num_workers")


@dataclass(frozen=True)
class Item:
    """One prompt to answer, and the reference for its answer."""

    question: Question
    shown: str  # the prompt as shown to people
    origin: str  # "held_out" or "prompts"
    reference: str | None = None
    expect: str | None = None


@dataclass(frozen=True)
class HeldOut:
    """The validation rows: ids for the loss, texts for the answers, or the reasons for none."""

    rows: list[TokenizedRow]
    items: list[Item]
    neat_packing: bool
    no_loss: str | None
    no_answers: str | None


def load_held_out(config: Config, codec: Codec, answers: int) -> HeldOut:
    """Return LLaMA-Factory's validation rows of `config`, the first `answers` of them with text.

    If a loss or text is not available, the result contains the reason.
    """
    stage = config.get("stage", "sft")
    packed = bool(config.get("packing") or config.get("neat_packing"))
    nothing = None
    if stage not in _STAGES:
        nothing = f"stage {stage} has no loss per token; prompts only"
    elif not config.get("eval_dataset") and float(config.get("val_size") or 0) <= 1e-6:
        nothing = "no held-out rows (val_size and eval_dataset are not set)"
    if nothing:
        return HeldOut([], [], False, nothing, nothing)
    split = _Split.load(config, codec)
    rows = split.rows()
    no_loss = None if rows else "the validation split is empty"
    reason: str | None
    if stage != "sft":
        reason = f"stage {stage} has no prompts and answers"
    elif packed:
        reason = "packing joins rows, so single answers cannot be compared"
    elif config.get("streaming"):
        reason = "streaming: the validation rows have no fixed positions in the data"
    elif config.get("tokenized_path"):
        reason = "tokenized_path: the text of the rows is not stored"
    else:
        reason = no_loss
    items: list[Item] = []
    if reason is None and answers > 0:
        items, reason = split.items(codec, rows, answers)
    return HeldOut(rows, items, split.data_args.neat_packing, no_loss, reason)


@dataclass(frozen=True)
class _Split:
    """LLaMA-Factory's parsed arguments and its train/validation split."""

    model_args: Any
    data_args: Any
    training_args: Any
    stage: str
    module: Any  # {"train_dataset": ..., "eval_dataset": ...}
    processor: Any

    @classmethod
    def load(cls, config: Config, codec: Codec) -> _Split:
        import transformers
        from llamafactory.data.loader import _get_dataset_processor, get_dataset

        model_args, data_args, training_args = _arguments(config)
        stage = str(config.get("stage", "sft"))
        model_args.model_max_length = data_args.cutoff_len
        if data_args.packing is None:
            data_args.packing = stage == "pt"
        transformers.set_seed(training_args.seed)  # num_samples draws from the global generator
        tools = {"tokenizer": codec.tokenizer, "processor": codec.processor}
        module = get_dataset(
            codec.template, model_args, data_args, training_args, stage=stage, **tools
        )
        processor = _get_dataset_processor(data_args, stage, codec.template, **tools)
        return cls(model_args, data_args, training_args, stage, module, processor)

    def rows(self) -> list[TokenizedRow]:
        """Return the tokenized validation rows."""
        dataset = self.module.get("eval_dataset")
        parts = (
            list(dataset.values()) if isinstance(dataset, dict) else [dataset] if dataset else []
        )
        limit = _STREAMED_ROWS if self.data_args.streaming else None
        return list(itertools.islice(itertools.chain.from_iterable(parts), limit))

    def items(
        self, codec: Codec, rows: Sequence[TokenizedRow], count: int
    ) -> tuple[list[Item], str | None]:
        """Return the first `count` validation rows as text, or why that was not possible.

        0.9.3 splits after tokenizing, so the aligned rows are filtered like in its processor and
        their positions split by its own split_dataset; then every used row is encoded again and
        must give the ids of the tokenized row.
        """
        aligned = self._aligned_validation(len(rows))
        if aligned is None:
            return [], "LLaMA-Factory's split could not be reproduced on the texts (counts differ)"
        items = []
        for raw, row in itertools.islice(zip(aligned, rows, strict=True), count):
            ids, _ = self.processor._encode_data_example(
                prompt=raw["_prompt"],
                response=raw["_response"],
                system=raw["_system"],
                tools=raw["_tools"],
                images=raw["_images"] or [],
                videos=raw["_videos"] or [],
                audios=raw["_audios"] or [],
            )
            if list(ids) != list(row["input_ids"]):
                return [], "a text and its tokenized validation row differ; no pair is shown"
            if raw["_images"] or raw["_videos"] or raw["_audios"]:
                return [], "the rows contain images, video or audio; only text is answered"
            items.append(_held_out_item(codec, raw))
        return items, None

    def _aligned_validation(self, expected: int) -> list[AlignedRow] | None:
        import transformers
        from datasets import Dataset
        from llamafactory.data.data_utils import split_dataset
        from llamafactory.data.loader import _get_merged_dataset

        context = (self.model_args, self.data_args, self.training_args)
        transformers.set_seed(self.training_args.seed)
        train = _get_merged_dataset(self.data_args.dataset, *context, "sft")
        dataset = _get_merged_dataset(
            self.data_args.eval_dataset,
            *context,
            "sft",
            return_dict=self.data_args.eval_on_each_dataset,
        )
        if dataset is not None:
            parts = dataset.values() if isinstance(dataset, dict) else [dataset]
            usable = [row for part in parts for row in part if _usable(row)]
            return usable if len(usable) == expected else None
        usable = [row for row in train if _usable(row)]
        if len(usable) != len(self.module["train_dataset"]) + expected:
            return None
        positions = Dataset.from_dict({"position": list(range(len(usable)))})
        split = split_dataset(positions, None, self.data_args, seed=self.training_args.seed)
        return [usable[position] for position in split["validation"]["position"]]


def _arguments(config: Config) -> tuple[Any, Any, Any]:
    """Return LLaMA-Factory's (model, data, training) arguments for the data of a train config."""
    from llamafactory.hparams import DataArguments
    from llamafactory.hparams.parser import _parse_train_args

    names = {field.name for field in dataclasses.fields(DataArguments) if field.init}
    data_keys = {key: value for key, value in config.items() if key in names}
    if not data_keys.get("packing") and not data_keys.get("neat_packing"):
        # Order and number of unpacked rows do not depend on it, and forking for a few
        # hundred rows costs seconds.
        data_keys.pop("preprocessing_num_workers", None)
    if not Path(str(data_keys.get("tokenized_path"))).is_dir():
        data_keys.pop("tokenized_path", None)  # LLaMA-Factory would write it
    split_keys = {key: config[key] for key in _SPLIT_KEYS if key in config}
    # Not get_train_args: it also requires torchrun on several GPUs and checks the output folder.
    # The callers repeat what it derives for the data.
    model_args, data_args, training_args, _, _ = _parse_train_args(
        {
            **engine.base_arguments(config),
            **data_keys,
            **split_keys,
            "output_dir": config["output_dir"],
            "report_to": "none",
        }
    )
    return model_args, data_args, training_args


def first_rows(config: Config, codec: Codec, count: int) -> tuple[list[AlignedRow], str | None]:
    """Return the first `count` training rows of each data set, converted by LLaMA-Factory.

    If that is not possible, return no rows and the reason. Rows with tools, images, video or audio
    are omitted because they are not plain text.
    """
    stage = str(config.get("stage", "sft"))
    if stage != "sft":
        return [], f"stage {stage} has no prompts with one answer each"
    if config.get("streaming") or str(config.get("dataset_dir")).startswith(("ONLINE", "REMOTE:")):
        return [], "the data are loaded during training"
    from datasets.exceptions import DatasetsError
    from llamafactory.data.loader import _get_merged_dataset

    model_args, data_args, training_args = _arguments(config)
    data_args.max_samples = count
    data_args.mix_strategy = "concat"
    try:
        merged = _get_merged_dataset(data_args.dataset, model_args, data_args, training_args, "sft")
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        return [], f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    rows = [row for row in merged or () if _usable(row) and not _has_media(row)]
    return rows, None if rows else "no row is a conversation in text"


def _has_media(row: AlignedRow) -> bool:
    return bool(row["_tools"] or row["_images"] or row["_videos"] or row["_audios"])


def _usable(row: AlignedRow) -> bool:
    """Whether SupervisedDatasetProcessor.preprocess_dataset keeps the row."""
    return len(row["_prompt"]) % 2 == 1 and len(row["_response"]) == 1


def _held_out_item(codec: Codec, raw: AlignedRow) -> Item:
    messages = raw["_prompt"]
    reference = str(raw["_response"][0]["content"])
    # Only reasoning templates have a mode; with thinking off, training strips it from labels.
    if codec.template.enable_thinking is False and type(codec.template).__name__.startswith(
        "Reasoning"
    ):
        reference = codec.template.remove_thought(reference)
    turns = [f"{message['role']}: {message['content']}" for message in messages]
    return Item(
        question=Question(tuple(messages), raw["_system"] or None, raw["_tools"] or None),
        shown=messages[0]["content"] if len(messages) == 1 else "\n".join(turns),
        origin="held_out",
        reference=reference,
    )


def texts_of(item: Item) -> list[str]:
    parts = [str(message["content"]) for message in item.question.messages]
    return [*parts, *([item.reference] if item.reference else [])]


def check_round_trip(tokenizer: Any, texts: Sequence[str]) -> None:
    """Raise JobError (class data) for a text that decode(encode(text)) does not contain.

    A tokenizer that does not fit its files drops line breaks or entire scripts, and training
    continues without an error; the first loss is then several times too high.
    """
    for text in texts:
        back = _and_back(tokenizer, text)
        if _normal(text) not in _normal(back):
            raise JobError(
                "data",
                f"the tokenizer does not restore the text {text[:40]!r} but {back[:40]!r}: its "
                "files do not fit this model or this version of transformers: fetch them again",
            )


def can_say(tokenizer: Any, item: Item) -> bool:
    """Return whether the tokenizer preserves an item's text: an English one may lose Chinese."""
    return all(_normal(text) in _normal(_and_back(tokenizer, text)) for text in texts_of(item))


def _and_back(tokenizer: Any, text: str) -> str:
    ids = tokenizer.encode(text, add_special_tokens=False)
    back: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return back


def _normal(text: str) -> str:
    # Tokenizers may compose characters (NFC, NFKC); none may lose any.
    return unicodedata.normalize("NFKC", text).strip()
