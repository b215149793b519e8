"""llamafactory: rows in batches, our trainer, exports without weights, no hub code."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tunesmith.core.documents import Columns
from tunesmith.core.patching import Patch, PrivateName

_VERSIONS = "llamafactory==0.9.3"


class EachRow:
    """Applies a function of one row to a batch; pickled by its state, for a fingerprint."""

    def __init__(self, function: Callable[[Columns], Columns]) -> None:
        self._function = function

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Return the columns of the converted rows of a batch."""
        columns = {name: batch[name] for name in batch}
        rows = zip(*columns.values(), strict=True)
        converted = [self._function(dict(zip(columns, row, strict=True))) for row in rows]
        return {name: [row[name] for row in converted] for name in converted[0]}


class _InBatches:
    """A data set as used by `align_dataset`: inspected, and mapped row by row."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        return iter(self._dataset)

    def map(self, function: Any, *, batched: bool, **options: Any) -> Any:
        if not batched:
            function = EachRow(function)
        return self._dataset.map(function, batched=True, **options)


def _in_batches(usual: Any) -> Any:
    from datasets import Dataset

    def align_dataset(dataset: Any, *arguments: Any) -> Any:
        # A stream has its own map.
        return usual(_InBatches(dataset) if type(dataset) is Dataset else dataset, *arguments)

    return align_dataset


CONVERT_IN_BATCHES = Patch(
    target="llamafactory.data.loader:align_dataset",
    caller="llamafactory.data.loader:_load_single_dataset",
    versions=_VERSIONS,
    why="the datasets library reads and writes the rows one by one, which takes five times as "
    "long as converting a thousand rows together",
    removal="align_dataset maps with batched=True",
    make=_in_batches,
)


def _given(_original: Any, replacement: Any) -> Any:
    return replacement


OUR_TRAINER = Patch(
    target="llamafactory.train.sft.workflow:CustomSeq2SeqTrainer",
    caller="llamafactory.train.sft.workflow:run_sft",
    versions=_VERSIONS,
    why="the fast preset computes the same steps with less waiting",
    removal="run_sft accepts a trainer class",
    make=_given,
)
LOAD_NO_WEIGHTS = Patch(
    target="llamafactory.train.tuner:load_model",
    caller="llamafactory.train.tuner:export_model",
    versions=_VERSIONS,
    why="an export whose weights are written separately, in blocks, needs only the model's shapes",
    removal="never: the streaming merge gets the files of an export from it",
    make=_given,
)


def without_hub_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function that returns LLaMA-Factory's arguments, or takes them last."""

    @functools.wraps(function)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        for argument in (*arguments, *named.values()):
            if isinstance(argument, dict) and "trust_remote_code" in argument:
                argument["trust_remote_code"] = False
        result = function(*arguments, **named)
        if isinstance(result, dict) and "trust_remote_code" in result:
            result["trust_remote_code"] = False
        return result

    return wrapped


def _refuse(target: str, caller: str) -> Patch:
    return Patch(
        target=target,
        caller=caller,
        versions=_VERSIONS,
        why="the Board turns trust_remote_code on for every selected model",
        removal="the Board can refuse it",
        make=without_hub_code,
    )


NO_HUB_CODE = (
    _refuse(
        "llamafactory.webui.runner:Runner._parse_train_args",
        "llamafactory.webui.runner:Runner._launch",
    ),
    _refuse(
        "llamafactory.webui.runner:Runner._parse_eval_args",
        "llamafactory.webui.runner:Runner._launch",
    ),
    _refuse(
        "llamafactory.chat.chat_model:ChatModel.__init__",
        "llamafactory.webui.chatter:WebChatModel.load_model",
    ),
    _refuse(
        "llamafactory.webui.components.export:export_model",
        "llamafactory.webui.components.export:save_model",
    ),
)

PATCHES = (CONVERT_IN_BATCHES, OUR_TRAINER, LOAD_NO_WEIGHTS, *NO_HUB_CODE)


def _private(name: str, owner: str, *readers: str) -> PrivateName:
    return PrivateName(name, f"llamafactory.{owner}", _VERSIONS, readers)


PRIVATE = (
    _private(
        "_parse_train_args",
        "hparams.parser:get_train_args",
        "job.data.rows",
        "job.inference.validation_rows",
    ),
    _private(
        "_get_merged_dataset",
        "data.loader:get_dataset",
        "job.data.rows",
        "job.inference.validation_rows",
    ),
    _private(
        "_get_dataset_processor",
        "data.loader:_get_preprocessed_dataset",
        "job.data.rows",
        "job.inference.validation_rows",
    ),
    _private(
        "_encode_data_example",
        "data.processor.supervised:SupervisedDatasetProcessor",
        "job.data.rows",
        "job.inference.validation_rows",
    ),
    _private("_process_args", "chat.hf_engine:HuggingfaceEngine", "job.prompts.parity"),
    _private("_process_request", "api.chat:create_chat_completion_response", "job.prompts.parity"),
    _private("SUPPORTED_MODELS", "webui.common:get_model_path", "job.services.board"),
    _private("DEFAULT_TEMPLATE", "webui.common:get_template", "job.services.board"),
    # Imported by the tuner, one trainer per stage; those of other stages are empty modules.
    *(
        _private(f"run_{stage}", "train.tuner:_training_function", "job.patches.imports")
        for stage in ("pt", "sft", "rm", "ppo", "dpo", "kto")
    ),
)
