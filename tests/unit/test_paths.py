"""Keys of a config that name files, folders, models and adapters: found, refused, staged."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapter_files import HEAD, a_model, adapter_files, an_adapter, put
from hubserver import safetensors
from standins.bare_target import BareTarget
from tunesmith.basemodel import kinds
from tunesmith.basemodel.store import ModelFolder
from tunesmith.cli.container_runs import identity
from tunesmith.core.errors import UsageError
from tunesmith.core.files import sha256_of, write_json
from tunesmith.job.merge.adapter import check_start
from tunesmith.job.run import config as run_config
from tunesmith.job.run import foreign, inputs, seals
from tunesmith.job.run.codec import encode
from tunesmith.job.run.folder import COPY_FILE, RunFolder
from tunesmith.job.run.replies import ListedFile, Manifest
from tunesmith.job.run.schema import (
    Download,
    FileRecord,
    ListedRun,
    ModelRef,
    Origin,
    RunRequest,
)
from tunesmith.plan import models, paths
from tunesmith.plan.config import Config
from tunesmith.plan.plan import Input, Plan, RunLocation
from tunesmith.plan.staging import stage_inputs
from tunesmith.plan.target import Target
from tunesmith.project import Project
from tunesmith.targets import delivery
from tunesmith.targets.container import input_folders

pytestmark = pytest.mark.unit

FILE = Path("my.yaml")


class Here(BareTarget):
    """Like this machine: what lies here is read where it lies."""

    def remote_path(self, run_id: str, name: str, path: Path) -> str:
        """Return the path as it is."""
        return str(path)


class Host(BareTarget):
    """Like a host: shared, with the run r1 on it."""

    shared = True

    def config(self, run_id: str) -> dict[str, Any]:
        """Return what the run's config says."""
        return {"template": "smollm", "output_dir": f"/bare/runs/{run_id}/output"}

    def status(self, run_id: str) -> ListedRun:
        """Return how far it is."""
        return ListedRun(run_id=run_id, state="succeeded", phases={"train": "succeeded"})


@pytest.fixture
def project(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    # Relative paths are those of where the user stands.
    folder = tmp_path / "stand"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return Project(root, tmp_path / "home")


def settled(
    project: Project, target: Target | None = None, **values: Any
) -> tuple[dict[str, Any], tuple[models.Named, ...]]:
    """Settle a config's models; return its values and what they name."""
    given = {"model_name_or_path": "org/base", "template": "smollm", **values}
    left = dict(given)
    named, _ = models.settle(project, target or Here(), Config(FILE, given, {}), left)
    return left, named


def a_run(project: Project, run_id: str, **told: Any) -> RunFolder:
    """Make a run whose training has succeeded: its adapter, sealed."""
    phases = told.pop("phases", {"train": "succeeded"})
    run = RunFolder(project.runs / run_id)
    an_adapter(run.output)
    config = {
        "template": "smollm",
        "output_dir": str(run.output),
        "finetuning_type": "lora",
        **told,
    }
    write_json(run.config_file, config)  # JSON is YAML
    request = RunRequest(run_id=run_id, model=ModelRef("org/base"))
    write_json(run.request_file, encode(request))
    write_json(run.status_file, {"run_id": run_id, "state": "succeeded", "phases": phases})
    seals.seal(run.path, "train", ("output",))
    return run


def merged(run: RunFolder) -> RunFolder:
    """Give a run its merged model, proven."""
    a_model(run.path / "merged")
    seals.seal(run.path, "merge", ("merged",))
    phases = dict.fromkeys(("train", "merge", "proof"), "succeeded")
    write_json(run.status_file, {"run_id": run.run_id, "state": "succeeded", "phases": phases})
    return run


def test_folders_are_relative_to_where_the_user_stands(project: Project) -> None:
    one, two = an_adapter(Path("one")), an_adapter(Path("deep/two"))
    values, named = settled(project, adapter_name_or_path="one, ./deep/two")
    assert values["adapter_name_or_path"] == f"{one.absolute()},{two.absolute()}"
    assert [item.name for item in named] == ["adapter_name_or_path/0", "adapter_name_or_path/1"]


def test_a_hubs_name_stays_one_and_is_fetched(project: Project) -> None:
    an_adapter(Path("one"))
    asked = {"stage": "dpo", "ref_model": "org/reference", "adapter_name_or_path": "one,org/x"}
    values, named = settled(project, **asked)
    assert values["ref_model"] == "org/reference"
    assert [item.download for item in named] == [
        None,
        Download("adapter_name_or_path", "org/x", "adapter", 1),
        Download("ref_model", "org/reference", "model"),
    ]


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"reward_model": "org/x"}, [("reward_model", "reward_adapter")]),
        (
            {"reward_model": "org/x", "reward_model_type": "full"},
            [("reward_model", "reward_model")],
        ),
        ({"reward_model": "http://x/y", "reward_model_type": "api"}, []),
        (
            {
                "reward_model": "org/x",
                "reward_model_type": "full",
                "reward_model_adapters": "org/y,org/z",
            },
            [
                ("reward_model", "model"),
                ("reward_model_adapters", "adapter"),
                ("reward_model_adapters", "reward_adapter"),
            ],
        ),
    ],
)
def test_what_a_reward_model_must_be(
    project: Project, values: dict[str, str], wanted: list[tuple[str, str]]
) -> None:
    _, named = settled(project, stage="ppo", **values)
    assert [(item.key, item.kind) for item in named] == wanted


