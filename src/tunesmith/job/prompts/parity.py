"""Prompt parity: do all renderers of the merged model's prompt produce the training prompt?

Compared as token ids: the prompt as encoded in training, by LLaMA-Factory's chat and API (its own
code), by `inv chat`, by the exported chat template (transformers' apply_chat_template, which vLLM
uses too) and by the Modelfile (rendered as in Ollama). Also compared is the end of answers: the id
that ends trained answers must stop generation everywhere.

With a reasoning template, 0.9.3 encodes earlier turns of a conversation differently in training
and in chat (data/template.py, encode_multiturn and encode_oneturn); the exports are then compared
with the chat, and the difference is noted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tunesmith.core.documents import Config, Message
from tunesmith.core.errors import TunesmithError
from tunesmith.core.files import read_json, write_json, write_text
from tunesmith.job.inference import validation_rows
from tunesmith.job.inference.engine import Codec, Question
from tunesmith.job.prompts import go_template, read_back, templates
from tunesmith.job.prompts.records import Correction, DifferenceRecord, ParityRecord
from tunesmith.job.prompts.templates import CHAT_TEMPLATE, MODELFILE

TRAINING, CHAT, API = "training", "chat", "api"
RENDERERS = (CHAT, "inv_chat", API, "chat_template", "modelfile")  # compared with the training
_ROWS = 64  # rows read per data set
_SHAPES = 6  # rows compared: each shape of conversation once
_SHOWN = 16  # ids shown as text around a difference


@dataclass(frozen=True)
class Probe:
    """A conversation and its answer in the training data."""

    name: str
    messages: tuple[Message, ...]
    answer: str
    system: str | None = None


@dataclass(frozen=True)
class Difference:
    """A renderer that differs, with the first position and both texts from there on."""

    renderer: str
    probe: str
    at: int
    expected: str
    found: str

    def __str__(self) -> str:
        return (
            f"{self.renderer} differs from {TRAINING} in {self.probe!r} at id {self.at}: "
            f"{self.found!r} instead of {self.expected!r}"
        )

    def record(self) -> DifferenceRecord:
        """Return its record in parity.json."""
        return DifferenceRecord(
            renderer=self.renderer,
            probe=self.probe,
            at=self.at,
            expected=self.expected,
            found=self.found,
        )


@dataclass(frozen=True)
class Verdict:
    """The result of a comparison."""

    probes: int
    rows: int
    ids: int
    prompt: str  # the first probe's prompt in training
    stop: str
    differences: tuple[Difference, ...]
    ends: tuple[str, ...]  # faults of the end of answers
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.differences and not self.ends

    def faults(self) -> list[str]:
        """Return every fault as a sentence."""
        return [*map(str, self.differences), *self.ends]

    def record(
        self, corrected: Sequence[Correction] = (), before: Sequence[str] = ()
    ) -> ParityRecord:
        """Return the verdict's record in parity.json, with the corrections and their reasons."""
        return {
            "probes": self.probes,
            "rows": self.rows,
            "ids": self.ids,
            "prompt": self.prompt,
            "stop": self.stop,
            "differences": [difference.record() for difference in self.differences],
            "ends": list(self.ends),
            "notes": list(self.notes),
            "passed": self.passed,
            "corrected": list(corrected),
            "before": list(before),
        }


@dataclass
class _Comparison:
    differences: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ids: int = 0


def align(config: Config, codec: Codec, folder: Path) -> ParityRecord:
    """Compare, correct the export, compare again; return the content of parity.json.

    The chat template, the Modelfile and the ids that end an answer can be corrected, but not
    LLaMA-Factory's own chat and API.
    """
    probes, rows, notes = probes_of(config, codec)
    if not probes:
        return _nothing(notes).record()
    before = compare(codec, folder, probes, rows, notes)
    wrong = {difference.renderer for difference in before.differences}
    corrected: list[Correction] = []
    if "modelfile" in wrong and templates.adds_bos(folder) and not _leads_with_bos(codec):
        # Ollama and llama.cpp would add one to a prompt that was trained without, or that already
        # contains one with every question.
        templates.put_add_bos(folder, add=False)
        corrected.append(
            Correction(
                file="tokenizer_config.json", was="add_bos_token true", now="add_bos_token false"
            )
        )
    thought = trained_thought(codec, probes)
    if "chat_template" in wrong:
        was = _chat_template(folder)
        templates.put_chat_template(folder, templates.chat_template(codec, thought))
        read_back.require(codec, folder, lambda c: [reference(c, probe) for probe in probes])
        corrected.append(Correction(file=CHAT_TEMPLATE, was=was, now=_chat_template(folder)))
    ended = "\n".join(before.ends)
    if "modelfile" in wrong or MODELFILE in ended:
        was, now = _read(folder / MODELFILE), templates.modelfile(codec, folder, thought)
        write_text(folder / MODELFILE, now)
        corrected.append(Correction(file=MODELFILE, was=was, now=now))
    if "generation_config.json" in ended:
        corrected.append(_correct_end(codec, folder))
    after = compare(codec, folder, probes, rows, notes) if corrected else before
    return after.record(corrected, before.faults() if corrected else ())


