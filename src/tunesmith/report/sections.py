"""The parts of the page as values: what stands there, not how it looks. Pure."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from tunesmith.core.files import human_bytes
from tunesmith.job.run.codec import encode
from tunesmith.job.run.events import Changed, Event, PhaseEnded, PhaseStarted, RunStarted, Summary
from tunesmith.job.run.schema import Price
from tunesmith.report.curve import Curve
from tunesmith.report.diagnosis import FORGOTTEN
from tunesmith.report.record import GUARD, Record, Row, met_of, pair_answers

Tell = Callable[[str], str]

LONG_ANSWER = 400  # characters; a longer answer is folded after this many
LONG_LINES = 6  # or after this many lines: an untuned model likes to repeat line breaks
FEW_PATTERNS = 3  # so many patterns are said once above the table rather than in each row


@dataclass(frozen=True, slots=True)
class Headline:
    """One figure of the verdict row. `tone` is good, bad or plain."""

    label: str
    value: str
    note: str = ""
    tone: str = "plain"


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer: its beginning, the folded rest, and whether it met what was expected.

    `cut` says that the token limit ended it, not the model.
    """

    text: str
    rest: str
    met: bool | None
    cut: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """One prompt with both answers; `before` or `after` is None where it was not asked."""

    prompt: str
    reference: str
    expect: str
    before: Answer | None
    after: Answer | None


@dataclass(frozen=True, slots=True)
class AnswerSet:
    """Prompts of one kind, and the patterns their answers are judged by, each once.

    With more than FEW_PATTERNS of them `patterns` is empty and each row shows its own.
    """

    name: str
    patterns: tuple[str, ...]
    rows: tuple[Comparison, ...]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One config key. `marks` say who set it (word, reason) where the file did not."""

    key: str
    value: str
    marks: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class PhaseTime:
    """Seconds one phase took over all its attempts; `share` of the longest phase, 0 to 1.

    `memory` is what its last process held at most, in words: "3.1 GB, GPU 9.8 GB".
    """

    phase: str
    seconds: float
    share: float
    attempts: int
    state: str
    memory: str = ""


@dataclass(frozen=True, slots=True)
class Note:
    """Something worth knowing that happened `after` (time since the start, in words)."""

    after: str
    text: str
    detail: str


def headlines(record: Record, times: tuple[PhaseTime, ...], tell: Tell) -> list[Headline]:
    """The verdict row: state, held-out loss, prompts met, guard set, merge proof, time."""
    guard = _guard(record, tell)
    return [
        _state(record, tell),
        _held_out(record, tell),
        _prompts_met(record, tell),
        *([guard] if guard else []),
        _proof(record, tell),
        _total_time(record, times, tell),
    ]


def abstract(record: Record, tell: Tell) -> str:
    """The result in two or three sentences; empty where nothing was measured."""
    said = []
    before, after = (
        (record.evaluation.get(when) or {}).get("loss") for when in ("before", "after")
    )
    if before and after is not None:
        fell = "The held-out loss fell by {share:.0%}, from {before:.2f} to {after:.2f}."
        rose = "The held-out loss did not fall: {before:.2f} before, {after:.2f} after."
        sentence = tell(fell if after < before else rose)
        said.append(sentence.format(share=1 - after / before, before=before, after=after))
    base, tuned = met_of(record.before), met_of(record.after)
    if base and tuned:
        sentence = tell("The tuned model met {tuned} of {of} prompts, the base model {base}.")
        said.append(sentence.format(tuned=tuned[0], of=tuned[1], base=base[0]))
    forgot = _loss(record, "before", guard=True), _loss(record, "after", guard=True)
    if forgot[0] and forgot[1] is not None:
        rose = "On general prompts its loss rose by {share:.0%}."
        fell = "On general prompts its loss fell by {share:.0%}."
        kept = "On general prompts its loss is what it was."
        share = forgot[1] / forgot[0] - 1
        sentence = kept if abs(share) < 0.005 else rose if share > 0 else fell
        said.append(tell(sentence).format(share=abs(share)))
    if record.proof:
        good = "The merged model is proven equal to base model and adapter."
        bad = "The merged model did not pass its proof: do not use it."
        said.append(tell(good if record.proof.get("passed") else bad))
    return tell(" ").join(said)  # Chinese sentences follow each other without a space


def comparisons(record: Record) -> list[AnswerSet]:
    """The answers side by side, by set, the prompts first."""
    found: dict[str, list[Comparison]] = {}
    for name, before, after in pair_answers(record.before, record.after):
        row = after or before or {}
        comparison = Comparison(
            prompt=str(row.get("prompt", "")),
            reference=str(row.get("reference") or ""),
            expect=str(row.get("expect") or ""),
            before=answer(before),
            after=answer(after),
        )
        found.setdefault(name, []).append(comparison)
    sets = []
    for name, rows in found.items():
        patterns = tuple(dict.fromkeys(row.expect for row in rows if row.expect))
        few = len(patterns) <= FEW_PATTERNS
        sets.append(AnswerSet(name, patterns if few else (), tuple(rows)))
    return sets


def parameters(record: Record) -> dict[str, list[Parameter]]:
    """The config's keys by group, in the order of the file within each."""
    owned = {item.key: item for item in record.run.owned}
    overrides = record.run.overrides
    changed = {event.what: event for event in record.events if isinstance(event, Changed)}
    groups: dict[str, list[Parameter]] = {name: [] for name in [*GROUPS, "Other"]}
    removed = {key: item.value for key, item in owned.items() if key not in record.config}
    for key, value in (record.config | removed).items() if record.config else ():
        marks = []
        if key in owned:
            was, why = owned[key].was, owned[key].why
            marks.append(("owned", why if was is None else f"{why} (was {plain(was)})"))
        if key in overrides:
            marks.append(("override", ""))
        if key in changed:
            event = changed[key]
            marks.append(("changed", f"{plain(event.to)}: {event.why}"))
        groups[_group_of(key)].append(Parameter(key, plain(value), tuple(marks)))
    return {name: rows for name, rows in groups.items() if rows}