def test_what_the_stage_does_not_read_is_left_alone(project: Project) -> None:
    values, named = settled(project, stage="sft", ref_model="no where", reward_model="nor here")
    assert (named, values["ref_model"]) == ((), "no where")


@pytest.fixture
def kept(project: Project) -> Path:
    """One folder of each kind, where the user stands."""
    a_model(Path("model"))
    an_adapter(Path("adapter"))
    an_adapter(Path("code"), auto_mapping={"x": 1})
    put(
        Path("pickled"),
        {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.bin": b"x"},
    )
    cut = adapter_files()
    cut["adapter_model.safetensors"] = cut["adapter_model.safetensors"][:-1]
    put(Path("cut"), cut)
    put(Path("ia3"), {**adapter_files(), "adapter_config.json": b'{"peft_type": "IA3"}'})
    own = {"model_type": "someones", "architectures": ["X"], "auto_map": {"AutoModel": "x.Y"}}
    put(a_model(Path("own code")), {"config.json": json.dumps(own).encode()})
    Path("model.gguf").write_bytes(b"GGUF")
    (Path("saves")).mkdir()
    return Path.cwd()


@pytest.mark.parametrize(
    ("values", "told", "hint"),
    [
        ({"adapter_name_or_path": "./nowhere"}, "no such folder", "name an adapter"),
        ({"adapter_name_or_path": "saves/sft"}, "no such folder", "name an adapter"),
        ({"adapter_name_or_path": "nowhere"}, "neither a folder here nor a hub's", "owner/name"),
        ({"adapter_name_or_path": "adapter,,adapter"}, "an empty name in it", "name an adapter"),
        ({"adapter_name_or_path": "model"}, "a whole model", "`model_name_or_path: model`"),
        ({"model_name_or_path": "adapter"}, "an adapter", "`adapter_name_or_path: adapter`"),
        ({"model_name_or_path": "./model.gguf"}, "a GGUF file", "name what it was made from"),
        ({"model_name_or_path": "./nowhere"}, "no such folder", "name a base model"),
        (
            {"model_name_or_path": "own code"},
            "asks for code of its author",
            "trust_remote_code=true",
        ),
        ({"adapter_name_or_path": "adapter/adapter_config.json"}, "a file, a folder", "name an"),
        ({"adapter_name_or_path": "code"}, "auto_mapping is set, which names code", "name an"),
        ({"adapter_name_or_path": "pickled"}, "can run code when loaded", "name an adapter"),
        ({"adapter_name_or_path": "cut"}, "is cut", "name an adapter"),
        ({"adapter_name_or_path": "ia3"}, "peft_type is 'IA3'", "name an adapter"),
        (
            {"adapter_name_or_path": ".", "adapter_folder": "adapter"},
            "`adapter_folder` is adapter",
            "`adapter_name_or_path: ./adapter`",
        ),
        (
            {"adapter_name_or_path": "org/x", "adapter_folder": "inner"},
            "`adapter_folder` is inner",
            "name a copy of the folder inner",
        ),
        (
            {"adapter_name_or_path": "adapter", "adapter_folder": "x"},
            "`adapter_folder` is x",
            "`adapter_name_or_path: adapter/x`",
        ),
        ({"stage": "dpo", "ref_model": "adapter"}, "an adapter", "`ref_model_adapters: adapter`"),
        (
            {"stage": "dpo", "ref_model": "model", "ref_model_adapters": "code"},
            "names code",
            "name an adapter",
        ),
        ({"stage": "ppo", "reward_model": "adapter"}, "value_head.safetensors: missing", "reward"),
        ({"stage": "ppo", "reward_model": "model"}, "a whole model", "`reward_model_type: full`"),
        (
            {"stage": "ppo", "reward_model": "model", "reward_model_type": "full"},
            "value_head.safetensors: missing",
            "name a reward model",
        ),
        ({"adapter_name_or_path": "run:nix"}, "no run", "inv "),
        ({"adapter_name_or_path": "run:../x"}, "run id", ""),
    ],
)
def test_what_is_not_what_its_key_asks_for_is_refused(
    project: Project, kept: Path, values: dict[str, str], told: str, hint: str
) -> None:
    with pytest.raises(UsageError) as caught:
        settled(project, **values)
    message = str(caught.value.message)
    [(key, value)] = [(k, v) for k, v in values.items() if f"my.yaml: `{k}` is " in message]
    assert message.startswith(
        (f"my.yaml: `{key}` is {value}: ", f"my.yaml: `{key}` is '{value}': ")
    )
    assert told in message
    assert hint in str(caught.value.hint or ""), caught.value.hint


def test_a_path_with_a_comma_is_linked_as_the_hint_says(project: Project, tmp_path: Path) -> None:
    odd = Project(project.root, project.home / "a,b")
    run = a_run(odd, "sft")
    with pytest.raises(UsageError, match="splits it at the comma") as caught:
        settled(odd, adapter_name_or_path="run:sft")
    [command] = re.findall(r"`(ln .*?)`", str(caught.value.hint))
    subprocess.run(shlex.split(command), check=True)
    values, _ = settled(odd, adapter_name_or_path="./adapter")
    assert Path(values["adapter_name_or_path"]).resolve() == run.output


def test_the_result_of_a_run_here(project: Project) -> None:
    run = merged(a_run(project, "sft"))
    values, [named] = settled(project, adapter_name_or_path="run:sft")
    assert values["adapter_name_or_path"] == str(run.output)
    records = {
        path.name: FileRecord(path.stat().st_size, sha256_of(path)) for path in run.output.iterdir()
    }
    assert named.origin == Origin(
        "adapter_name_or_path",
        "run:sft",
        run="sft",
        result="output",
        sha256=kinds.digest(records),
    )
    assert models.known([named]) == {run.output / name: r for name, r in records.items()}
    asked = {"stage": "dpo", "model_name_or_path": "run:sft", "ref_model": "run:sft"}
    values, both = settled(project, **asked)
    assert values["model_name_or_path"] == values["ref_model"] == str(run.path / "merged")
    assert [item.origin.result for item in both] == ["merged", "merged"]


@pytest.mark.parametrize(
    ("made", "values", "told", "hint"),
    [
        (
            {"phases": {"train": "stopped"}},
            {"adapter_name_or_path": "run:sft"},
            "its training is stopped",
            "`inv resume --run sft`",
        ),
        (
            {"phases": {}},
            {"adapter_name_or_path": "run:sft"},
            "its training is not started",
            "`inv resume --run sft`",
        ),
        ({}, {"model_name_or_path": "run:sft"}, "no merged model", "`inv merge --run sft`"),
        (
            {"phases": {"train": "succeeded", "merge": "succeeded", "proof": "failed"}},
            {"model_name_or_path": "run:sft"},
            "no merged model that was proven",
            "`inv merge --run sft`",
        ),
        (
            {"finetuning_type": "full"},
            {"adapter_name_or_path": "run:sft"},
            "its result is a whole model",
            "`model_name_or_path: run:sft`",
        ),
        (
            {"adapter_name_or_path": "/x", "create_new_adapter": True},
            {"adapter_name_or_path": "run:sft"},
            "its result is 2 adapters",
            "`model_name_or_path: run:sft`",
        ),
        (
            {},
            {"adapter_name_or_path": "run:sft", "model_name_or_path": "org/other"},
            "which was trained on org/base",
            "`model_name_or_path: org/base`",
        ),
    ],
)
def test_a_run_without_such_a_result_is_refused(
    project: Project, made: dict[str, Any], values: dict[str, str], told: str, hint: str
) -> None:
    a_run(project, "sft", **made)
    with pytest.raises(UsageError) as caught:
        settled(project, **values)
    key = next(iter(values))
    assert caught.value.message.startswith(f"my.yaml: `{key}` is run:sft")
    assert told in caught.value.message
    assert hint in str(caught.value.hint)


def test_a_run_of_another_template_is_refused_and_taken_when_insisted(project: Project) -> None:
    merged(a_run(project, "sft", template="llama3"))
    for key in ("model_name_or_path", "adapter_name_or_path"):
        with pytest.raises(UsageError, match="`template` is smollm, but run sft was") as caught:
            settled(project, **{key: "run:sft"})
        assert "`template: llama3`" in str(caught.value.hint)
        settled(project, **{key: "run:sft", "template": "llama3"})
        # What would be read from the model instead may be another one.
        with pytest.raises(UsageError, match="`template` is missing, but run sft was") as caught:
            settled(project, **{key: "run:sft", "template": None})
        assert caught.value.hint == "write `template: llama3`"
    given = {"adapter_name_or_path": "run:sft", "model_name_or_path": "org/base"}
    insisted = Config(FILE, {**given, "template": "smollm"}, {"template": "smollm"})
    models.settle(project, Here(), insisted, dict(insisted.values))


def test_a_merged_model_that_needs_code_is_not_loaded(project: Project) -> None:
    """A pulled run is a host's data: of its merged model, too."""
    run = merged(a_run(project, "sft"))
    own = {"model_type": "someones", "architectures": ["X"], "auto_map": {"AutoModel": "x.Y"}}
    put(run.path / "merged", {"config.json": json.dumps(own).encode()})
    with pytest.raises(UsageError, match="asks for code of its author"):
        settled(project, stage="dpo", ref_model="run:sft")


def test_an_adapter_is_held_against_its_base_where_that_can_be_compared(project: Project) -> None:
    base, own = a_model(Path("base")), an_adapter(Path("own"))
    check_start(base, [own])
    other = put(
        Path("other"),
        {
            **adapter_files(),
            "adapter_model.safetensors": safetensors(
                {
                    "base_model.model.a.lora_A.weight": (4, 128),
                    "base_model.model.a.lora_B.weight": (64, 4),
                }
            ),
        },
    )
    with pytest.raises(UsageError, match="does not fit base model"):
        check_start(base, [own, other])
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    check_start(base, [other])


def test_a_pulled_run_that_lacks_its_result_names_the_pull(project: Project) -> None:
    run = a_run(project, "sft")
    request = replace(run.request(), phases=("train",))
    write_json(run.request_file, encode(request))
    write_json(run.path / COPY_FILE, {"from": "gpu1", "files": {}})
    (run.output / "adapter_model.safetensors").unlink()
    with pytest.raises(UsageError) as caught:
        settled(project, adapter_name_or_path="run:sft")
    assert "`inv pull --on gpu1 --run sft --what adapter`" in str(caught.value.hint)


def test_a_run_of_the_host_is_used_there(project: Project) -> None:
    values, named = settled(project, Host(), adapter_name_or_path="run:r1")
    staged = stage_inputs(Host(), "new", values, (), named)
    assert staged.inputs == ()
    [link] = staged.links
    assert (link.name, link.run_id, link.folder) == ("adapter_name_or_path/0", "r1", "output")
    assert values["adapter_name_or_path"] == "/bare/runs/new/inputs/adapter_name_or_path/0"
    with pytest.raises(UsageError, match="no merged model") as caught:
        settled(project, Host(), model_name_or_path="run:r1")
    assert "`inv merge --on bare --run r1`" in str(caught.value.hint)


def test_a_run_of_this_machine_goes_to_a_host(project: Project) -> None:
    run = a_run(project, "sft")
    (run.output / "training_args.bin").write_bytes(b"a pickle")
    (run.output / "evil.py").write_bytes(b"code")
    values, named = settled(project, Host(), adapter_name_or_path="run:sft")
    staged = stage_inputs(Host(), "new", values, (), named)
    names = ("adapter_config.json", "adapter_model.safetensors")
    assert staged.inputs == tuple(
        Input(f"adapter_name_or_path/0/{name}", run.output / name) for name in names
    )
    assert values["adapter_name_or_path"] == "/bare/runs/new/inputs/adapter_name_or_path/0"


def test_models_and_files_go_to_a_host(project: Project) -> None:
    a_model(Path("base"))
    put(a_model(Path("judge")), {"value_head.safetensors": safetensors(HEAD)})
    Path("ds.json").write_text("{}")
    tokens = Path("tokens")
    tokens.mkdir()
    (tokens / "dataset_dict.json").write_text("{}")
    asked: dict[str, Any] = {
        "stage": "ppo",
        "model_name_or_path": "./base",
        "reward_model": "./judge",
        "reward_model_type": "full",
        "ref_model": "org/reference",
        "deepspeed": str(Path("ds.json").absolute()),
        "fsdp_config": {"a": 1},
        "tokenized_path": str(tokens.absolute()),
    }
    values, named = settled(project, Host(), **asked)
    staged = stage_inputs(Host(), "new", values, (), named)
    there = "/bare/runs/new/inputs"
    assert values["model_name_or_path"] == f"{there}/model_name_or_path"
    assert values["reward_model"] == f"{there}/reward_model"
    assert values["ref_model"] == "org/reference"
    assert values["deepspeed"] == f"{there}/deepspeed"
    assert values["fsdp_config"] == {"a": 1}
    assert values["tokenized_path"] == f"{there}/tokenized_path/tokens"
    sent = {item.name for item in staged.inputs}
    assert {"reward_model/value_head.safetensors", "model_name_or_path/model.safetensors"} <= sent
    assert {"deepspeed/ds.json", "tokenized_path/tokens/dataset_dict.json"} <= sent


def test_a_folder_that_only_a_host_has_stays_its_base_model(project: Project) -> None:
    values, named = settled(project, Host(), model_name_or_path="/srv/models/only there")
    assert (values["model_name_or_path"], named) == ("/srv/models/only there", ())
    with pytest.raises(UsageError, match="no such folder"):
        settled(project, Host(), model_name_or_path="./only there")


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("deepspeed", "no.json", "no such file"),
        ("fsdp_config", "bad.json", "not JSON"),
        ("accelerator_config", "list.json", "must hold a JSON object, found list"),
        ("deepspeed", ".", "cannot be read"),
        ("deepspeed", '{"a": ', "not JSON"),
        ("media_dir", "nowhere", "no such folder"),
        ("media_dir", "bad.json", "a file, a folder expected"),
        ("tokenized_path", "full", "no tokenised data set"),
        ("cache_dir", "bad.json", "a file, a folder expected"),
        ("export_quantization_dataset", "no.json", "no such file"),
    ],
)
def test_files_that_are_not_what_their_key_asks_for(
    project: Project, key: str, value: str, told: str
) -> None:
    Path("bad.json").write_text("{")
    Path("list.json").write_text("[1]")
    put(Path("full"), {"notes.txt": b"x"})
    given = value if value.startswith("{") else str(Path(value).absolute())
    with pytest.raises(UsageError) as caught:
        paths.check(FILE, {key: given})
    assert caught.value.message.startswith(f"my.yaml: `{key}` is {given}: ")
    assert told in caught.value.message
    assert caught.value.hint