def faults_of(record: ParityRecord) -> list[str]:
    """Return every fault of a parity record as a sentence."""
    return [*(str(Difference(**item)) for item in record["differences"]), *record["ends"]]


def advice(config: Config, record: ParityRecord) -> str:
    """Return how to remove the mismatch of a parity record."""
    renderers = {item["renderer"] for item in record["differences"]}
    if renderers & {CHAT, API}:
        # Only with reasoning templates: 0.9.3 trains on thoughts, but its chat prompts without.
        mode = config.get("enable_thinking", True)
        return (
            f"with enable_thinking: {json.dumps(mode)} LLaMA-Factory's chat uses a different "
            "prompt than its training: train with true if every answer thinks, with false if none "
            "does"
        )
    return "see RUN/parity.json"


def check(config: Config, codec: Codec, folder: Path) -> Verdict:
    """Compare without changing anything. No probes: no prompt was trained."""
    probes, rows, notes = probes_of(config, codec)
    return compare(codec, folder, probes, rows, notes) if probes else _nothing(notes)


def _nothing(notes: Sequence[str]) -> Verdict:
    return Verdict(0, 0, 0, "", "", (), (), tuple(notes))


def probes_of(config: Config, codec: Codec) -> tuple[list[Probe], int, list[str]]:
    """Return the probes, how many of them are rows of the data, and notes.

    Rows show what was trained; the fixed probes add what the data may lack: a system text, a second
    turn, line breaks and quotes.
    """
    if config.get("stage") == "pt":
        return [], 0, ["stage pt trains on plain text: there is no prompt to compare"]
    raw, reason = validation_rows.first_rows(config, codec, _ROWS)
    notes = [] if reason is None else [f"no row of the data compared: {reason}"]
    rows: dict[tuple[Any, ...], Probe] = {}
    close = codec.template.thought_words[1]
    for number, row in enumerate(raw, 1):
        if any(message["role"] not in ("user", "assistant") for message in row["_prompt"]):
            continue  # with tools, which no chat template here supports
        answer = str(row["_response"][0]["content"])
        shape = (len(row["_prompt"]), bool(row["_system"]), close in answer)
        if len(rows) < _SHAPES:
            rows.setdefault(
                shape,
                Probe(f"row {number}", tuple(row["_prompt"]), answer, row["_system"] or None),
            )
    thinks = sum(shape[2] for shape in rows) * 2 > len(rows)
    return [*fixed_probes(codec, thinks=thinks), *rows.values()], len(rows), notes


def fixed_probes(codec: Codec, *, thinks: bool = False) -> list[Probe]:
    """Return the probes that need no data; with `thinks` their answers start with a thought."""
    opened, closed = codec.template.thought_words
    answer = f"{opened}\n.\n{closed}\n\n4." if thinks else "4."
    first = {"role": "user", "content": "What is 2 + 2?"}
    again = {"role": "user", "content": 'And "3 + 4"?\nOnly the number.'}
    return [
        Probe("one question", (first,), answer),
        Probe("two lines in Chinese", ({"role": "user", "content": "你好！\n你是谁？"},), answer),
        Probe("a system text", (again,), answer, "Be brief.\n简短回答。"),
        Probe("a second turn", (first, {"role": "assistant", "content": "4."}, again), answer),
    ]


def trained_thought(codec: Codec, probes: Sequence[Probe]) -> str:
    """Return the text that training adds at the end of a prompt: the empty thought or nothing."""
    if not templates.is_reasoning(codec.template):
        return ""
    block = codec.template.get_thought_word_ids(codec.tokenizer)
    prompt, _ = trained(codec, probes[0])
    return str(codec.template.add_thought()) if prompt[-len(block) :] == block else ""