def data_statistics(record: Record, tell: Tell) -> list[tuple[str, list[tuple[str, str]]]]:
    """For each data set its key and what is known of it: (name, value) pairs."""
    sets = []
    for item in record.run.data:
        rows = [
            (tell(name.replace("_", " ")), _data_value(name, value))
            for name, value in encode(item).items()
            if name != "key" and value is not None
        ]
        sets.append((item.key or "?", rows))
    held_out = record.evaluation.get("after") or record.evaluation.get("before") or {}
    if sets and held_out.get("rows"):
        value = tell("{rows} rows, {tokens} answer tokens").format(
            rows=held_out["rows"], tokens=held_out.get("tokens", "?")
        )
        sets[-1][1].append((tell("held out"), value))
    return sets


def phase_times(events: tuple[Event, ...]) -> tuple[PhaseTime, ...]:
    """How long each phase took, in the order the phases began.

    A phase whose end was never written (kill -9, power loss) counts up to the last event
    before the run was started again.
    """
    seconds: dict[str, float] = {}
    attempts: dict[str, int] = {}
    states: dict[str, str] = {}
    peaks: dict[str, str] = {}
    phase, began, last = "", 0.0, 0.0

    def close(state: str, until: float) -> None:
        seconds[phase] = seconds.get(phase, 0.0) + max(0.0, until - began)
        states[phase] = state

    for event in events:
        now = event.time or last
        if isinstance(event, PhaseStarted):
            # A second attempt of the same phase goes on within it.
            if phase and phase != event.phase:
                close("ended without a word", last)
                phase = ""
            if not phase:
                phase, began = event.phase, now
            attempts[phase] = attempts.get(phase, 0) + 1
        elif isinstance(event, Summary) and event.peak_memory is not None:
            peaks[str(event.phase)] = _memory(event.peak_memory)
        elif isinstance(event, PhaseEnded) and phase:
            close(event.state, now)
            phase = ""
        elif isinstance(event, RunStarted) and phase:
            close("ended without a word", last)
            phase = ""
        last = now
    if phase:
        close("running", last)
    longest = max(seconds.values(), default=0.0) or 1.0
    return tuple(
        PhaseTime(
            name, spent, spent / longest, attempts.get(name, 1), states[name], peaks.get(name, "")
        )
        for name, spent in seconds.items()
    )


def starts(events: tuple[Event, ...], tell: Tell) -> tuple[str, ...]:
    """What has started work on the run each time, and how long after the first event."""
    first = next((event.time for event in events if event.time), 0.0)
    return tuple(
        f"{tell(STARTS[event.cause])} ({duration((event.time or first) - first)})"
        for event in events
        if isinstance(event, RunStarted) and event.cause in STARTS
    )


def _memory(peak: Mapping[str, Any]) -> str:
    parts = [human_bytes(peak["ram"])] if peak.get("ram") else []
    parts += [f"GPU {human_bytes(peak['gpu'])}"] if peak.get("gpu") else []
    return ", ".join(parts)


