"""Runs uv, which resolves locks and makes environments."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

from tunesmith.core.errors import TunesmithError
from tunesmith.core.mirrors import Mirror

# What of uv's words an error shows.
_LINES = 20


def run(
    arguments: Sequence[str], mirror: Mirror | None = None, *, inherited: int | None = None
) -> None:
    """Run uv with each index of the mirror until one works.

    It holds the lock `inherited` while it lives, though we may be killed. Raises TunesmithError
    with its words when it fails with all of them.
    """
    from uv import find_uv_bin  # not in the image, which never builds environments

    environment = dict(os.environ)
    # Only our options apply, not those of an active environment or a project.
    environment.pop("VIRTUAL_ENV", None)
    environment["UV_NO_CONFIG"] = "1"
    # DeepSpeed's kernels are compiled when a run asks for one, not for every run beforehand.
    environment["DS_BUILD_OPS"] = "0"
    own_index = environment.get("UV_DEFAULT_INDEX")
    indexes = (own_index,) if own_index or mirror is None else mirror.pypi_indexes
    said: list[str] = []
    for index in indexes:
        if index:
            environment["UV_DEFAULT_INDEX"] = index
        done = subprocess.run(
            # Who called shows how long it takes; a list of 145 packages says nothing more.
            [find_uv_bin(), "--quiet", *arguments],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
            pass_fds=() if inherited is None else (inherited,),
        )
        if done.returncode == 0:
            return
        said += done.stderr.splitlines()[-_LINES:]
    raise TunesmithError(
        f"`uv {' '.join(arguments[:2])}` failed with exit code {done.returncode}",
        said,
        hint="if an index is slow or blocked, use `--mirror cn`",
    )
