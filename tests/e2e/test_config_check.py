"""LLaMA-Factory's parser speaks first: before a download, a measurement, a training."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import cli
from jobs import Job
from tunesmith.cli.base_model import with_base_model
from tunesmith.cli.options import TRAIN_CONFIG
from tunesmith.core.errors import UsageError
from tunesmith.core.files import write_json
from tunesmith.job.run.codec import encode
from tunesmith.job.run.schema import FetchSpec
from tunesmith.plan import build
from tunesmith.plan.options import TrainOptions
from tunesmith.project import Project
from tunesmith.targets import factory

pytestmark = pytest.mark.e2e

REFUSED = (
    "`pure_bf16`: LLaMA-Factory says: This device does not support `pure_bf16`; "
    "write `pure_bf16: false` and write `bf16: true`"
)


def refused(job: Job, phases: tuple[str, ...], fetch: FetchSpec | None = None) -> Mapping[str, Any]:
    """Let a run fail; return its one failure. It was tried once."""
    request = replace(job.folder.request(), phases=phases, fetch=fetch)
    write_json(job.folder.request_file, encode(request))
    job.call("start")
    job.wait_for_end("failed")
    (failure,) = job.events("failure")
    assert failure["failure"] == job.folder.status().failure == "config"
    assert not job.events("restarting")
    return failure


def spec(name: str, folder: Path, root: Path) -> FetchSpec:
    return FetchSpec(
        name=name,
        revision=None,
        mirror="default",
        store=str(folder / "models"),
        configs=str(root / "configs"),
    )


def test_a_config_is_refused_before_its_model_is_downloaded(
    job: Job, tmp_path: Path, root: Path, data: Path
) -> None:
    job.make(tmp_path / "not here", data, pure_bf16=True)
    failure = refused(job, ("check", "fetch", "train"), spec("org/model", tmp_path, root))
    assert failure["phase"] == "check"
    assert failure["message"] == REFUSED
    assert [event["phase"] for event in job.events("phase_started")] == ["check"]


def test_where_the_model_lies_no_start_waits_and_the_training_asks(
    job: Job, tmp_path: Path, root: Path, tiny_model: Path, data: Path
) -> None:
    job.make(tiny_model, data, env={"HF_HOME": str(tmp_path / "hf")}, pure_bf16=True)
    failure = refused(job, ("check", "fetch", "train"), spec(str(tiny_model), tmp_path, root))
    assert failure["phase"] == "train"
    assert failure["message"] == REFUSED
    asked = {event["phase"]: event.get("asked") for event in job.events("summary")}
    assert asked["check"] is False


@pytest.mark.parametrize(
    ("processes", "config", "says"),
    [
        ("1", {"pure_bf16": True}, REFUSED),
        # What only several processes may not do, said by one of them.
        (
            "2",
            {"finetuning_type": "full", "use_badam": True},
            "`use_badam`: LLaMA-Factory says: Layer-wise BAdam only supports DeepSpeed ZeRO-3 "
            "training; remove `use_badam`",
        ),
    ],
)
def test_a_measurement_does_not_begin(
    job: Job, tmp_path: Path, data: Path, processes: str, config: dict[str, Any], says: str
) -> None:
    """The model is not even looked for."""
    job.make(tmp_path / "not here", data, env={"NPROC_PER_NODE": processes}, **config)
    failure = refused(job, ("before", "train"))
    assert failure["phase"] == "before"
    assert failure["message"] == says


def test_this_machine_asks_before_it_downloads(project: Project) -> None:
    words = ("model_name_or_path=org/not-there", "template=smollm", "pure_bf16=true")
    options = TrainOptions(config=Path(TRAIN_CONFIG), overrides=words)
    plan = build.plan_training(project, factory.target_of(project, "local", print), options)
    with pytest.raises(UsageError, match="`pure_bf16`: LLaMA-Factory says") as caught:
        with_base_model(project, plan, "default")
    assert caught.value.hint == "write `pure_bf16: false` and write `bf16: true`"


def test_a_check_names_what_runs_a_config_and_what_is_wrong_with_it(root: Path) -> None:
    done = cli.run(root, "check", TRAIN_CONFIG)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^parser  LLaMA-Factory 0.9.3 takes it \(.*\)$", done.stdout, re.MULTILINE)
    assert f"verb    `inv train --config {TRAIN_CONFIG}` runs it" in done.stdout
    done = cli.run(root, "check", "configs/merge/smollm2_135m_lora_sft.yaml", "vllm_config={bad")
    assert done.returncode == 2
    assert done.stderr.startswith("error: configs/merge/smollm2_135m_lora_sft.yaml: `vllm_config`")
    assert "hint: remove `vllm_config`" in done.stderr