def notes(record: Record, curve: Curve, tell: Tell) -> list[Note]:
    """The events a reader should know of: everything that did not go straight ahead."""
    start = next((event.time for event in record.events if event.time), 0.0)
    resumes = iter(curve.resumes)
    found = []
    for item in record.events:
        event: Row = encode(item)
        name = str(event["event"])
        fields: dict[str, Any] = {
            key: plain(event.get(key))
            for key in ("step", "checkpoint", "why", "what", "from", "to", "phase", "failure")
        }
        fields["checkpoint"] = fields["checkpoint"].rsplit("/", 1)[-1]
        fields["message"] = str(event.get("message", ""))
        if name == "resumed" and event.get("step") is not None:
            fields["lost"] = next(resumes).lost
        template = NOTES.get(name)
        if template is None or (name == "run_ended" and event.get("state") == "succeeded"):
            continue
        fields["state"] = tell(str(event.get("state", "")))
        detail = event.get("detail") or []
        lines = [detail] if isinstance(detail, str) else [str(line) for line in detail]
        after = duration((item.time or start) - start)
        found.append(Note(after, tell(template).format(**fields), "\n".join(lines)))
    return found


def commands(record: Record) -> list[tuple[str, str]]:
    """The commands that do it again or go on from here: (what for, command)."""
    run_id = shlex.quote(record.run_id)
    train = ["inv", "train", "--config", record.run.config_file or "CONFIG"]
    overrides = record.run.overrides
    train += [f"{key}={plain(value)}" for key, value in overrides.items()]
    offered = [("Train the same again", shlex.join(train))]
    if record.status is None or record.status.state != "succeeded":
        offered.append(("Continue this run", f"inv resume --run {run_id}"))
    merge = "Merge again" if record.proof else "Merge and prove the result"
    offered.append((merge, f"inv merge --run {run_id}"))
    return [
        *offered,
        ("Talk to the tuned model", f"inv chat --run {run_id}"),
        ("Write this report again", f"inv report --run {run_id}"),
    ]


def omitted_loss(record: Record) -> str:
    """Why no held-out loss was measured, as the evaluation says; empty where it was."""
    measures = [record.evaluation.get(when) or {} for when in ("after", "before")]
    reasons = [(measure.get("omitted") or {}).get("loss") for measure in measures]
    return next((str(reason) for reason in reasons if reason), "")


def throughput(curve: Curve) -> float | None:
    """The median of the logged tokens per second."""
    known = [p.tokens_per_second for p in curve.train if p.tokens_per_second is not None]
    return median(known) if known else None