def test_files_that_are(project: Project) -> None:
    Path("good.json").write_text('{"a": 1}')
    put(Path("tokens"), {"state.json": b"{}"})
    (Path("empty")).mkdir()
    here = {name: str(Path(name).absolute()) for name in ("good.json", "tokens", "empty", "new")}
    for values in (
        {"deepspeed": here["good.json"], "fsdp_config": {"x": 1}, "accelerator_config": '{"y": 2}'},
        {"tokenized_path": here["tokens"], "cache_dir": here["new"], "media_dir": here["empty"]},
        {"tokenized_path": here["new"]},
        {"tokenized_path": here["empty"], "export_quantization_dataset": "c4"},
    ):
        paths.check(FILE, values)


def test_every_file_of_a_model_key_is_recorded_and_compared(project: Project) -> None:
    a_model(Path("model"))
    put(an_adapter(Path("judge")), {"value_head.safetensors": safetensors(HEAD)})
    for name in ("ds", "fsdp", "accelerator"):
        Path(f"{name}.json").write_text("{}")
    config = {
        "output_dir": str(Path("run/output").absolute()),
        "ref_model": str(Path("model").absolute()),
        "ref_model_adapters": str(an_adapter(Path("below")).absolute()),
        "reward_model": str(Path("judge").absolute()),
        "deepspeed": str(Path("ds.json").absolute()),
        "fsdp_config": str(Path("fsdp.json").absolute()),
        "accelerator_config": str(Path("accelerator.json").absolute()),
    }
    known = {Path("model/model.safetensors").absolute(): FileRecord(7, "0" * 64)}
    request = inputs.recorded(RunRequest(), config, known)
    found = request.inputs[inputs.TRAIN].files
    names = {os.path.relpath(name) for name in found}
    assert {"model/model.safetensors", "model/config.json", "judge/value_head.safetensors"} <= names
    assert {"below/adapter_model.safetensors", "ds.json", "fsdp.json", "accelerator.json"} <= names
    assert found[str(Path("model/model.safetensors").absolute())].sha256 == "0" * 64
    run = Path("run")
    run.mkdir()
    request = inputs.recorded(RunRequest(), config)
    write_json(run / "run.json", {})
    inputs.check_data(run, request, inputs.TRAIN)
    for name in ("judge/value_head.safetensors", "fsdp.json", "model/model.safetensors"):
        content = Path(name).read_bytes()
        Path(name).write_bytes(content + b" ")
        with pytest.raises(UsageError, match="changed since run"):
            inputs.check_data(run, request, inputs.TRAIN)
        Path(name).write_bytes(content)


