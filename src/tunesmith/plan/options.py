"""What the user asks of a training, as typed, and the limits of a run that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tunesmith.core.errors import UsageError
from tunesmith.job.run.schema import GpuChoice, Limits

# What may follow a training, in the order of doing: the first on the target, the others by
# whoever follows the run.
THEN = ("merge", "report", "pull", "poweroff")


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What the user asks of a training: files, overrides and options, as typed.

    `queue` waits for a host that is at work instead of refusing. `then` is what follows a
    success (THEN). `price` is money per hour; `max_hours` and `max_cost` end the training
    with a checkpoint. `mirror` None: as the target was set up. `preset` None: the one that the
    config's head names. `gpus` None: all there are. `keep_batch`: however many there are, a step
    has the rows that the config gives to one.
    """

    config: Path
    overrides: tuple[str, ...] = ()
    prompts: Path | None = None
    evaluate: bool = True
    run_id: str | None = None
    revision: str | None = None
    mirror: str | None = None
    queue: bool = False
    then: tuple[str, ...] = ()
    price: float | None = None
    max_hours: float | None = None
    max_cost: float | None = None
    preset: str | None = None
    gpus: GpuChoice | None = None
    keep_batch: bool = False


def words_of(text: str) -> tuple[str, ...]:
    """Return the words of a comma-separated option."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def number_of(option: str, text: str) -> float | None:
    """Return a number as typed; None for nothing. Raises UsageError naming the option."""
    try:
        return float(text) if text else None
    except ValueError:
        raise UsageError(f"--{option} {text}: expected a number, as in 1.98") from None


def check_then(then: tuple[str, ...]) -> None:
    """Raise UsageError for what cannot follow a training."""
    unknown = [word for word in then if word not in THEN]
    if unknown:
        raise UsageError(f"--then {unknown[0]}: expected one of {', '.join(THEN)}")


def run_limits(
    *,
    max_hours: float | None = None,
    price: float | None = None,
    max_cost: float | None = None,
) -> Limits:
    """Return the limits of a run (`max_seconds`), the lower of hours and cost.

    Raises UsageError for a number that makes no sense, and for a cost without a price.
    """
    for option, value in (("price", price), ("max-hours", max_hours), ("max-cost", max_cost)):
        if value is not None and not value > 0:
            raise UsageError(f"--{option} {value}: expected more than 0")
    hours = [] if max_hours is None else [max_hours]
    if max_cost is not None:
        if price is None:
            raise UsageError("--max-cost needs the hourly price", hint="add --price 1.98/h")
        hours.append(max_cost / price)
    return Limits(max_seconds=round(3600 * min(hours), 1) if hours else None)
