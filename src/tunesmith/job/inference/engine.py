"""Load a model and answer prompts with LLaMA-Factory's own loader and template.

Training, evaluation, chat and the proof must feed the same ids to the model, so all of them use
LLaMA-Factory 0.9.3's template with the thinking mode of the train config. Torch and LLaMA-Factory
are imported inside functions, so importing this module is cheap.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.core.documents import Arguments, Config, Message
from tunesmith.core.errors import UsageError
from tunesmith.job.run.config import starting_adapters, tuned_adapters
from tunesmith.job.run.failures import JobError

# ModelArguments keys of the train config that must not be used for inference: other engines,
# training-only kernels, and train_from_scratch, which would initialise random weights.
_NOT_FOR_INFERENCE = frozenset(
    {
        "adapter_name_or_path",
        "adapter_folder",
        "disable_gradient_checkpointing",
        "enable_liger_kernel",
        "infer_backend",
        "infer_dtype",
        "model_name_or_path",
        "moe_aux_loss_coef",
        "print_param_status",
        "shift_attn",
        "train_from_scratch",
        "upcast_layernorm",
        "upcast_lmhead_output",
        "use_reentrant_gc",
        "use_unsloth",
        "use_unsloth_gc",
    }
)
# DataArguments keys that affect the prompt's ids.
_TEMPLATE_KEYS = ("template", "enable_thinking", "default_system", "tool_format")
# A decoder's replacement for an incomplete character.
_TORN = "\ufffd"


@dataclass(frozen=True)
class Sampling:
    """Sampling options. The default is greedy decoding: the same answer every time."""

    max_new_tokens: int = 64
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 50
    repetition_penalty: float = 1.0
    seed: int = 42

    def record(self) -> dict[str, int | float | bool]:
        """Return the options needed to reproduce the answers."""
        if self.do_sample:
            return dataclasses.asdict(self)
        return {"do_sample": False, "max_new_tokens": self.max_new_tokens, "seed": self.seed}


@dataclass(frozen=True)
class Question:
    """A conversation that ends with a user message."""

    messages: tuple[Message, ...]
    system: str | None = None
    tools: str | None = None

    @classmethod
    def of(cls, prompt: str, system: str | None = None) -> Question:
        """Return the question of one user message."""
        return cls(({"role": "user", "content": prompt},), system)


@dataclass(frozen=True)
class Answer:
    """A model's answer. `tokens` includes the stop token."""

    text: str
    tokens: int
    finished: bool  # it ended with a stop token, not at max_new_tokens


@dataclass(frozen=True)
class Codec:
    """LLaMA-Factory's tokenizer and template, with the arguments they were created from."""

    tokenizer: Any
    processor: Any
    template: Any
    model_args: Any
    finetuning_args: Any

    def encode(self, question: Question) -> list[int]:
        """Return the prompt's ids as encoded by LLaMA-Factory's chat."""
        turns = [dict(m) for m in question.messages] + [{"role": "assistant", "content": ""}]
        ids, _ = self.template.encode_oneturn(
            self.tokenizer, turns, question.system, question.tools
        )
        return [int(token) for token in ids]

    def stop_ids(self) -> list[int]:
        """Return the ids that end an answer: the tokenizer's eos and the template's stop words."""
        ids = self.template.get_stop_token_ids(self.tokenizer)
        return sorted(token for token in ids if token is not None)


