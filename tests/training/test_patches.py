"""Every patch of the training environment: it fits, and what it mends is still to be mended."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import patch_checks
from tunesmith.core.errors import TunesmithError
from tunesmith.core.patching import Patch, install, installed, uninstall, value_of
from tunesmith.job.patches import datasets, llamafactory, peft, transformers

LIBRARIES = (datasets, llamafactory, peft, transformers)
PATCHES = [patch for library in LIBRARIES for patch in library.PATCHES]
PRIVATE = [name for library in LIBRARIES for name in library.PRIVATE]
# Ways into a library that has none; there is no behaviour to be mended.
HOOKS = (llamafactory.OUR_TRAINER, llamafactory.LOAD_NO_WEIGHTS, transformers.NOTE_SHARDS)
# Patch -> what shows that the library still needs it. Each has the plain library, and ends so.
NEEDED: dict[str, Callable[[Path], None]] = {}


def needed(*patches: Patch) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    def note(case: Callable[[Path], None]) -> Callable[[Path], None]:
        NEEDED.update({patch.target: case for patch in patches})
        return case

    return note


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.target)
def test_a_patch_is_for_this_version_and_its_caller_reads_it(patch: Patch) -> None:
    patch_checks.check(patch, *([object()] if patch in HOOKS else []))


@pytest.mark.parametrize("private", PRIVATE, ids=lambda name: f"{name.owner}: {name.name}")
def test_a_private_name_is_there(private: Any) -> None:
    patch_checks.check_private(private)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.target)
def test_another_version_is_refused_by_name(patch: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _name: "99.0")
    with pytest.raises(TunesmithError, match=r"is for .*, and .* 99.0 is installed") as no:
        install(patch, *([object()] if patch in HOOKS else []))
    assert patch.target in no.value.message


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.target)
def test_what_a_patch_mends_is_still_wrong_without_it(patch: Patch, tmp_path: Path) -> None:
    if patch in HOOKS:
        assert patch.target not in NEEDED
        return
    NEEDED[patch.target](tmp_path)


@needed(transformers.KEEP_EPOCH_WHEN_SKIPPING)
def epochs(_folder: Path) -> None:
    import torch
    from accelerate import Accelerator

    loader = Accelerator(cpu=True).prepare(torch.utils.data.DataLoader(list(range(8))))
    loader.iteration = 3
    target = transformers.KEEP_EPOCH_WHEN_SKIPPING.target
    assert value_of(target)(loader, 2).iteration == 0
    with installed(transformers.KEEP_EPOCH_WHEN_SKIPPING):
        assert value_of(target)(loader, 2).iteration == 3


@needed(transformers.KEEP_BATCH_OF_CONFIG)
def micro_batches(folder: Path) -> None:
    import torch
    from transformers import Trainer, TrainingArguments

    model = torch.nn.Linear(1, 1)
    args = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, use_cpu=True, report_to=[]
    )
    trainer = Trainer(model, args, train_dataset=[{"x": 0}] * 8)
    trainer.save_model(str(folder / "checkpoint-1"))
    trainer.state.train_batch_size = 4
    trainer.state.save_to_json(str(folder / "checkpoint-1" / "trainer_state.json"))
    seen: list[int] = []

    def loop(_self: Any, batch_size: int | None = None, args: Any = None, **_rest: Any) -> None:
        seen.append(int(batch_size or 0))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "_inner_training_loop", loop)
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
        patched.setattr(
            Trainer, "_inner_training_loop", transformers.KEEP_BATCH_OF_CONFIG.make(loop)
        )
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    assert seen == [4, 2]


@needed(transformers.ENCODE_STRAIGHT)
def encoding(_folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    batches: list[Any] = []
    usual = PreTrainedTokenizerFast._batch_encode_plus

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        batches.append(args)
        return usual(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(PreTrainedTokenizerFast, "_batch_encode_plus", counted)
        plain = tokenizer.encode("a b a", add_special_tokens=False)
        assert len(batches) == 1
        # What it knows are the library's own functions, so one that was changed goes the old way.
        with installed(transformers.ENCODE_STRAIGHT):
            assert tokenizer.encode("a b a", add_special_tokens=False) == plain
        assert len(batches) == 1


@needed(
    transformers.NO_SKLEARN,
    transformers.NO_NLTK,
    transformers.NO_JIEBA,
    peft.NO_BNB,
    peft.NO_BNB_4BIT,
)
def imports(_folder: Path) -> None:
    loaded = subprocess.run(
        [sys.executable, "-c", _IMPORTS], check=True, capture_output=True, text=True
    ).stdout
    assert set(loaded.split()) == {"sklearn", "nltk", "jieba", "bitsandbytes"}


_IMPORTS = """
import sys
import torch
import transformers.generation.candidate_generator
import llamafactory.train.sft.metric
from peft import LoraConfig, get_peft_model
get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
print(*(name for name in ("sklearn", "nltk", "jieba", "bitsandbytes") if name in sys.modules))
"""


@needed(datasets.REMEMBER_TYPE, datasets.INFER_TYPE_ONCE)
def types_of_columns(_folder: Path) -> None:
    import pyarrow
    from datasets.arrow_writer import TypedSequence

    made: list[int] = []
    usual = TypedSequence.__arrow_array__

    def counted(self: Any, type: Any = None) -> Any:
        made.append(1)
        return usual(self, type)

    def types() -> Any:
        column = TypedSequence([1, 2])
        pyarrow.array(column)
        return column.get_inferred_type()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TypedSequence, "__arrow_array__", counted)
        plain = types()
        assert len(made) == 2
        with installed(datasets.REMEMBER_TYPE), installed(datasets.INFER_TYPE_ONCE):
            assert types() == plain
        assert len(made) == 3


@needed(*datasets.READ_AS_FILES)
def streaming(_folder: Path) -> None:
    from datasets.packaged_modules.text import text
    from datasets.streaming import extend_module_for_streaming

    (patch,) = (p for p in datasets.READ_AS_FILES if ".text." in p.target)
    with installed(patch):
        before = dict(vars(text))
        extend_module_for_streaming(text.__name__)
        assert vars(text) == before
    extend_module_for_streaming(text.__name__)
    assert vars(text) != before
    del text._patched_for_streaming


@needed(llamafactory.CONVERT_IN_BATCHES)
def converting(_folder: Path) -> None:
    from datasets import Dataset
    from llamafactory.data import loader
    from llamafactory.data.parser import DatasetAttr

    asked: list[bool] = []
    usual = Dataset.map

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(bool(kwargs.get("batched")))
        return usual(self, *args, **kwargs)

    rows = Dataset.from_dict({"instruction": ["a", "b"], "output": ["c", "d"]})
    attributes = DatasetAttr("file", "x", prompt="instruction", response="output", query=None)
    data_args = SimpleNamespace(
        streaming=False, preprocessing_num_workers=None, overwrite_cache=True, dataset_dir="."
    )
    training_args = SimpleNamespace(local_process_index=0)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Dataset, "map", counted)
        plain = loader.align_dataset(rows, attributes, data_args, training_args)
        with installed(llamafactory.CONVERT_IN_BATCHES):
            batched = loader.align_dataset(rows, attributes, data_args, training_args)
    assert list(plain) == list(batched)
    assert asked == [False, True]


@needed(*llamafactory.NO_HUB_CODE)
def hub_code(folder: Path) -> None:
    """Each of the four is called as the Board calls it, with the real library behind."""
    assert set(_trusted(folder)) == {True}
    for patch in llamafactory.NO_HUB_CODE:
        install(patch)
    try:
        assert set(_trusted(folder)) == {False}
    finally:
        for patch in llamafactory.NO_HUB_CODE:
            uninstall(patch)


def _trusted(folder: Path) -> Iterator[bool]:
    import gradio  # type: ignore[import-not-found]
    from llamafactory.chat.chat_model import ChatModel
    from llamafactory.train import tuner
    from llamafactory.webui import components
    from llamafactory.webui.components import export
    from llamafactory.webui.engine import Engine

    engine = Engine(demo_mode=False, pure_chat=False)
    with gradio.Blocks():
        engine.manager.add_elems("top", components.create_top())
        engine.manager.add_elems("train", components.create_train_tab(engine))
        engine.manager.add_elems("eval", components.create_eval_tab(engine))
    data = {
        element: getattr(element, "value", None) for element in engine.manager._id_to_elem.values()
    }
    for name, value in {
        "top.lang": "en",
        "top.model_name": "some",
        "top.model_path": str(folder),
        "top.checkpoint_path": [],
        "train.dataset": ["x"],
        "eval.dataset": ["x"],
        "train.output_dir": "out",
        "eval.output_dir": "out",
        "train.extra_args": "{}",
    }.items():
        data[engine.manager.get_elem_by_id(name)] = value
    yield engine.runner._parse_train_args(data)["trust_remote_code"]
    yield engine.runner._parse_eval_args(data)["trust_remote_code"]

    class Enough(Exception):
        pass

    seen: list[bool] = []

    def note(args: dict[str, Any]) -> Any:
        seen.append(args["trust_remote_code"])
        raise Enough

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("llamafactory.chat.chat_model.get_infer_args", note)
        patched.setattr(tuner, "get_infer_args", note)
        with pytest.raises(Enough):
            ChatModel({"model_name_or_path": str(folder), "trust_remote_code": True})
        with pytest.raises(Enough):
            export.export_model({"model_name_or_path": str(folder), "trust_remote_code": True})
    yield from seen


def test_ways_in_have_no_other_way() -> None:
    from llamafactory.train.sft.workflow import run_sft
    from llamafactory.train.tuner import export_model

    assert not [name for name in inspect.signature(run_sft).parameters if "trainer" in name]
    assert list(inspect.signature(export_model).parameters) == ["args"]