def duration(seconds: float) -> str:
    """Seconds as people say them: 8.2 s, 3 min 20 s, 1 h 04 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def percent(before: float, after: float) -> str:
    """The relative change in whole percent, with a true minus sign; a dash where there is none."""
    share = after / before if before else math.inf
    if not math.isfinite(share):
        return "–"
    change = round((share - 1) * 100)
    return f"{'−' if change < 0 else '+'}{abs(change)}%"


def _state(record: Record, tell: Tell) -> Headline:
    status = record.status
    state = status.state if status else "unknown"
    tone = {"succeeded": "good", "failed": "bad"}.get(state, "plain")
    done, total = (status.step, status.total_steps) if status else (None, None)
    note = tell("step {done} of {total}").format(done=done, total=total) if total else ""
    if status and status.failure:
        note = status.failure
    return Headline(tell("State"), tell(state), note, tone)


def _held_out(record: Record, tell: Tell) -> Headline:
    label = tell("Held-out loss")
    before, after = (
        (record.evaluation.get(when) or {}).get("loss") for when in ("before", "after")
    )
    if before is None and after is None:
        return Headline(label, "–", omitted_loss(record) or tell("not measured"))
    if before is None or after is None:
        only = tell("before only") if after is None else tell("after only")
        return Headline(label, f"{before if after is None else after:.3f}", only)
    tone = "good" if after < before else "bad"
    note = f"{percent(before, after)}, {tell('nat per token')}" if before else ""
    return Headline(label, f"{before:.2f} → {after:.2f}", note, tone)


def _prompts_met(record: Record, tell: Tell) -> Headline:
    label = tell("Prompts met")
    before, after = met_of(record.before), met_of(record.after)
    if before is None and after is None:
        return Headline(label, "–", tell("nothing was expected"))
    if before is None or after is None:
        met, of = before or after or (0, 0)
        only = tell("before only") if after is None else tell("after only")
        return Headline(label, f"{met} / {of}", only)
    tone = "good" if after[0] > before[0] else "plain" if after[0] == before[0] else "bad"
    note = tell("of {of}, before → after").format(of=after[1])
    return Headline(label, f"{before[0]} → {after[0]}", note, tone)


def _proof(record: Record, tell: Tell) -> Headline:
    label = tell("Merge proof")
    if not record.proof:
        return Headline(label, "–", tell("no merged model was proven"))
    checks = record.proof.get("checks", [])
    passed = sum(bool(check.get("passed")) for check in checks)
    note = tell("{passed} of {of} checks").format(passed=passed, of=len(checks))
    if skipped := sum(check.get("passed") is None for check in checks):
        note = f"{note}, {tell('{skipped} not possible').format(skipped=skipped)}"
    if record.proof.get("passed"):
        return Headline(label, tell("passed"), note, "good")
    return Headline(label, tell("failed"), note, "bad")


def _loss(record: Record, when: str, *, guard: bool = False) -> float | None:
    entry = record.evaluation.get(when) or {}
    loss = ((entry.get(GUARD) or {}) if guard else entry).get("loss")
    return float(loss) if isinstance(loss, int | float) else None


def _guard(record: Record, tell: Tell) -> Headline | None:
    """The loss on general prompts; None for a run that had none of them."""
    before, after = _loss(record, "before", guard=True), _loss(record, "after", guard=True)
    label = tell("Guard set")
    if before is None or after is None:
        known = before if after is None else after
        only = tell("before only") if after is None else tell("after only")
        return None if known is None else Headline(label, f"{known:.2f}", only)
    tone = "bad" if after / before - 1 >= FORGOTTEN else "plain"
    right = [met_of(rows, guard=True) for rows in (record.before, record.after)]
    note = f"{percent(before, after)}, {tell('general prompts')}"
    if right[0] and right[1]:
        said = tell("{before} → {after} of {of} right")
        said = said.format(before=right[0][0], after=right[1][0], of=right[1][1])
        note = f"{percent(before, after)}, {said}"
    return Headline(label, f"{before:.2f} → {after:.2f}", note, tone)


def _total_time(record: Record, times: tuple[PhaseTime, ...], tell: Tell) -> Headline:
    if not times:
        return Headline(tell("Time"), "–", tell("not recorded"))
    trained = next((item.seconds for item in times if item.phase == "train"), None)
    note = "" if trained is None else f"{tell('of it training')} {duration(trained)}"
    spent = cost(record, times)
    note = ", ".join(part for part in (note, spent.total if spent else "") if part)
    return Headline(tell("Time"), duration(sum(item.seconds for item in times)), note)


@dataclass(frozen=True, slots=True)
class Cost:
    """What the phases cost on a host paid by the hour: "3.20 CNY" and "1.88 CNY an hour"."""

    total: str
    rate: str


def cost(record: Record, times: tuple[PhaseTime, ...]) -> Cost | None:
    """Return the cost of all phases; None for a run without a price.

    Counted is the time
    of the phases: what a host cost before, between and after them the run does not know.
    """
    price = record.run.price
    if price is None:
        return None
    rate = price.per_hour if isinstance(price, Price) else price
    unit = (price.currency or "") if isinstance(price, Price) else ""
    hours = sum(item.seconds for item in times) / 3600
    return Cost(f"{hours * rate:.2f} {unit}".strip(), f"{rate:g} {unit}".strip())


@dataclass(frozen=True, slots=True)
class Score:
    """One figure of both measurements, as text; "–" where it was not measured."""

    label: str
    before: str
    after: str


def scores(record: Record, name: str, tell: Tell) -> list[Score]:
    """ROUGE, BLEU, exact matches and met prompts of one set; for the guard set its loss too."""
    entries = [record.evaluation.get(when) or {} for when in ("before", "after")]
    found = []

    def add(label: str, values: list[Any], shape: str) -> None:
        if any(value is not None for value in values):
            said = [shape.format(value) if value is not None else "–" for value in values]
            found.append(Score(label, *said))

    if name == GUARD:
        guards = [entry.get(GUARD) or {} for entry in entries]
        add(tell("loss (nat/token)"), [guard.get("loss") for guard in guards], "{:.4f}")
        add(tell("perplexity"), [guard.get("perplexity") for guard in guards], "{:.2f}")
        met = [guard.get("expected") for guard in guards]
        add(tell("right answers"), [_of(item) for item in met], "{}")
    measured = [(entry.get("scores") or {}).get(name) or {} for entry in entries]
    for key, label in (("rouge-1", "ROUGE-1"), ("rouge-2", "ROUGE-2"), ("rouge-l", "ROUGE-L")):
        add(label, [item.get(key) for item in measured], "{:.1f}")
    add("BLEU-4", [item.get("bleu-4") for item in measured], "{:.1f}")
    add(tell("exact matches"), [_of(item.get("exact")) for item in measured], "{}")
    return found


def _of(item: Mapping[str, Any] | None) -> str | None:
    return f"{item['met']} / {item['of']}" if item else None


def parity_ways(record: Record) -> list[tuple[str, str]]:
    """Each way to the merged model with its first difference, empty where it agrees."""
    found: dict[str, str] = {}
    for item in record.parity.get("differences", []):
        said = f"{item['probe']}: {item['found']!r} / {item['expected']!r} (id {item['at']})"
        found.setdefault(str(item["way"]), said)
    names = ("chat", "inv_chat", "api", "chat_template", "modelfile")
    return [(name, found.get(name, "")) for name in names]


def answer(row: Row | None) -> Answer | None:
    """Return a row's answer with its beginning and the rest to fold away."""
    if row is None:
        return None
    text = str(row.get("answer", "")).strip()
    end = len(text)
    if end > LONG_ANSWER * 1.2:  # hardly longer is not worth a fold
        end = text.rfind(" ", LONG_ANSWER - 40, LONG_ANSWER) + 1 or LONG_ANSWER
    lines = text[:end].splitlines(keepends=True)
    end = min(end, sum(len(line) for line in lines[:LONG_LINES]))
    return Answer(
        text[:end].rstrip(), text[end:].strip(), row.get("met"), row.get("finished") is False
    )