@dataclass(frozen=True)
class LoadedModel:
    """A model loaded for inference."""

    codec: Codec
    model: Any

    @property
    def dtype(self) -> str:
        """Compute dtype, torch's name without its prefix: float32, bfloat16."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def device(self) -> str:
        """cpu, cuda:0, ..."""
        return str(self.model.device)


def arguments(
    config: Config,
    model: str | Path | None = None,
    adapters: Sequence[str | Path] = (),
) -> Arguments:
    """Return LLaMA-Factory inference arguments with the model and template keys of `config`.

    `model` replaces config["model_name_or_path"]. LLaMA-Factory merges `adapters`
    in memory. infer_dtype is the config's, else `auto`: bfloat16 or float16 on a GPU, float32
    on a CPU, where bfloat16 is emulated (measured: 4 times slower with AVX2).
    """
    from llamafactory.hparams import ModelArguments

    names = {field.name for field in dataclasses.fields(ModelArguments) if field.init}
    keys = {
        key: value
        for key, value in config.items()
        if key in names - _NOT_FOR_INFERENCE and not key.startswith(("export_", "vllm_", "sglang_"))
    }
    keys |= {key: config[key] for key in _TEMPLATE_KEYS if key in config}
    keys |= {
        "model_name_or_path": str(model or config["model_name_or_path"]),
        "finetuning_type": "lora" if adapters else config.get("finetuning_type", "lora"),
        "infer_dtype": config.get("infer_dtype", "auto"),
        "trust_remote_code": bool(config.get("trust_remote_code", False)),
    }
    if adapters:
        comma = next((str(name) for name in adapters if "," in str(name)), None)
        if comma is not None:
            raise UsageError(f"{comma}: LLaMA-Factory splits adapter paths at commas: rename it")
        keys["adapter_name_or_path"] = ",".join(str(name) for name in adapters)
    return keys


def base_arguments(config: Config) -> Arguments:
    """Return the arguments of the model before training."""
    return arguments(config, adapters=starting_adapters(config))


def tuned_arguments(config: Config, output: Path) -> Arguments:
    """Return the arguments of the model after training: base with adapter, or the full model."""
    if config.get("finetuning_type", "lora") == "lora":
        return arguments(config, adapters=tuned_adapters(config, output))
    return arguments(config, model=output)


def codec(args: Arguments) -> Codec:
    """Load tokenizer and template, but not the weights; takes seconds.

    Raises JobError of class `config` if no template is given and LLaMA-Factory cannot read one
    from the model's chat template.
    """
    from jinja2 import TemplateError
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.hparams import get_infer_args
    from llamafactory.model import load_tokenizer

    model_args, data_args, finetuning_args, _ = get_infer_args(args)
    module = load_tokenizer(model_args)
    try:
        template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    except (TemplateError, ValueError) as error:
        if data_args.template:
            raise
        # parse_template (data/template.py) asks for a lone system text, which some refuse, and
        # takes it that an answer follows what asks for one, which DeepSeek-R1's does not.
        raise JobError(
            "config",
            "`template` is missing, and LLaMA-Factory cannot read one from the model's chat "
            f"template ({' '.join(str(error).split())[:120]}): write the template of its family",
        ) from None
    return Codec(module["tokenizer"], module["processor"], template, model_args, finetuning_args)


def load(prepared: Codec) -> LoadedModel:
    """Load the weights with LLaMA-Factory, adapters merged in memory, for inference."""
    from llamafactory.model import load_model

    model = load_model(prepared.tokenizer, prepared.model_args, prepared.finetuning_args)
    return LoadedModel(prepared, model)


def generate(
    loaded: LoadedModel,
    questions: Sequence[Question],
    sampling: Sampling,
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Answer the questions in batches; return the answers in the order of the questions.

    `progress` is called with the number of questions answered so far.
    """
    prompts = [loaded.codec.encode(question) for question in questions]
    stop = loaded.codec.stop_ids()
    tokenizer = loaded.codec.tokenizer
    answers = generate_ids(
        loaded.model, prompts, stop, tokenizer.pad_token_id, sampling, batch_size, progress
    )
    return [answer_of(tokenizer, ids, stop) for ids in answers]


