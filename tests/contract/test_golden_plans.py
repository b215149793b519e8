"""What a training is planned to be, for inputs that matter: tests/golden/plans.

Each file has what was asked and all that follows from it: the phases, the exact config, each key
decided for the user and why, what run.json says, the disk that is needed, the text of
`inv --dry train`. What differs between machines has a word in angle brackets.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from golden import golden
from tunesmith.basemodel.files import FileRecord, tensor_shapes
from tunesmith.basemodel.judge import Machine
from tunesmith.basemodel.store import ModelFolder
from tunesmith.job.run.codec import encode
from tunesmith.plan import build
from tunesmith.plan.options import TrainOptions
from tunesmith.project import Project
from tunesmith.targets.local import LocalTarget

pytestmark = pytest.mark.contract

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "tests" / "golden" / "plans").glob("*.yml"))


class Known(LocalTarget):
    """This machine, with a memory that does not depend on where the tests run."""

    def machine(self) -> Machine:
        """Return the memory of a large one."""
        return Machine(ram=64 * 10**9)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_plan(file: Path, tmp_path: Path) -> None:
    given = golden.load(file)["given"]
    project = Project(ROOT, tmp_path / "home")
    config = ROOT / given["config"]
    if not config.is_file():
        config = tmp_path / "config.yaml"
        config.write_text(given["config"], encoding="utf-8")
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in given["options"].items()}
    if "prompts" in options:
        options["prompts"] = ROOT / options["prompts"]
    model = a_model(tmp_path / "model", given["model"]) if "model" in given else None
    chosen = TrainOptions(config=config, run_id="r1", **options)
    plan = build.plan_training(project, Known(project), chosen)
    if model:
        plan = plan.with_model(model, tensor_shapes(model.path))

    def neutral(text: str) -> str:
        # Longest first: the home lies in the folder of the test.
        names = {project.home: "<home>", tmp_path: "<folder>", ROOT: "<clone>"}
        for path, name in names.items():
            text = text.replace(str(path), name)
        text = text.replace(str((plan.request.env or {})["TUNESMITH_LOCK_SHA256"]), "<sha256>")
        return text.replace(str(plan.request.created), "<now>")

    described = dataclasses.asdict(plan)
    # It is in the config, the environment and the text.
    for name in ("location", "config", "managed", "request"):
        described.pop(name)
    found = {"config": plan.config, **described, "request": encode(plan.request)}
    as_json = json.dumps(found, default=str, ensure_ascii=False)
    golden.hold(
        file,
        plan=json.loads(neutral(as_json)),
        shown=neutral(plan.render()) + "\n",
    )


def a_model(folder: Path, shapes: dict[str, list[Any]]) -> ModelFolder:
    """Make a base model of tensors with these dtypes and shapes, all zeros (not written)."""
    folder.mkdir()
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in shapes.items():
        size = 2
        for side in shape:
            size *= side
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    weights = folder / "model.safetensors"
    with weights.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    record = FileRecord(size=weights.stat().st_size, sha256="0" * 64)
    files = {weights.name: record}
    return ModelFolder("some/model", folder, "folder", None, files, fetched=False)