def _leads_with_bos(codec: Codec) -> bool:
    """Return whether the template starts with a BOS, which the Modelfile can then omit."""
    return any(isinstance(s, set) and "bos_token" in s for s in codec.template.format_prefix.slots)


def compare(
    codec: Codec, folder: Path, probes: Sequence[Probe], rows: int, notes: Sequence[str]
) -> Verdict:
    """Compare all renderers for all probes, and the ends of answers."""
    from transformers import AutoTokenizer

    exported = AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False
    )
    renderers = _renderers(codec, folder, exported)
    comparison = _Comparison(notes=list(notes))
    for probe in probes:
        expected = reference(codec, probe)
        prompt, _ = trained(codec, probe)
        if expected != prompt:
            _note(
                comparison,
                "LLaMA-Factory encodes earlier turns differently in training and in chat "
                f"(id {_first_difference(prompt, expected)}); exports follow its chat",
            )
        comparison.ids += len(expected)
        for renderer in RENDERERS:
            ids = renderers[renderer](probe)
            if isinstance(ids, str):
                comparison.differences.append(Difference(renderer, probe.name, 0, "ids", ids))
            elif ids != expected:
                comparison.differences.append(differing(codec, renderer, probe, expected, ids))
    stop, ends = _ends(codec, folder, exported, probes[0])
    if not stop:
        _note(comparison, "no stop token ends the trained answers: answers may not end")
    prompt = codec.tokenizer.decode(trained(codec, probes[0])[0])
    return Verdict(
        len(probes),
        rows,
        comparison.ids,
        prompt,
        stop,
        tuple(comparison.differences),
        ends,
        tuple(comparison.notes),
    )


def trained(codec: Codec, probe: Probe) -> tuple[list[int], list[int]]:
    """Return (prompt, answer) as ids, encoded like a row in SupervisedDatasetProcessor."""
    turns = [*(dict(m) for m in probe.messages), {"role": "assistant", "content": probe.answer}]
    turns = codec.template.mm_plugin.process_messages(turns, [], [], [], codec.processor)
    pairs = codec.template.encode_multiturn(codec.tokenizer, turns, probe.system, None)
    prompt = [token for source, target in pairs[:-1] for token in (*source, *target)]
    ending = [codec.tokenizer.eos_token_id] if codec.template.efficient_eos else []
    return [*prompt, *pairs[-1][0]], [*pairs[-1][1], *ending]


def reference(codec: Codec, probe: Probe) -> list[int]:
    """Return the ids that every renderer must produce: the trained prompt, or, for a conversation
    with a reasoning template, that of LLaMA-Factory's chat."""
    if len(probe.messages) > 1 and templates.is_reasoning(codec.template):
        return codec.encode(Question(probe.messages, probe.system))
    return trained(codec, probe)[0]