def answer_of(tokenizer: Any, ids: Sequence[int], stop: Sequence[int]) -> Answer:
    """Decode new ids. If the token limit cuts a character, its first bytes, which decode to
    U+FFFD, are dropped."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    finished = bool(ids) and ids[-1] in stop
    return Answer(text if finished else text.rstrip(_TORN), len(ids), finished)


def generate_ids(
    model: Any,
    prompts: Sequence[Sequence[int]],
    stop: Sequence[int],
    pad: int,
    sampling: Sampling,
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Return the new ids of every prompt, up to and including the first stop id.

    Prompts of similar length share a batch, padded on the left: `inputs` and `attention_mask` are
    int64 [rows, longest prompt].
    """
    import torch

    torch.manual_seed(sampling.seed)
    results: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = max(len(prompts[i]) for i in chosen)
        rows = [[pad] * (width - len(prompts[i])) + list(prompts[i]) for i in chosen]
        mask = [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen]
        with torch.inference_mode():
            output = model.generate(
                inputs=torch.tensor(rows, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                **_generation(sampling, stop, pad),
            )
        for row, i in enumerate(chosen):
            results[i] = _until_stop(output[row, width:].tolist(), stop)
        if progress is not None:
            progress(min(start + batch_size, len(order)))
    return results


def stream(
    loaded: LoadedModel, question: Question, sampling: Sampling, write: Callable[[str], None]
) -> Answer:
    """Answer one question, passing the text to `write` as it is generated."""
    import torch

    ids = loaded.codec.encode(question)
    stop = loaded.codec.stop_ids()
    tokenizer = loaded.codec.tokenizer
    torch.manual_seed(sampling.seed)
    inputs = torch.tensor([ids], device=loaded.model.device)
    with torch.inference_mode():
        output = loaded.model.generate(
            inputs=inputs,
            attention_mask=torch.ones_like(inputs),
            streamer=_Pieces(tokenizer, write),
            **_generation(sampling, stop, tokenizer.pad_token_id),
        )
    return answer_of(tokenizer, _until_stop(output[0, len(ids) :].tolist(), stop), stop)


def _generation(sampling: Sampling, stop: Sequence[int], pad: int) -> Arguments:
    """Return keyword arguments of transformers' model.generate.

    use_model_defaults=False matters: transformers >= 4.50 otherwise replaces every value that
    equals its global default by the model's generation_config.json, so do_sample=False silently
    becomes sampling for a model that ships do_sample: true, such as DeepSeek-R1.
    """
    from transformers import GenerationConfig

    chosen: Arguments = {"do_sample": False}
    if sampling.do_sample:
        chosen = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
        }
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        repetition_penalty=sampling.repetition_penalty,
        eos_token_id=list(stop),
        pad_token_id=pad,
        **chosen,
    )
    return {"generation_config": config, "use_model_defaults": False}


def _until_stop(ids: list[int], stop: Sequence[int]) -> list[int]:
    """Truncate after the first stop id: in a batch, padding follows it."""
    for position, token in enumerate(ids):
        if token in stop:
            return ids[: position + 1]
    return ids


class _Pieces:
    """A transformers streamer (put/end) that writes text once its characters are complete.

    A Chinese character may span several tokens; until its last one the decoded text ends
    with U+FFFD and is withheld.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        self._tokenizer = tokenizer
        self._write = write
        self._ids: list[int] = []
        self._shown = 0
        self._prompt = True

    def put(self, value: Any) -> None:
        """Receive the prompt (first call) or new ids."""
        if self._prompt:
            self._prompt = False
            return
        self._ids += value.flatten().tolist()
        text = self._text()
        if text.endswith(_TORN):
            return
        self._write(text[self._shown :])
        self._shown = len(text)
        if text.endswith("\n"):  # a reset keeps decoding linear in the answer's length
            self._ids, self._shown = [], 0

    def end(self) -> None:
        """Write the rest, without an incomplete last character."""
        self._write(self._text()[self._shown :].rstrip(_TORN))

    def _text(self) -> str:
        text: str = self._tokenizer.decode(
            self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text
