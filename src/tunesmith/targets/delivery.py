"""What of other runs goes into a new run on a host: compared, linked there, and recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePosixPath

from tunesmith.basemodel import kinds
from tunesmith.core.errors import UsageError
from tunesmith.job.run.replies import Manifest, UploadedFile
from tunesmith.job.run.run_id import RunId
from tunesmith.job.run.schema import RunRequest
from tunesmith.plan.plan import Link


def linked(link: Link, manifest: Manifest, runs: PurePosixPath) -> dict[str, UploadedFile]:
    """Return the files of another run's result as they lie on the host, by name below inputs.

    `manifest` is the host's list of them, which it has compared with their seals. Raises UsageError
    where it lists none.
    """
    prefix = f"{link.folder}/"
    below = {
        name.removeprefix(prefix): file
        for name, file in manifest.files.items()
        if name.startswith(prefix)
    }
    chosen = kinds.choose("reward_model", below)
    if not chosen:
        raise UsageError(
            f"run {link.run_id}: its folder {link.folder} is empty there",
            hint="`inv runs --on all` shows where else the run lies",
        )
    run = runs / RunId(link.run_id)
    return {
        f"{link.name}/{name}": UploadedFile(
            below[name].path or str(run / link.folder / name), below[name].size, below[name].sha256
        )
        for name in chosen
    }


def with_digest(request: RunRequest, link: Link, files: Mapping[str, UploadedFile]) -> RunRequest:
    """Return run.json with the digest of a result that was linked."""
    found = {PurePosixPath(name).name: record for name, record in files.items()}
    origins = tuple(
        replace(origin, sha256=kinds.digest(found)) if origin == link.origin else origin
        for origin in request.origins
    )
    return replace(request, origins=origins)
