"""What a run on a host starts from: another run's result there, models and adapters of a hub.

The agent as a process; the fetch phase is real, training is not needed.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapter_files import HEAD, adapter_files, an_adapter
from agents import Agent
from hubserver import COMMIT, Hub, safetensors, tiny_model
from tunesmith.basemodel import kinds
from tunesmith.core.errors import UsageError
from tunesmith.core.files import write_json
from tunesmith.job.run import inputs, seals
from tunesmith.job.run.codec import decode, encode
from tunesmith.job.run.folder import RunFolder
from tunesmith.job.run.replies import Manifest
from tunesmith.job.run.schema import Download, Origin
from tunesmith.plan.plan import Link
from tunesmith.targets import delivery

pytestmark = pytest.mark.contract


def trained(agent: Agent) -> RunFolder:
    """Make the run `sft` with an adapter, sealed as its training leaves it."""
    run = agent.create("sft", {"phases": ["train"]}, {"output_dir": str(agent.runs / "sft/output")})
    an_adapter(run.output)
    seals.seal(run.path, "train", ("output",))
    write_json(run.status_file, {"run_id": "sft", "state": "succeeded"})
    return run


LINK = Link(
    "adapter_name_or_path/0",
    "sft",
    "output",
    Origin("adapter_name_or_path", "run:sft", run="sft", result="output"),
)


def test_a_result_that_lies_there_is_linked_compared_and_recorded(agent: Agent) -> None:
    run = trained(agent)
    listed = decode(Manifest, agent.ask("manifest", "sft", "--what", "adapter"))
    files = delivery.linked(LINK, listed, agent.runs)
    second = replace(LINK, name="adapter_name_or_path/1")
    files |= delivery.linked(second, listed, agent.runs)
    folder, other = (agent.runs / "on/inputs/adapter_name_or_path" / n for n in ("0", "1"))
    order = {
        "run_id": "on",
        "request": {"phases": []},
        "config": {"adapter_name_or_path": f"{folder},{other}"},
        "inputs": encode(files),
    }
    agent.ask("create", stdin=order)
    assert agent.folder("on").config()["adapter_name_or_path"] == f"{folder},{other}"
    weights = folder / "adapter_model.safetensors"
    assert weights.stat().st_nlink == 3, "a model is not copied"
    request = agent.folder("on").request()
    found = request.inputs[inputs.TRAIN].files
    record = found[str(weights)]
    assert found[str(other / weights.name)] == record, "each of several is compared"
    assert record.adapter
    assert record.sha256 == listed.files["output/adapter_model.safetensors"].sha256
    # The run it came from may go.
    agent.ask("remove", "sft")
    assert not run.path.exists()
    inputs.check_data(agent.folder("on").path, request, inputs.TRAIN)


def test_a_result_that_changed_there_is_not_linked(agent: Agent) -> None:
    run = trained(agent)
    file = run.output / "adapter_model.safetensors"
    file.write_bytes(adapter_files(seed=1)["adapter_model.safetensors"])
    told = agent.ask("manifest", "sft", "--what", "adapter", code=2)["error"]
    assert "output/adapter_model.safetensors" in told
    assert "expected sha256" in told


def fetching(agent: Agent, hub: Hub, run_id: str, **config: Any) -> RunFolder:
    """Make and end a run that fetches its base model and what its config names beside it."""
    wanted = {
        "adapter_name_or_path": "adapter",
        "ref_model": "model",
        "reward_model": "reward_model",
    }
    named = {key: kind for key, kind in wanted.items() if key in config}
    run = agent.create_fetch(
        run_id,
        hub,
        config={"model_name_or_path": "org/tiny", "reward_model_type": "full", **config},
        downloads=[encode(Download(key, config[key], kind)) for key, kind in named.items()],  # type: ignore[arg-type]
        origins=[encode(Origin(key, config[key])) for key in named],
    )
    agent.ask("start", run_id)
    return run


def test_models_and_adapters_of_a_hub_are_fetched_proven_and_recorded(
    agent: Agent, hub: Hub
) -> None:
    hub.add("org/adapter", {**adapter_files(), "adapter_model.bin": b"a pickle", "x.py": b"code"})
    hub.add("org/judge", {**tiny_model(), "value_head.safetensors": safetensors(HEAD)})
    names = {
        "adapter_name_or_path": "org/adapter",
        "ref_model": "org/tiny",
        "reward_model": "org/judge",
    }
    run = fetching(agent, hub, "one", **names)
    agent.wait_for("one", "succeeded")
    config, request = run.config(), run.request()
    folders = {key: Path(config[key]) for key in names}
    assert sorted(path.name for path in folders["adapter_name_or_path"].iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert (folders["reward_model"] / "value_head.safetensors").is_file()
    assert folders["ref_model"] == Path(config["model_name_or_path"])
    files = request.inputs[inputs.TRAIN].files
    for key, folder in folders.items():
        [origin] = [item for item in request.origins if item.key == key]
        own = {Path(n).name: r for n, r in files.items() if Path(n).parent == folder}
        assert (origin.source, origin.revision) == (f"hub:{hub.url}", COMMIT)
        assert origin.sha256 == kinds.digest(own)
        assert {record.adapter for record in own.values()} == {key == "adapter_name_or_path"}
    inputs.check_data(run.path, request, inputs.TRAIN)
    # Again, as a resume does it: what is there costs nothing and changes nothing.
    hub.seen.clear()
    agent.ask("start", "one", "fetch")
    agent.wait_for("one", "succeeded")
    assert (run.config(), run.request(), hub.seen) == (config, request, [])
    weights = folders["reward_model"] / "value_head.safetensors"
    blob = weights.resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    with pytest.raises(UsageError, match=r"value_head\.safetensors: changed since run one"):
        inputs.check_data(run.path, request, inputs.TRAIN)


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (tiny_model(), "adapter_config.json: missing"),
        (adapter_files(auto_mapping={"x": "y"}), "names code"),
        ({**adapter_files(), "adapter_model.safetensors": safetensors({"a": (1,)})}, "no tensors"),
        (
            {
                **adapter_files(),
                "adapter_model.safetensors": safetensors(
                    {
                        "base_model.model.a.lora_A.weight": (4, 128),
                        "base_model.model.a.lora_B.weight": (64, 4),
                    }
                ),
            },
            "does not fit base model",
        ),
    ],
    ids=["a model", "code", "no tensors", "another base"],
)
def test_what_a_hub_gives_is_refused_before_anything_is_trained(
    agent: Agent, hub: Hub, files: dict[str, bytes], told: str
) -> None:
    hub.add("org/adapter", files)
    run = fetching(agent, hub, "one", adapter_name_or_path="org/adapter")
    status = agent.wait_for("one", "failed")
    assert status.failure == "model"
    text = " ".join([str(status.message), *status.detail])
    assert told in text, text
    assert json.loads(run.request_file.read_text())["origins"] == [
        {"key": "adapter_name_or_path", "written": "org/adapter"}
    ]


def test_a_reward_model_without_a_value_head_is_refused(agent: Agent, hub: Hub) -> None:
    hub.add("org/judge", tiny_model())
    fetching(agent, hub, "one", reward_model="org/judge")
    status = agent.wait_for("one", "failed")
    assert "value_head.safetensors: missing" in " ".join([str(status.message), *status.detail])