def _renderers(
    codec: Codec, folder: Path, exported: Any
) -> dict[str, Callable[[Probe], list[int] | str]]:
    """Return each renderer's encoding of a probe; a text instead of ids is the reason it failed."""
    from llamafactory.chat.hf_engine import HuggingfaceEngine
    from llamafactory.hparams import GeneratingArguments

    os.environ.setdefault("API_VERBOSE", "0")  # it would log every probe
    generating = GeneratingArguments().to_dict()

    def chat(messages: list[dict[str, str]], system: str | None) -> list[int]:
        # The function only uses the model's device and checks that it is not a vision model.
        model: Any = SimpleNamespace(device="cpu", config=None)
        inputs, length = HuggingfaceEngine._process_args(
            model, codec.tokenizer, codec.processor, codec.template, generating, messages, system
        )
        return [int(token) for token in inputs["inputs"][0, :length]]

    def by_chat(probe: Probe) -> list[int] | str:
        return chat([dict(m) for m in probe.messages], probe.system)

    def by_api(probe: Probe) -> list[int] | str:
        from llamafactory.api.chat import _process_request
        from llamafactory.api.protocol import ChatCompletionRequest

        request = ChatCompletionRequest.model_validate(
            {"model": "merged", "messages": spoken(probe)}
        )
        messages, system, *_ = _process_request(request)
        return chat(messages, system)

    def by_template(probe: Probe) -> list[int] | str:
        from jinja2 import TemplateError

        if not exported.chat_template:
            return "the export has no chat template"
        try:
            ids = exported.apply_chat_template(spoken(probe), add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return [int(token) for token in ids]

    template, default, _ = templates.read_modelfile(_read(folder / MODELFILE))
    bos = [exported.bos_token_id] if templates.adds_bos(folder) else []

    def by_modelfile(probe: Probe) -> list[int] | str:
        # Go templates cannot split text: Ollama's clients send earlier answers without thoughts.
        messages = [_without_thought(codec, message) for message in probe.messages]
        try:
            prompt = go_template.render(template, probe.system or default, messages)
        except TunesmithError as error:
            return error.line
        return bos + list(exported.encode(prompt, add_special_tokens=False))

    renderers: dict[str, Callable[[Probe], list[int] | str]] = {CHAT: by_chat, API: by_api}
    renderers["inv_chat"] = lambda probe: codec.encode(Question(probe.messages, probe.system))
    return renderers | {"chat_template": by_template, "modelfile": by_modelfile}


def _without_thought(codec: Codec, message: Message) -> Message:
    if message["role"] != "assistant" or not templates.is_reasoning(codec.template):
        return message
    return {**message, "content": codec.template.remove_thought(message["content"])}


def spoken(probe: Probe) -> list[dict[str, str]]:
    """Return a probe as a client sends it to a server."""
    system = [{"role": "system", "content": probe.system}] if probe.system else []
    return [*system, *(dict(m) for m in probe.messages)]


def _ends(codec: Codec, folder: Path, exported: Any, probe: Probe) -> tuple[str, tuple[str, ...]]:
    """Return the text that ends a trained answer ("" if none), and everything that ignores it."""
    stops = codec.stop_ids()
    end = next((token for token in reversed(trained(codec, probe)[1]) if token in stops), None)
    if end is None:
        return "", ()
    text, faults = codec.tokenizer.convert_ids_to_tokens(end), []
    if exported.eos_token_id != codec.tokenizer.eos_token_id:
        faults.append(
            f"tokenizer_config.json: eos_token is {exported.eos_token!r}, "
            f"{codec.tokenizer.eos_token!r} in training"
        )
    named = templates.eos_ids(folder)
    shown = exported.convert_ids_to_tokens(named)
    # A base may have more of them than the template: llama 3 has two.
    expected = {*stops, *templates.eos_ids(Path(str(codec.model_args.model_name_or_path)))}
    if end not in named:
        faults.append(f"generation_config.json: eos_token_id {shown} does not contain {text!r}")
    elif strange := sorted(set(named) - expected):
        faults.append(
            f"generation_config.json: eos_token_id contains "
            f"{exported.convert_ids_to_tokens(strange)}, which ends no trained answer"
        )
    listed = templates.read_modelfile(_read(folder / MODELFILE))[2]
    if text not in listed:
        faults.append(f"{MODELFILE}: stop {listed} does not contain {text!r}")
    return str(text), tuple(faults)


def _correct_end(codec: Codec, folder: Path) -> Correction:
    """Let generation_config.json end answers with the token that ends them in training."""
    file = folder / "generation_config.json"
    value = read_json(file) if file.is_file() else {}
    was = json.dumps(value.get("eos_token_id"))
    stops = codec.stop_ids()
    value["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    write_json(file, value)
    return Correction(
        file=file.name, was=f"eos_token_id {was}", now=f"eos_token_id {json.dumps(stops)}"
    )


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _chat_template(folder: Path) -> str:
    return _read(folder / CHAT_TEMPLATE) or str(
        read_json(folder / "tokenizer_config.json").get("chat_template") or ""
    )


def _note(comparison: _Comparison, note: str) -> None:
    if note not in comparison.notes:
        comparison.notes.append(note)


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    shorter = min(len(one), len(other))
    return next((at for at in range(shorter) if one[at] != other[at]), shorter)


def differing(
    codec: Codec, renderer: str, probe: Probe, expected: Sequence[int], ids: Sequence[int]
) -> Difference:
    at = _first_difference(expected, ids)

    def text(tokens: Sequence[int]) -> str:
        return str(codec.tokenizer.decode(tokens[at : at + _SHOWN]))

    return Difference(renderer, probe.name, at, text(expected), text(ids))
