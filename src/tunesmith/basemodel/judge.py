"""Whether a run can train on a model, told before its weights are fetched or read.

`judge` looks at config.json, tokenizer and index, and at the sizes of the weights; a fault is
refused in one line, what only deserves a word comes back as a note. Standard library, Python 3.10.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

from tunesmith.basemodel import architecture, memory, merging, templates
from tunesmith.basemodel.architecture import Misfit
from tunesmith.basemodel.files import CONFIG, INDEX, json_object
from tunesmith.basemodel.memory import Estimate
from tunesmith.basemodel.shape import ModelShape, shape_of
from tunesmith.core import formats
from tunesmith.core.bounded import parse_json
from tunesmith.core.documents import Config, ModelConfig
from tunesmith.core.errors import UsageError

# With one of these, tokens that the tokenizer lacks become rows of the embedding.
_NEW_TOKENS = ("resize_vocab", "add_tokens", "add_special_tokens")


@dataclass(frozen=True)
class Machine:
    """The memory of the machine that trains: of each of its GPUs, and its own, in bytes."""

    gpus: tuple[int, ...] = ()
    ram: int | None = None

    def taking(self, count: int, ids: Collection[int] = ()) -> Machine:
        """Return it with only so many of its GPUs, or those of these numbers."""
        chosen = tuple(size for i, size in enumerate(self.gpus) if i in ids)
        return replace(self, gpus=chosen or self.gpus[:count])


@dataclass(frozen=True)
class Wish:
    """What a run wants of its model.

    `values` is its config, `insisted` the keys that were given on the command line, `merge`
    whether an adapter is to be merged; `zero` the stage of its DeepSpeed config. `machine` None:
    nobody knows it yet.
    """

    values: Config
    insisted: Collection[str] = ()
    merge: bool = False
    zero: int = 0
    machine: Machine | None = None


@dataclass(frozen=True)
class Verdict:
    """What is worth a word of a model that can be trained on, and what its training takes."""

    notes: tuple[str, ...] = ()
    estimate: Estimate | None = None


@dataclass(frozen=True)
class Seen:
    """What is known of a model before its weights: its small files in `folder`, the names of all
    files, and the bytes of the weights (None: not known)."""

    name: str
    folder: Path
    names: Collection[str]
    weight_bytes: int | None = None
    code: bool = field(default=False, kw_only=True)


def require_trainable(seen: Seen) -> None:
    """Raise UsageError in one line for a model that nobody can train on with this stack."""
    config, fault = json_object(seen.folder / CONFIG)
    found = architecture.by_names(seen.name, seen.names, seen.folder)
    if not found and not fault:
        found = architecture.by_config(config, code=seen.code)
    if not found and INDEX in seen.names:
        index, fault = json_object(seen.folder / INDEX)
        found = None if fault else architecture.by_index(index, seen.names)
    if found:
        raise _error(seen.name, found)


def judge(seen: Seen, wish: Wish) -> Verdict:
    """Return what to say of a model and a run's wish. Raises UsageError for what cannot work."""
    require_trainable(seen)
    config, fault = json_object(seen.folder / CONFIG)
    if fault:
        return Verdict()  # the proof of the whole folder says so
    found = _method(config, wish)
    if wish.merge and not found and not any(n.endswith(".safetensors") for n in seen.names):
        found = Misfit(
            "its weights are pickled, which no merge reads",
            "name a copy with .safetensors files, or train without `--then merge`",
        )
    if found:
        raise _error(seen.name, found)
    notes = list(_template(seen, wish)) if wish.values.get("stage", "sft") != "pt" else []
    if not wish.values.get("do_train"):
        return Verdict(tuple(notes))
    shape = shape_of(config, seen.weight_bytes)
    if shape is None:
        return Verdict((*notes, f"{CONFIG} has not the usual figures: no estimate of the memory"))
    if bits := architecture.stored_bits(config):
        wish = replace(wish, values={**wish.values, "quantization_bit": bits})
    estimated, more = require_memory(seen.name, shape, wish)
    return Verdict((*notes, *more), estimated)


