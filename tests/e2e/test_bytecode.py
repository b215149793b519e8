"""What jobs import has its bytecode from the installation on: no start compiles anything."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from jobs import STANDINS, Job
from tunesmith.core.files import write_json
from tunesmith.job.run.codec import encode
from tunesmith.project import Project
from tunesmith.stack import bytecode

pytestmark = pytest.mark.e2e


def test_no_job_imports_what_is_left_uncompiled(
    job: Job, tiny_model: Path, data: Path, tmp_path: Path, project: Project
) -> None:
    """Python keeps bytecode elsewhere here: there it makes that of each module it imports."""
    elsewhere = tmp_path / "bytecode"
    job.make(
        tiny_model,
        data,
        env={"STANDIN_BYTECODE": str(elsewhere)},
        standin=STANDINS / "bytecode_elsewhere.py",
        max_steps=6,
        preset="fast",
        val_size=0.2,
    )
    request = encode(job.folder.request()) | {
        "phases": ["before", "train", "after", "merge", "proof"],
        "prompts": [{"prompt": "Who are you?"}],
        "merge": {"infer_dtype": "float32"},
    }
    write_json(job.folder.request_file, request)
    job.call("start")
    job.wait_for_end("succeeded")
    cli = job.python.with_name("llamafactory-cli")
    variables = {"PYTHONPYCACHEPREFIX": str(elsewhere), "PYTHONDONTWRITEBYTECODE": ""}
    subprocess.run([cli, "version"], env={**os.environ, **variables}, check=True)

    packages = project.environment().packages
    compiled = {path.relative_to(packages) for path in bytecode.wanted(packages, ())}
    wanted = {
        path.relative_to(packages) for path in bytecode.wanted(packages, project.stack.uncompiled)
    }
    made = (path for path in elsewhere.rglob("*.cpython-310.pyc") if "site-packages" in path.parts)
    imported = {
        Path(str(path).split("/site-packages/")[1]).with_name(f"{path.name.split('.')[0]}.py")
        for path in made
    }
    assert len(imported) > 4000, "this is where Python made it"
    assert imported <= compiled
    assert sorted(map(str, imported - wanted)) == []
