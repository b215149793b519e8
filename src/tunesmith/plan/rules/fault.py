"""A fault of a config, and the change of the config that ends it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from tunesmith.core.errors import UsageError

# In a change: the key is to be removed.
REMOVE = object()


@dataclass(frozen=True)
class Fault:
    """Why a config cannot work: `message` in one line, and a `change` with which it can.

    `change` maps keys to the values to write, REMOVE for a key to delete. It is empty where only
    the user can know what was meant; `advice` says then what to look for. `meant` is the key that
    an unknown one may stand for.
    """

    key: str
    message: str
    change: Mapping[str, object] = field(default_factory=dict)
    advice: str = ""
    meant: str = ""

    @property
    def hint(self) -> str:
        """The change as a person reads it; the advice where there is none."""
        return self.remedy()

    def remedy(self, overridden: Collection[str] = ()) -> str:
        """Return the hint; keys that are `overridden` are changed on the command line."""
        if self.meant:
            return f"did you mean `{self.meant}`?"
        if not self.change:
            return self.advice
        steps = [_step(key, value, key in overridden) for key, value in self.change.items()]
        return " and ".join(steps) + (f" ({self.advice})" if self.advice else "")


def refusal(file: Path, faults: Sequence[Fault], overridden: Collection[str]) -> UsageError:
    """Return the error that names a config's faults: the first with its hint, then the others."""
    first, *others = faults
    more = f" (and {len(others)} more)" if others else ""
    lines = ["; ".join(filter(None, (fault.message, fault.remedy(overridden)))) for fault in others]
    return UsageError(f"{file}: {first.message}{more}", lines, hint=first.remedy(overridden))


def _step(key: str, value: object, overridden: bool) -> str:
    if overridden:
        # A word of the command line is read as text where its key takes text: no quotes.
        shown = value if isinstance(value, str) else written(value)
        return f"leave out `{key}=...`" if value is REMOVE else f"write `{key}={shown}`"
    return f"remove `{key}`" if value is REMOVE else f"write `{key}: {written(value)}`"


def written(value: object) -> str:
    """Return a value as YAML writes it: what is read from it is the value again."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    if isinstance(value, float) and "e" in (text := repr(value)):
        # YAML 1.1 wants a dot before the e.
        mantissa, _, exponent = text.partition("e")
        return f"{mantissa if '.' in mantissa else f'{mantissa}.0'}e{exponent}"
    if isinstance(value, str) and yaml.safe_load(value) != value:
        return f"'{value}'"
    return str(value)


def changed(values: Mapping[str, object], change: Mapping[str, object]) -> dict[str, object]:
    """Return a config's values with a change applied."""
    kept = {key: value for key, value in values.items() if change.get(key) is not REMOVE}
    return kept | {key: value for key, value in change.items() if value is not REMOVE}