def require_memory(name: str, shape: ModelShape, wish: Wish) -> tuple[Estimate, tuple[str, ...]]:
    """Return what a training takes, and notes on it.

    Raises UsageError where what is sure of it is more than the machine has: neither a smaller batch
    nor checkpointing, which the job runner tries by itself, would help.
    """
    machine = wish.machine
    on_gpu = machine is None or bool(machine.gpus)
    processes = max(1, len(machine.gpus)) if machine else 1
    more = {"on_gpu": on_gpu, "zero": wish.zero, "processes": processes}
    setting = memory.setting_of(wish.values, **more)  # type: ignore[arg-type]
    found = memory.estimate(shape, setting, on_gpu=on_gpu)
    room = (min(machine.gpus) if machine.gpus else machine.ram) if machine else None
    if room is None or found.total <= room:
        return found, ()
    what = "GPU" if on_gpu else "machine"
    fits = memory.that_fits(shape, wish.values, room, **more)  # type: ignore[arg-type]
    if found.sure <= room:
        advice = f"; with {fits.text}" if fits else ""
        return found, (
            f"memory: about {formats.size(found.total)} of {formats.size(room)} that the {what} "
            f"has: it may run out, and then goes on with a smaller batch{advice}",
        )
    parts = ", ".join(f"{p.what} {formats.size(p.size)}" for p in found.parts if p.sure)
    raise UsageError(
        f"{name}: the training takes at least {formats.size(found.sure)}, the {what} has "
        f"{formats.size(room)} ({parts})",
        hint=f"with {fits.text}" if fits else f"choose a smaller base model, or {_larger(on_gpu)}",
    )


def _larger(on_gpu: bool) -> str:
    return "a GPU with more memory" if on_gpu else "a machine with more memory or a GPU"


def _method(config: ModelConfig, wish: Wish) -> Misfit | None:
    """Return why this way of training cannot be had with this model."""
    values = wish.values
    if method := architecture.quantization(config):
        tuning = values.get("finetuning_type", "lora")
        if values.get("do_train") and tuning != "lora":
            return Misfit(
                f"its weights are quantised ({method}): they can be trained with an adapter only, "
                f"not with finetuning_type {tuning}",
                "write `finetuning_type: lora`, or name the model that it was made from",
            )
        if wish.machine is not None and not wish.machine.gpus:
            return Misfit(
                f"its weights are quantised ({method}), which only a GPU can compute with",
                "name the model that it was made from",
            )
    return merging.by_model(values, config) if wish.merge else None


def _template(seen: Seen, wish: Wish) -> tuple[str, ...]:
    """Return what to say of a run's template. Raises UsageError for one that the model has not."""
    chat = templates.chat_template(seen.folder)
    own = templates.own_template(seen.name)
    template = wish.values.get("template")
    if not template:
        if chat and chat.names:
            raise UsageError(
                f"{seen.name}: `template` is missing, and the tokenizer has several chat templates "
                f"({', '.join(chat.names)}), of which LLaMA-Factory reads none",
                hint=_write(own, chat),
            )
        if chat is None:
            fit = f"; LLaMA-Factory's own for it is {own}" if own else ""
            return (
                "template: none, and the model has no chat template: question and answer follow "
                f"one another without a mark (`empty`){fit}",
            )
        fit = f"; LLaMA-Factory's own for it is {own}" if own else ""
        return (f"template: read from the model's chat template{fit}",)
    template = str(template)
    missing = templates.missing_tokens(seen.folder, template)
    insisted = "template" in wish.insisted or any(wish.values.get(key) for key in _NEW_TOKENS)
    if missing and not insisted:
        raise UsageError(
            f"{seen.name}: `template` is {template}, whose {missing[0]} is no token of this "
            "model: it would have a number that the model has no embedding for",
            hint=f"{_write(own, chat)}, or insist with `template={template}` on the command line",
        )
    if insisted:
        return ()
    if own and own != template:
        return (f"template: {template}, but LLaMA-Factory's own for this model is {own}",)
    if chat and not own and templates.is_other(template, chat):
        near = ", ".join(templates.nearest(chat))
        advice = f"; {near} would" if near else ""
        return (
            f"template: {template} does not write what the model's own chat template does{advice}",
        )
    return ()


def _write(own: str | None, chat: templates.ChatTemplate | None) -> str:
    near = (own,) if own else templates.nearest(chat)
    if near:
        return f"write `template: {near[0]}`"
    return "write the template of the model's family" if chat else "write `template: default`"


def _error(name: str, found: Misfit) -> UsageError:
    return UsageError(f"{name}: {found.text}", hint=found.hint)


def zero_stage_of(value: object) -> int:
    """Return the ZeRO stage of a config's `deepspeed`: a file, its JSON, or the mapping itself.

    0 without one, and where it cannot be read: whoever trains by it says so.
    """
    if isinstance(value, str) and value.startswith("{"):
        with contextlib.suppress(ValueError):
            value = parse_json(value.encode())
    if isinstance(value, str):
        value = json_object(Path(value))[0] if Path(value).is_file() else {}
    section = value.get("zero_optimization") if isinstance(value, dict) else None
    stage = section.get("stage") if isinstance(section, dict) else None
    return stage if isinstance(stage, int) and 0 <= stage <= 3 else 0
