"""What the record of a run holds: the shapes of its files, and a status made from its events.

A key that is there has the type its readers count on; one that is absent is theirs to do
without. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

from tunesmith.core.errors import UsageError
from tunesmith.job.run.shapes import (
    Check,
    anything,
    count,
    each,
    either,
    fields,
    finite,
    flag,
    items,
    maybe,
    number,
    one_of,
    text,
    whole,
)

# The version of what the two halves say to each other (run.json, status.json, events, answers of
# the agent). Hosts and images are compared by a digest over this half's files, this one among
# them: raise it where a change of the other half alone asks for more than they know.
CONTRACT = 1
STATES = ("queued", "running", "succeeded", "failed", "stopped")
# Why work on a run began: by whom or what, and `retry` after a failure that may pass.
Cause = Literal["user", "resume", "autostart", "container", "queue", "retry"]
CAUSES: tuple[Cause, ...] = get_args(Cause)
# Of an event that stands for a line that is none.
DAMAGED_LINE = "damaged_line"

_FILES = each(fields({"size": count, "sha256": text}, ("size", "sha256")))
_PROMPT = fields({"prompt": text, "expect": maybe(text), "reference": maybe(text)}, ("prompt",))
PRICE = either(finite, fields({"per_hour": finite, "currency": maybe(text)}))

REQUEST = fields(
    {
        "run_id": text,
        "created": text,
        "title": text,
        "stem": text,
        "config_file": text,
        "model": maybe(
            fields(
                {
                    "name": maybe(text),
                    "path": maybe(text),
                    "source": maybe(text),
                    "revision": maybe(text),
                    "files": _FILES,
                }
            )
        ),
        "overrides": each(anything),
        "data": items(
            fields({"key": maybe(text), "file": text, "rows": maybe(count), "sha256": maybe(text)})
        ),
        "owned": items(fields({"key": text, "why": text}, ("key",))),
        "phases": items(text),
        "prompts": items(_PROMPT),
        "guard": items(_PROMPT),
        "evaluate": each(anything),
        "merge": each(anything),
        "limits": maybe(each(anything)),
        "env": maybe(each(either(text, finite))),
        "then": maybe(items(text)),
        "preset": maybe(text),
        "fetch": maybe(each(anything)),
        "price": maybe(PRICE),
        "turn": maybe(text),
        "after": maybe(each(anything)),
        "predict": maybe(each(anything)),
    }
)

_GPU = fields(
    {"memory_used": maybe(finite), "memory_total": maybe(finite), "utilisation": maybe(finite)}
)

STATUS = fields(
    {
        "run_id": text,
        "state": one_of(STATES),
        "phase": maybe(text),
        "phases": each(text),
        "failure": maybe(text),
        "message": maybe(text),
        "detail": items(text),
        "started": maybe(finite),
        "updated": maybe(finite),
        "worked_seconds": maybe(finite),
        "step": maybe(whole),
        "total_steps": maybe(whole),
        "loss": maybe(number),
        "learning_rate": maybe(number),
        "tokens_per_second": maybe(number),
        "eta_seconds": maybe(finite),
        "supervisor": maybe(
            fields({"pid": count, "started": count, "init_started": count, "hostname": text})
        ),
        "price": maybe(PRICE),
        "gpu": maybe(items(_GPU)),
        "paused": maybe(either(flag, text)),
        "ahead": items(text),
        "cause": one_of(CAUSES),
        "retried": text,
    },
    ("state",),
)

_SHARE = fields({"met": count, "of": count}, ("met", "of"))
_SET = fields(
    {"exact": maybe(_SHARE), "of": count}
    | dict.fromkeys(("rouge-1", "rouge-2", "rouge-l", "bleu-4"), maybe(number))
)
_MEASURED = fields(
    {
        "loss": maybe(number),
        "perplexity": maybe(number),
        "seconds": maybe(finite),
        "tokens": maybe(count),
        "rows": maybe(count),
        "expected": maybe(_SHARE),
        "guard": maybe(
            fields({"loss": maybe(number), "perplexity": maybe(number), "expected": maybe(_SHARE)})
        ),
        "scores": maybe(each(maybe(_SET))),
        "omitted": maybe(each(text)),
        "generation": maybe(each(anything)),
    }
)
EVALUATION = fields({"before": maybe(_MEASURED), "after": maybe(_MEASURED)})
PROOF = fields(
    {
        "passed": flag,
        "checks": items(
            fields(
                {"name": text, "passed": maybe(flag), "detail": text, "figures": each(anything)},
                ("name", "passed", "detail"),
            )
        ),
        "files": _FILES,
        "seconds": finite,
        "tolerance": each(anything),
    }
)
PARITY = fields(
    {
        "passed": flag,
        "accepted": flag,
        "differences": items(
            fields({"way": text, "probe": text}, ("way", "probe", "found", "expected", "at"))
        ),
        "corrected": items(fields({"file": text}, ("file",))),
        "notes": items(text),
        "ends": items(anything),
        "before": items(anything),
    }
)
VERSIONS: Check = each(anything)
ANSWER = fields(
    {
        "prompt": text,
        "answer": text,
        "reference": maybe(text),
        "expect": maybe(text),
        "set": text,
        "met": maybe(flag),
        "finished": maybe(flag),
    }
)

COPY = fields({"from": text, "files": _FILES}, ("from", "files"))

# What the supervisor changes after a failure; nothing else is taken from that file.
ADJUSTMENTS = fields(
    {
        "per_device_train_batch_size": count,
        "gradient_accumulation_steps": count,
        "disable_gradient_checkpointing": flag,
    }
)

HEARTBEAT = fields(
    {
        "step": whole,
        "total_steps": whole,
        "time": finite,
        "step_seconds": maybe(finite),
        "pid": whole,
    },
    ("step", "total_steps", "time", "paused"),
)

CONFIG: Check = each(anything)

_EVENT = {"event": text, "time": finite}
_EVENTS: dict[str, Check] = {
    "run_started": fields(_EVENT | {"phases": items(text), "cause": one_of(CAUSES)}, ("phases",)),
    "run_ended": fields(_EVENT | {"state": text, "failure": maybe(text)}, ("state",)),
    "phase_started": fields(_EVENT | {"phase": text, "attempt": whole}, ("phase",)),
    "phase_ended": fields(
        _EVENT | {"phase": text, "state": text, "seconds": finite}, ("phase", "state")
    ),
    "resumed": fields(_EVENT | {"step": whole, "total_steps": maybe(whole)}, ("step",)),
    "discarded": fields(_EVENT | {"checkpoint": text, "why": text}, ("checkpoint", "why")),
    "changed": fields(_EVENT | {"what": text}, ("what",)),
    "paused": fields(_EVENT | {"why": text}),
    "failure": fields(
        _EVENT
        | {
            "failure": text,
            "message": text,
            "detail": either(text, items(text)),
            "retry": maybe(flag),
        },
        ("failure", "message"),
    ),
    "restarting": fields(_EVENT | {"phase": text, "why": text}, ("phase", "why")),
    "eval": fields(_EVENT | {"step": whole, "loss": maybe(number)}, ("step", "loss")),
    # NaN may be written as text.
    "log": fields(
        _EVENT
        | {"step": whole, "total_steps": maybe(whole)}
        | dict.fromkeys(
            ("loss", "learning_rate", "grad_norm", "tokens_per_second", "epoch"),
            maybe(either(number, text)),
        )
    ),
    "progress": fields(
        _EVENT | {"done": finite, "total": finite, "unit": text}, ("done", "total", "unit")
    ),
    "summary": fields(
        _EVENT
        | {
            "phase": text,
            "metrics": each(anything),
            "output": text,
            "peak_memory": maybe(each(finite)),
        }
    ),
    "note": fields(_EVENT | {"text": text}, ("text",)),
    "queued": fields(_EVENT | {"ahead": items(text)}, ("ahead",)),
    "limit": fields(_EVENT | {"what": text}, ("what",)),
    "after_command": fields(_EVENT | {"text": text}, ("text",)),
    "after_command_ended": fields(_EVENT | {"code": maybe(whole), "why": maybe(text)}, ("code",)),
}
_OTHER = fields(_EVENT, ("event",))


def needed(request: Mapping[str, Any], run_id: str, *keys: str) -> Any:
    """Return what run.json has below `keys`. Raises UsageError naming what it lacks."""
    value: Any = request
    for number_of_keys, key in enumerate(keys, 1):
        if not isinstance(value, Mapping) or key not in value:
            raise UsageError(
                f"run {run_id}: its run.json has no {'.'.join(keys[:number_of_keys])}; "
                f"`inv rm --run {run_id}` deletes the run"
            )
        value = value[key]
    return value


def event_fault(value: Any) -> str | None:
    """Return why a line of events.jsonl is no event, or None."""
    if not isinstance(value, dict):
        return "not a JSON object"
    name = value.get("event")
    return _EVENTS.get(name, _OTHER)(value, "") if isinstance(name, str) else _OTHER(value, "")


def status_from(events: Iterable[Mapping[str, Any]], run_id: str) -> dict[str, Any]:
    """Return the status that a run's events tell of; `state` is running where no end is told."""
    status: dict[str, Any] = {
        "run_id": run_id,
        "state": "running",
        "phase": None,
        "phases": {},
        "failure": None,
        "message": "",
        "detail": [],
        "started": None,
        "step": 0,
    }
    for event in events:
        name = event["event"]
        if name == "run_started":
            status["started"] = status["started"] or event.get("time")
            status["state"] = "running"
            status |= {"cause": event["cause"]} if "cause" in event else {}
            status["phases"] |= dict.fromkeys(event["phases"], "queued")
        elif name == "phase_started":
            status["phase"] = event["phase"]
            status["phases"][event["phase"]] = "running"
        elif name == "phase_ended":
            status["phases"][event["phase"]] = event["state"]
        elif name == "log":
            known = ("step", "total_steps", "learning_rate", "tokens_per_second")
            status |= {key: event[key] for key in known if number(event.get(key), "") is None}
            status["loss"] = event["loss"] if isinstance(event.get("loss"), float) else None
        elif name == "run_ended" and event["state"] in STATES:
            status["state"] = event["state"]
    return status
