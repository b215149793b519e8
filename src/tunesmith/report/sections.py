"""The parts of the page as values: what stands there, not how it looks. Pure."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.core import formats
from tunesmith.job.run.codec import encode
from tunesmith.job.run.events import Changed, Summary
from tunesmith.report.curve import Curve
from tunesmith.report.diagnosis import FORGOTTEN
from tunesmith.report.i18n import Translator
from tunesmith.report.record import GUARD, Record, Row, met_of
from tunesmith.report.timing import PhaseTime, cost


@dataclass(frozen=True, slots=True)
class Headline:
    """One figure of the verdict row. `tone` is good, bad or plain."""

    label: str
    value: str
    note: str = ""
    tone: str = "plain"


@dataclass(frozen=True, slots=True)
class Parameter:
    """One config key. `marks` say who set it (word, reason) where the file did not."""

    key: str
    value: str
    marks: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Note:
    """Something worth knowing that happened `after` (time since the start, in words)."""

    after: str
    text: str
    detail: str


def headlines(record: Record, times: tuple[PhaseTime, ...], t: Translator) -> list[Headline]:
    """The verdict row: state, held-out loss, prompts met, guard set, merge proof, time."""
    guard = _guard(record, t)
    return [
        _state(record, t),
        _held_out(record, t),
        _prompts_met(record, t),
        *([guard] if guard else []),
        _proof(record, t),
        _total_time(record, times, t),
    ]


def abstract(record: Record, t: Translator) -> str:
    """The result in two or three sentences; empty where nothing was measured."""
    said = []
    before, after = (
        (record.evaluation.get(when) or {}).get("loss") for when in ("before", "after")
    )
    if before and after is not None:
        fell = "The held-out loss fell by {share:.0%}, from {before:.2f} to {after:.2f}."
        rose = "The held-out loss did not fall: {before:.2f} before, {after:.2f} after."
        sentence = t(fell if after < before else rose)
        said.append(sentence.format(share=1 - after / before, before=before, after=after))
    base, tuned = met_of(record.before), met_of(record.after)
    if base and tuned:
        sentence = t("The tuned model met {tuned} of {of} prompts, the base model {base}.")
        said.append(sentence.format(tuned=tuned[0], of=tuned[1], base=base[0]))
    forgot = _loss(record, "before", guard=True), _loss(record, "after", guard=True)
    if forgot[0] and forgot[1] is not None:
        rose = "On general prompts its loss rose by {share:.0%}."
        fell = "On general prompts its loss fell by {share:.0%}."
        kept = "On general prompts its loss is what it was."
        share = forgot[1] / forgot[0] - 1
        sentence = kept if abs(share) < 0.005 else rose if share > 0 else fell
        said.append(t(sentence).format(share=abs(share)))
    if record.proof:
        good = "The merged model is proven equal to base model and adapter."
        bad = "The merged model did not pass its proof: do not use it."
        said.append(t(good if record.proof.get("passed") else bad))
    return t(" ").join(said)  # Chinese sentences follow each other without a space


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


def data_statistics(record: Record, t: Translator) -> list[tuple[str, list[tuple[str, str]]]]:
    """For each data set its key and what is known of it: (name, value) pairs."""
    sets = []
    for item in record.run.data:
        rows = [
            (t(name.replace("_", " ")), _data_value(name, value))
            for name, value in encode(item).items()
            if name != "key" and value is not None
        ]
        sets.append((item.key or "?", rows))
    if sets and (cuts := _cuts(record)):
        for name, text in (
            ("full", "{full} of {rows} rows fill cutoff_len {cutoff_len}; what is longer was cut"),
            ("untrained", "{untrained} of {rows} rows have no token to train on"),
        ):
            if cuts.get(name):
                sets[-1][1].append((t("cut"), t(text).format(**cuts)))
    held_out = record.evaluation.get("after") or record.evaluation.get("before") or {}
    if sets and held_out.get("rows"):
        value = t("{rows} rows, {tokens} answer tokens").format(
            rows=held_out["rows"], tokens=held_out.get("tokens", "?")
        )
        sets[-1][1].append((t("held out"), value))
    return sets


def _cuts(record: Record) -> dict[str, int]:
    """What the training's last attempt has counted (job/data/cuts.py); {} where it did not."""
    for event in reversed(record.events):
        if isinstance(event, Summary) and event.phase == "train":
            cuts = event.results.get("cuts")
            names = ("rows", "full", "untrained", "cutoff_len")
            if isinstance(cuts, Mapping) and all(isinstance(cuts.get(n), int) for n in names):
                return {name: cuts[name] for name in names}
    return {}


def notes(record: Record, curve: Curve, t: Translator) -> list[Note]:
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
        fields["state"] = t(str(event.get("state", "")))
        detail = event.get("detail") or []
        lines = [detail] if isinstance(detail, str) else [str(line) for line in detail]
        after = formats.duration((item.time or start) - start)
        found.append(Note(after, t(template).format(**fields), "\n".join(lines)))
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


