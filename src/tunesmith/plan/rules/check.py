"""All rules together: what is wrong with a config, before anything is started."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from tunesmith.plan.rules import packages, pairs, ranges
from tunesmith.plan.rules.fault import Fault
from tunesmith.plan.rules.settings import Settings


def find(
    values: Mapping[str, object],
    schema: Mapping[str, object],
    installed: Collection[str],
    remedy: packages.Remedy = packages.no_remedy,
) -> list[Fault]:
    """Return the faults of a config whose keys and types are right, the first to mend first.

    `schema` is that of LLaMA-Factory's config (its `default`s count for keys that are absent),
    `installed` the names of the packages that the training environment has, `remedy` says how it
    gets one more.
    """
    properties = schema["properties"]
    assert isinstance(properties, Mapping)
    defaults = {key: rule.get("default") for key, rule in properties.items()}
    settings = Settings(values, defaults)
    return [
        *ranges.faults(settings),
        *pairs.faults(settings),
        *packages.faults(settings, installed, remedy),
    ]