def test_a_download_takes_its_place_in_config_and_record(project: Project) -> None:
    one, two = (
        Download("adapter_name_or_path", "org/a", "adapter", 1),
        Download("ref_model", "org/r"),
    )
    request = RunRequest(
        origins=(Origin("adapter_name_or_path", "org/a", 1), Origin("ref_model", "org/r"))
    )
    config = {"adapter_name_or_path": "/here,org/a", "ref_model": "org/r"}
    plan = Plan(RunLocation(Path("/r"), Path("/p"), {}), (), request, config, downloads=(one, two))
    files = {"model.safetensors": FileRecord(1, "1" * 64)}
    folder = ModelFolder("org/a", Path("/cache, a"), "hub:https://h", "c0ffee", files, fetched=True)
    plan = plan.with_download(one, replace(folder, path=Path("/a")))
    plan = plan.with_download(two, folder)
    assert plan.downloads == ()
    assert plan.config == {"adapter_name_or_path": "/here,/a", "ref_model": "/cache, a"}
    assert [(o.source, o.revision) for o in plan.request.origins] == [
        ("hub:https://h", "c0ffee")
    ] * 2
    assert plan.known[Path("/a/model.safetensors")].sha256 == "1" * 64


def test_a_container_sees_every_folder_that_is_named(project: Project, tmp_path: Path) -> None:
    for name in ("a", "b", "r"):
        (tmp_path / name).mkdir()
    values = {
        "adapter_name_or_path": f"{tmp_path}/a,{tmp_path}/b",
        "ref_model": f"{tmp_path}/r",
        "deepspeed": {"inline": 1},
    }
    assert input_folders(values) == {tmp_path / name: False for name in ("a", "b", "r")}