def percent(before: float, after: float) -> str:
    """The relative change in whole percent, with a true minus sign; a dash where there is none."""
    share = after / before if before else math.inf
    if not math.isfinite(share):
        return "–"
    change = round((share - 1) * 100)
    return f"{'−' if change < 0 else '+'}{abs(change)}%"


def _state(record: Record, t: Translator) -> Headline:
    status = record.status
    state = status.state if status else "unknown"
    tone = {"succeeded": "good", "failed": "bad"}.get(state, "plain")
    done, total = (status.step, status.total_steps) if status else (None, None)
    note = t("step {done} of {total}").format(done=done, total=total) if total else ""
    if status and status.failure:
        note = status.failure
    return Headline(t("State"), t(state), note, tone)


def _held_out(record: Record, t: Translator) -> Headline:
    label = t("Held-out loss")
    before, after = (
        (record.evaluation.get(when) or {}).get("loss") for when in ("before", "after")
    )
    if before is None and after is None:
        return Headline(label, "–", omitted_loss(record) or t("not measured"))
    if before is None or after is None:
        only = t("before only") if after is None else t("after only")
        return Headline(label, f"{before if after is None else after:.3f}", only)
    tone = "good" if after < before else "bad"
    note = f"{percent(before, after)}, {t('nat per token')}" if before else ""
    return Headline(label, f"{before:.2f} → {after:.2f}", note, tone)


def _prompts_met(record: Record, t: Translator) -> Headline:
    label = t("Prompts met")
    before, after = met_of(record.before), met_of(record.after)
    if before is None and after is None:
        return Headline(label, "–", t("nothing was expected"))
    if before is None or after is None:
        met, of = before or after or (0, 0)
        only = t("before only") if after is None else t("after only")
        return Headline(label, f"{met} / {of}", only)
    tone = "good" if after[0] > before[0] else "plain" if after[0] == before[0] else "bad"
    note = t("of {of}, before → after").format(of=after[1])
    return Headline(label, f"{before[0]} → {after[0]}", note, tone)


def _proof(record: Record, t: Translator) -> Headline:
    label = t("Merge proof")
    if not record.proof:
        return Headline(label, "–", t("no merged model was proven"))
    checks = record.proof.get("checks", [])
    passed = sum(bool(check.get("passed")) for check in checks)
    note = t("{passed} of {of} checks").format(passed=passed, of=len(checks))
    if skipped := sum(check.get("passed") is None for check in checks):
        note = f"{note}, {t('{skipped} not possible').format(skipped=skipped)}"
    if record.proof.get("passed"):
        return Headline(label, t("passed"), note, "good")
    return Headline(label, t("failed"), note, "bad")


def _loss(record: Record, when: str, *, guard: bool = False) -> float | None:
    entry = record.evaluation.get(when) or {}
    loss = ((entry.get(GUARD) or {}) if guard else entry).get("loss")
    return float(loss) if isinstance(loss, int | float) else None


def _guard(record: Record, t: Translator) -> Headline | None:
    """The loss on general prompts; None for a run that had none of them."""
    before, after = _loss(record, "before", guard=True), _loss(record, "after", guard=True)
    label = t("Guard set")
    if before is None or after is None:
        known = before if after is None else after
        only = t("before only") if after is None else t("after only")
        return None if known is None else Headline(label, f"{known:.2f}", only)
    tone = "bad" if after / before - 1 >= FORGOTTEN else "plain"
    right = [met_of(rows, guard=True) for rows in (record.before, record.after)]
    note = f"{percent(before, after)}, {t('general prompts')}"
    if right[0] and right[1]:
        said = t("{before} → {after} of {of} right")
        said = said.format(before=right[0][0], after=right[1][0], of=right[1][1])
        note = f"{percent(before, after)}, {said}"
    return Headline(label, f"{before:.2f} → {after:.2f}", note, tone)


def _total_time(record: Record, times: tuple[PhaseTime, ...], t: Translator) -> Headline:
    if not times:
        return Headline(t("Time"), "–", t("not recorded"))
    trained = next((item.seconds for item in times if item.phase == "train"), None)
    note = "" if trained is None else f"{t('of it training')} {formats.duration(trained)}"
    spent = cost(record, times)
    note = ", ".join(part for part in (note, spent.total if spent else "") if part)
    return Headline(t("Time"), formats.duration(sum(item.seconds for item in times)), note)


def _group_of(key: str) -> str:
    for name, (exact, prefixes) in GROUPS.items():
        if key in exact or key.startswith(prefixes):
            return name
    return "Other"


def _data_value(name: str, value: Any) -> str:
    if name == "sha256":
        return f"{str(value)[:12]}…"
    if name in ("size", "bytes") and isinstance(value, int | float):
        return formats.size(value)
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
