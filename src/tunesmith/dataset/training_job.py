"""Run a module of the job half on data, and hear of its progress."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tunesmith.core import isolated
from tunesmith.core.callbacks import OnBytes
from tunesmith.core.documents import JsonObject
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import read_json, write_json


def run_job(
    python: Path,
    environment: Mapping[str, str],
    module: str,
    request: JsonObject,
    progress: OnBytes | None = None,
    *,
    what: str = "data",
) -> JsonObject:
    """Return the result of MODULE on REQUEST and RESULT; `progress` gets (done, total).

    `what` the request is about stands in the error of a module that fails.

    Raises UsageError for what the module refuses, TunesmithError when it fails, with the end
    of what it wrote.
    """
    with tempfile.TemporaryDirectory(prefix="tunesmith-data-") as scratch:
        asked, result = Path(scratch) / "request.json", Path(scratch) / "result.json"
        log = Path(scratch) / "log"
        write_json(asked, dict(request))
        argv = isolated.argv(python, module, str(asked), str(result))
        variables = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
        with (
            log.open("wb") as complaints,
            subprocess.Popen(
                argv,
                stdout=subprocess.PIPE,
                stderr=complaints,
                # What a library leaves in its current folder goes with the rest.
                cwd=scratch,
                env=variables,
                text=True,
            ) as process,
        ):
            assert process.stdout is not None
            for line in process.stdout:
                if progress is not None and line.startswith('{"done"'):
                    told = json.loads(line)
                    progress(told["done"], told["total"])
        if process.returncode != 0:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            last = lines[-1] if lines else f"exit code {process.returncode}"
            raise TunesmithError(f"LLaMA-Factory stops at this {what}: {last[:300]}", lines[-12:])
        found: JsonObject = read_json(result)
    if "error" in found:
        raise UsageError(found["error"], hint=found.get("hint", ""))
    return found
