"""Models beside the base model that come from a hub, put into config and run.json.

Standard library only.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tunesmith.basemodel import kinds
from tunesmith.basemodel.store import ModelFolder
from tunesmith.job.run.config import put_name
from tunesmith.job.run.schema import Download, RunRequest, Values


def named_config(
    request: RunRequest, config: Values | None, item: Download, path: Path
) -> dict[str, Any]:
    """Return the config, of a prediction where there is no other, with a download's folder."""
    values = dict((request.predict or {}) if config is None else config)
    put_name(values, item.key, item.place, str(path))
    return values


def with_origin(request: RunRequest, item: Download, model: ModelFolder) -> RunRequest:
    """Return run.json with what a hub gave for one of its downloads."""
    origins = tuple(
        replace(
            origin,
            source=model.source,
            revision=model.revision,
            sha256=kinds.digest(model.files),
        )
        if (origin.key, origin.place) == (item.key, item.place)
        else origin
        for origin in request.origins
    )
    return replace(request, origins=origins)