def _group_of(key: str) -> str:
    for name, (exact, prefixes) in GROUPS.items():
        if key in exact or key.startswith(prefixes):
            return name
    return "Other"


def _data_value(name: str, value: Any) -> str:
    if name == "sha256":
        return f"{str(value)[:12]}…"
    if name in ("size", "bytes") and isinstance(value, int | float):
        return human_bytes(value)
    return plain(value)


def plain(value: Any) -> str:
    """A value as it would stand in YAML, on one line."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return repr(value) if abs(value) >= 1e-3 or value == 0 else f"{value:.3g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    return json.dumps(value, ensure_ascii=False)


# group -> (whole keys, beginnings of keys); the first group that fits takes a key
GROUPS: dict[str, tuple[frozenset[str], tuple[str, ...]]] = {
    "Model": (
        frozenset({"template", "enable_thinking", "trust_remote_code", "flash_attn"}),
        ("model_", "adapter_", "quantization", "rope_", "use_fast_tokenizer"),
    ),
    "Method": (
        frozenset({"stage", "do_train", "finetuning_type", "freeze_trainable_layers"}),
        ("lora", "use_rslora", "use_dora", "pissa", "additional_target", "loraplus", "pref_"),
    ),
    "Validation": (
        frozenset({"val_size", "do_eval", "metric_for_best_model", "load_best_model_at_end"}),
        ("eval_", "per_device_eval", "early_stopping"),
    ),
    "Data": (
        frozenset({"cutoff_len", "max_samples", "mask_history", "train_on_prompt", "packing"}),
        ("dataset", "overwrite_cache", "preprocessing_", "dataloader_", "neat_pack", "tokenized"),
    ),
    "Output": (
        frozenset({"output_dir", "plot_loss", "report_to", "resume_from_checkpoint"}),
        ("logging_", "save_", "overwrite_output", "include_num_input", "run_name", "log_"),
    ),
    "Training": (
        frozenset({"learning_rate", "num_train_epochs", "max_steps", "max_grad_norm", "optim"}),
        (
            *("per_device_train", "gradient_", "lr_", "warmup", "bf16", "fp16", "pure_bf16"),
            *("seed", "data_seed", "weight_decay", "adam_", "ddp_", "deepspeed", "neftune"),
            *("disable_gradient", "use_cpu", "tf32", "enable_liger"),
        ),
    ),
}

STARTS = {
    "user": "by the user",
    "resume": "by a resume",
    "autostart": "by the start of the host",
    "container": "by the restart of its container",
    "queue": "by its turn in the queue",
    "retry": "by a retry",
}
NOTES = {
    "resumed": "Resumed at step {step} from {checkpoint}; {lost} logged steps were done again.",
    "discarded": "Discarded {checkpoint}: {why}.",
    "changed": "Changed {what} from {from} to {to}: {why}.",
    "paused": "Paused at step {step}: {why}.",
    "continued": "Continued at step {step}.",
    "restarting": "Started {phase} again after {failure}: {why}",
    "failure": "Failure of class {failure}: {message}",
    "run_ended": "The run ended: {state}.",
}