def test_the_same_words_mean_the_same_run_once_a_model_was_fetched() -> None:
    planned = RunRequest(origins=(Origin("ref_model", "org/r"),))
    fetched = replace(planned, origins=(Origin("ref_model", "org/r", source="hub:x"),))
    assert identity(planned, {"ref_model": "org/r"}) == identity(fetched, {"ref_model": "/cache/r"})
    other = RunRequest(origins=(Origin("ref_model", "org/other"),))
    assert identity(planned, {}) != identity(other, {})


def test_what_a_host_has_linked_is_recorded_and_an_empty_result_refused(project: Project) -> None:
    values, named = settled(project, Host(), adapter_name_or_path="run:r1")
    [link] = stage_inputs(Host(), "new", values, (), named).links
    listed = {
        "output/adapter_model.safetensors": ListedFile(3, "a" * 64),
        "output/adapter_config.json": ListedFile(2, "b" * 64, "/elsewhere/adapter_config.json"),
        "output/training_args.bin": ListedFile(9, "c" * 64),
        "around/config.json": ListedFile(9, "d" * 64),
    }
    runs = Host().location("r1").run.parent
    found = delivery.linked(link, Manifest(listed, "succeeded"), runs)
    assert {name: file.source for name, file in found.items()} == {
        "adapter_name_or_path/0/adapter_config.json": "/elsewhere/adapter_config.json",
        "adapter_name_or_path/0/adapter_model.safetensors": (
            "/bare/runs/r1/output/adapter_model.safetensors"
        ),
    }
    request = RunRequest(origins=(link.origin,))
    [origin] = delivery.with_digest(request, link, found).origins
    own = {name.rpartition("/")[2]: record for name, record in found.items()}
    assert origin.sha256 == kinds.digest(own)
    with pytest.raises(UsageError, match="its folder output is empty there"):
        delivery.linked(link, Manifest({}, "succeeded"), runs)


