"""transformers: row order and micro-batch after a resume, faster starts."""

from __future__ import annotations

import functools
from typing import Any

from tunesmith.core.patching import Patch, PrivateName

_VERSIONS = "transformers==4.52.*"


def _keep_epoch(skip: Any) -> Any:
    def skip_first_batches(dataloader: Any, num_batches: int = 0) -> Any:
        skipped = skip(dataloader, num_batches)
        if hasattr(dataloader, "iteration"):
            skipped.iteration = dataloader.iteration
        return skipped

    return skip_first_batches


KEEP_EPOCH_WHEN_SKIPPING = Patch(
    target="transformers.trainer:skip_first_batches",
    caller="transformers.trainer:Trainer._inner_training_loop",
    versions=_VERSIONS,
    why="accelerate 1.7 creates a loader that counts epochs from 0 and resets the sampler: after a "
    "resume within an epoch the rest follows the first epoch's order, so some rows are trained "
    "twice and others not at all",
    removal="skip_first_batches of accelerate preserves `iteration`",
    make=_keep_epoch,
)


def _keep_batch(loop: Any) -> Any:
    @functools.wraps(loop)
    def inner_training_loop(
        self: Any, batch_size: int | None = None, args: Any = None, **kwargs: Any
    ) -> Any:
        if not self.args.auto_find_batch_size:
            batch_size = self.args.train_batch_size
        return loop(self, batch_size=batch_size, args=args, **kwargs)

    return inner_training_loop


KEEP_BATCH_OF_CONFIG = Patch(
    target="transformers:Trainer._inner_training_loop",
    caller="transformers.trainer:Trainer.train",
    versions=_VERSIONS,
    why="a resume uses the checkpoint's micro-batch and the config's accumulation: after the "
    "micro-batch was halved, the old one that did not fit returns, and a step has twice the rows",
    removal="Trainer.train no longer takes train_batch_size from the checkpoint's state",
    make=_keep_batch,
)


def _encode_straight(usual: Any) -> Any:
    from transformers import GPT2TokenizerFast, PreTrainedTokenizerFast

    # GPT2's own check that texts are not lists of words.
    expected = {
        (kind._encode_plus, kind._batch_encode_plus)
        for kind in (PreTrainedTokenizerFast, GPT2TokenizerFast)
    }

    def encode(self: Any, text: Any, *arguments: Any, **options: Any) -> Any:
        core = self._tokenizer
        if (
            arguments
            or options != {"add_special_tokens": False}
            or type(text) is not str
            or (type(self)._encode_plus, type(self)._batch_encode_plus) not in expected
            or core.truncation is not None
            or core.padding is not None
            or core.encode_special_tokens != self.split_special_tokens
        ):
            return usual(self, text, *arguments, **options)
        return core.encode_batch_fast([text], add_special_tokens=False)[0].ids

    return encode


ENCODE_STRAIGHT = Patch(
    target="transformers:PreTrainedTokenizerFast.encode",
    caller="llamafactory.data.template:Template._convert_elements_to_ids",
    versions=_VERSIONS,
    why="LLaMA-Factory encodes each part of a row separately, and transformers turns it into a "
    "batch with masks and offsets that are discarded: a quarter of the time of preparing rows. The "
    "ids are the same; other calls use the original code",
    removal="encode() of one text costs no more than its core's",
    make=_encode_straight,
)


def _never(_available: bool) -> bool:
    return False


NO_SKLEARN = Patch(
    target="transformers.utils.import_utils:_sklearn_available",
    caller="transformers.utils.import_utils:is_sklearn_available",
    versions=_VERSIONS,
    why="scikit-learn, half a second, is only used for assisted generation with a second model, "
    "which our jobs do not use",
    removal="transformers imports it only when it is used",
    make=_never,
)
NO_NLTK = Patch(
    target="transformers.utils.import_utils:_nltk_available",
    caller="transformers.utils.import_utils:is_nltk_available",
    versions=_VERSIONS,
    why="LLaMA-Factory always imports metrics of generated text for training: 0.2 s",
    removal="LLaMA-Factory imports them only when they are needed",
    make=_never,
)
NO_JIEBA = Patch(
    target="transformers.utils.import_utils:_jieba_available",
    caller="transformers.utils.import_utils:is_jieba_available",
    versions=_VERSIONS,
    why="LLaMA-Factory always imports metrics of generated text for training: 0.2 s",
    removal="LLaMA-Factory imports them only when they are needed",
    make=_never,
)


def _note_shards(_save: Any, note: Any) -> Any:
    return note


NOTE_SHARDS = Patch(
    target="transformers.modeling_utils:safe_save_file",
    caller="transformers.modeling_utils:PreTrainedModel.save_pretrained",
    versions=_VERSIONS,
    why="an export without weights: what would be written is noted, and written elsewhere in "
    "blocks",
    removal="never: the streaming merge gets the files of an export from it",
    make=_note_shards,
)

PATCHES = (
    KEEP_EPOCH_WHEN_SKIPPING,
    KEEP_BATCH_OF_CONFIG,
    ENCODE_STRAIGHT,
    NO_SKLEARN,
    NO_NLTK,
    NO_JIEBA,
    NOTE_SHARDS,
)
PRIVATE = (
    PrivateName(
        "_encode_plus",
        "transformers:PreTrainedTokenizerFast",
        _VERSIONS,
        ("job.patches.transformers",),
    ),
    PrivateName(
        "_batch_encode_plus",
        "transformers:PreTrainedTokenizerFast",
        _VERSIONS,
        ("job.patches.transformers",),
    ),
    PrivateName(
        "_attn_implementation",
        "transformers:PretrainedConfig",
        _VERSIONS,
        ("job.training.fast_trainer",),
    ),
    PrivateName(
        "_train_batch_size",
        "transformers:Trainer.__init__",
        _VERSIONS,
        ("job.training.fast_trainer",),
    ),
    # Both set on one trainer's objects.
    PrivateName(
        "clip_grad_norm_",
        "transformers:Trainer._inner_training_loop",
        _VERSIONS,
        ("job.training.fast_trainer",),
    ),
    PrivateName(
        "zero_grad",
        "transformers:Trainer._inner_training_loop",
        _VERSIONS,
        ("job.training.fast_trainer",),
    ),
)
