"""One rule about settings that exclude or need one another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tunesmith.plan.rules.fault import REMOVE, Fault
from tunesmith.plan.rules.settings import Settings

Change = Mapping[str, object]


@dataclass(frozen=True)
class Pair:
    """A rule: `broken` says whether a config breaks it, `change` how it no longer does."""

    key: str
    source: str
    broken: Callable[[Settings], bool]
    message: str
    change: Change | Callable[[Settings], Change]
    advice: str = ""

    def fault(self, settings: Settings) -> Fault:
        """Return the fault of a config that breaks the rule."""
        change = self.change if isinstance(self.change, Mapping) else self.change(settings)
        return Fault(self.key, self.message, change, self.advice)


def given(settings: Settings, *keys: str) -> Change:
    """Remove those of the keys that the config gives."""
    return {key: REMOVE for key in keys if key in settings.values}