def test_a_result_that_changed_is_not_uploaded(project: Project) -> None:
    run = a_run(project, "sft")
    _, named = settled(project, Host(), adapter_name_or_path="run:sft")
    file = run.output / "adapter_config.json"
    models.refuse_changed(models.known(named), {file: FileRecord(1, sha256_of(file))})
    with pytest.raises(UsageError, match="changed since it was sealed"):
        models.refuse_changed(models.known(named), {file: FileRecord(1, "0" * 64)})


def test_of_a_hosts_origins_only_names_are_taken() -> None:
    theirs = RunRequest(
        origins=(
            Origin("adapter_name_or_path", "run:sft", run="sft"),
            Origin("ref_model", "org/r"),
            Origin("ref_model", "/etc/passwd"),
            Origin("output_dir", "run:sft"),
        )
    )
    kept = foreign.request_of(theirs, "r").origins
    assert [origin.written for origin in kept] == ["run:sft", "org/r"]


def test_names_between_commas() -> None:
    values: dict[str, Any] = {"adapter_name_or_path": "a, b", "ref_model": "x,y"}
    run_config.put_name(values, "adapter_name_or_path", 1, "/c")
    run_config.put_name(values, "ref_model", 0, "/z")
    assert values == {"adapter_name_or_path": "a,/c", "ref_model": "/z"}
    assert run_config.names_in(None) == []
    assert run_config.names_in(["a", " b"]) == ["a", "b"]
