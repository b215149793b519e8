"""What a host may put into a pull: data of known names, and nothing that is obeyed here."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from support import lacking
from tests.unit.test_swap import until_killed
from tests.unit.test_transfer import script
from tunesmith.core import files, swap
from tunesmith.core.callbacks import unseen
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import read_json, write_json
from tunesmith.hosts import replies, transfer
from tunesmith.hosts.answers import AnswerSource
from tunesmith.job.merge import bundle
from tunesmith.job.run import foreign as run_foreign
from tunesmith.job.run.codec import decode, encode
from tunesmith.job.run.folder import COPY_FILE, RunFolder
from tunesmith.job.run.manifest import PARTS, manifest
from tunesmith.job.run.process import identify
from tunesmith.job.run.replies import Manifest
from tunesmith.job.run.schema import Limits, RunRequest, RunStatus
from tunesmith.job.supervisor import launch, supervisor
from tunesmith.job.supervisor.supervisor import Outcome
from tunesmith.targets.host import HostTarget
from tunesmith.targets.local import LocalTarget

pytestmark = pytest.mark.unit

SHA = hashlib.sha256(b"weights").hexdigest()
REQUEST: dict[str, Any] = {
    "run_id": "r",
    "created": "2026-01-14T09:30:05Z",
    "title": "org/tiny on rows",
    "model": {
        "name": "org/tiny",
        "path": "/data/models/tiny",
        "source": "hub: https://hub",
        "revision": "abc",
        "files": {"model.safetensors": {"size": 7, "sha256": SHA}},
    },
    "overrides": {"learning_rate": 0.1},
    "data": [{"key": "rows", "file": "/data/rows.json", "rows": 4, "sha256": SHA}],
    "phases": ["fetch", "train", "merge"],
    "prompts": [{"prompt": "Who are you?", "expect": None, "reference": None, "system": None}],
    "evaluate": {"max_new_tokens": 64},
    "merge": {"export_size": 5, "export_device": "cpu", "infer_dtype": "bfloat16"},
}
CONFIG: dict[str, Any] = {
    "model_name_or_path": "/data/models/tiny",
    "dataset": "rows",
    "template": "smollm",
    "finetuning_type": "lora",
    "lora_rank": 4,
    "learning_rate": 0.1,
    "default_system": "/ is the root. Answer in one word.",
}
EVENTS = '{"event": "run_started", "phases": ["train"], "time": 1}\n'


class Host(HostTarget):
    """A folder of this machine in the place of a host; `said` replaces its list."""

    def __init__(self, base: Path, remote: Any) -> None:
        self.name = "gpu1"
        self.told: list[str] = []
        self.there = base / "there" / "r"
        self.lie: Callable[[dict[str, Any]], Any] = lambda answer: answer
        self._tell = self.told.append
        self._bar = unseen
        self._remote = remote
        self._project: Any = SimpleNamespace(home=base / "home", runs=base / "home" / "runs")
        self.layout: Any = SimpleNamespace(runs=base / "there")

    def status(self, run_id: str) -> RunStatus:
        return RunStatus(state="succeeded")

    def _manifest(self, run_id: str, parts: Sequence[str]) -> Any:
        listed = encode(manifest(RunFolder(self.there), parts, lambda *_: None))
        return replies.read(AnswerSource("gpu1", "its list of run r"), Manifest, self.lie(listed))

    def write(self, name: str, content: str | bytes) -> None:
        file = self.there / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """A host with a trained run `r`, reached by rsync through an `ssh` that stays here."""
    if shutil.which("rsync") is None:
        lacking("no rsync", "`apt-get install rsync`")
    script(tmp_path / "bin/ssh", 'while [ "$1" != gpu1 ]; do shift; done; shift; exec sh -c "$*"')
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setattr(files, "_fsync", lambda *_: None)
    remote = SimpleNamespace(name="gpu1", config=tmp_path / "ssh_config", host=None)
    made = Host(tmp_path, remote)
    made.write("run.json", json.dumps(REQUEST))
    CONFIG["output_dir"] = str(made.there / "output")
    made.write("config.yaml", yaml.safe_dump(CONFIG))
    made.write("status.json", '{"state": "succeeded", "phases": {"train": "succeeded"}}')
    made.write("events.jsonl", EVENTS)
    made.write("train.log", "log")
    made.write("output/adapter_model.safetensors", b"adapter")
    made.write("merged/model.safetensors", b"merged")
    return made


def tree(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }


OURS = {
    *("run.json", "config.yaml", "status.json", "events.jsonl", "train.log", COPY_FILE),
    *("host/run.json", "host/config.yaml", "host/status.json"),
    *("output/adapter_model.safetensors", "merged/model.safetensors"),
}
STRAYS = (
    *("yaml.py", "sitecustomize.py", "json.py", "tunesmith/__init__.py", "x.pth", "train.sh"),
    *("output/tunesmith.py", "output/adapter_model.bin", "output/optimizer.pt", "merged/a.pkl"),
    *(
        "merged/modeling_x.py",
        "predict/run.sh",
        "output/a\nb.json",
        "output/-x.json",
        "a\x1b]0;.log",
    ),
    *("output/a/b/c/d.json", "output/.netrc", "export/lib.so", "report.html", "training_loss.png"),
)


def test_code_links_pipes_and_odd_names_stay_there(host: Host, tmp_path: Path) -> None:
    for name in STRAYS:
        host.write(name, "import os; os.abort()")
    secret = tmp_path / "secret.json"
    secret.write_text("secret")
    (host.there / "output/link.json").symlink_to(secret)
    (host.there / "proof.json").symlink_to(secret)
    folder = host.pull("r", PARTS)
    assert tree(folder) == OURS
    (left,) = (line for line in host.told if line.startswith("left on gpu1"))
    assert left.isprintable()
    assert "and 1" in left  # more of them than are named


def test_a_host_lists_plain_files_only(host: Host, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    for name in ("output/link.json", "proof.json", "merged/far.json"):
        (host.there / name).symlink_to(tmp_path / "secret")
    answer = manifest(RunFolder(host.there), PARTS, lambda *_: None)
    assert not [name for name in answer.files if (host.there / name).is_symlink()]
    # A pipe would be read for ever.
    os.mkfifo(host.there / "output/pipe.json")
    assert manifest(RunFolder(host.there), PARTS, lambda *_: None).left.count == 4


def test_a_list_that_names_them_changes_nothing(host: Host) -> None:
    for name in STRAYS:
        host.write(name, "import os; os.abort()")
    (host.there / "output/link.json").symlink_to("/etc/passwd")
    names = [*STRAYS, "../esc.json", "/etc/passwd", "host/run.json", COPY_FILE, "run.lock"]
    names += [".hashes.json", "output/../../x.json", "output//x.json", "", "inputs/rows.json"]

    def lie(answer: dict[str, Any]) -> dict[str, Any]:
        strays = {name: {"size": 21, "sha256": SHA} for name in names}
        return answer | {"files": answer["files"] | strays}

    host.lie = lie
    assert tree(host.pull("r", PARTS)) == OURS


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ([], "expected an object, the host says list"),
        ({}, 'an object with the key "files"'),
        ({"files": []}, "r.files: expected an object"),
        ({"files": {}}, "run.json is missing"),
        ({"files": {"run.json": 7}}, 'r.files["run.json"]: expected an object, the host says 7'),
        ({"size": "10"}, "size: expected a count (a whole number from 0), the host says '10'"),
        ({"size": -1}, "size: expected a count (a whole number from 0), the host says -1"),
        ({"size": True}, "size: expected a count (a whole number from 0), the host says True"),
        ({"size": 10**30}, "size: expected a count"),
        ({"size": 1 << 40}, "1.1 TB, 67.1 MB at most expected"),
        ({"sha256": "0" * 63}, "sha256: expected a sha256"),
        ({"sha256": "A" * 64}, "sha256: expected a sha256"),
        ({"sha256": None}, "sha256: expected a sha256, the host says None"),
        ({"path": 7}, "path: expected a text, the host says 7"),
        ({"left": {"count": "x"}}, "left.count: expected a count"),
        ("many", "100001 files, 4096 at most expected"),
        ("below", "lies below the file output/a.json"),
    ],
)
def test_a_list_of_other_types_is_refused_in_one_line(host: Host, change: Any, told: str) -> None:
    good = {"size": 3, "sha256": SHA}

    def lie(answer: dict[str, Any]) -> Any:
        if change == "many":
            return {"files": {f"output/{number}.json": good for number in range(100_001)}}
        if change == "below":
            names = ("run.json", "output/a.json", "output/a.json/b.json")
            return {"files": dict.fromkeys(names, good)}
        if not isinstance(change, dict) or not change or "files" in change:
            return change
        if "left" in change:
            return answer | change
        return {"files": {"run.json": good | change}}

    host.lie = lie
    with pytest.raises(TunesmithError) as caught:
        host.pull("r", PARTS)
    assert caught.value.message.startswith("gpu1: its list of run r")
    assert told in caught.value.message
    assert not (host._project.runs / "r").exists()


def test_more_files_than_any_run_has_are_refused_there(host: Host) -> None:
    for number in range(4200):
        (host.there / "output" / f"{number}.json").touch()
    with pytest.raises(UsageError, match=r"420\d files to pull, 4096 at most"):
        manifest(RunFolder(host.there), PARTS, lambda *_: None)


def test_what_the_other_end_sends_besides_is_not_kept(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").write_text("mine")
    honest = transfer.download

    def download(remote: Any, folder: str, sizes: Any, into: Path, *rest: Any) -> None:
        honest(remote, folder, sizes, into, *rest)
        (into / "yaml.py").write_text("import os; os.abort()")
        (into / "tunesmith").mkdir()
        (into / "tunesmith/__init__.py").write_text("import os; os.abort()")
        (into / "predict").symlink_to(outside)
        (into / "output/x.json").symlink_to(outside / "keep")
        os.mkfifo(into / "output/pipe")

    monkeypatch.setattr(transfer, "download", download)
    folder = host.pull("r", PARTS)
    assert tree(folder) == OURS
    assert not (folder / "tunesmith").exists()
    assert (outside / "keep").read_text() == "mine"


def test_a_file_behind_a_link_is_not_followed(host: Host, tmp_path: Path) -> None:
    """Between the list and the transfer the host puts a link in the file's place."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"adapter")

    def lie(answer: dict[str, Any]) -> dict[str, Any]:
        (host.there / "output/adapter_model.safetensors").unlink()
        (host.there / "output/adapter_model.safetensors").symlink_to(secret)
        return answer

    host.lie = lie
    with pytest.raises(TunesmithError, match="has changed while it was fetched"):
        host.pull("r", PARTS)
    assert not (host._project.runs / "r").exists()


def test_a_host_that_sends_more_than_it_told_is_cut_off(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "_GROWTH", 1_000_000)

    def lie(answer: dict[str, Any]) -> dict[str, Any]:
        host.write("train.log", b"x" * 8_000_000)
        return answer

    host.lie = lie
    with pytest.raises(TunesmithError, match="gpu1 sent a file of more bytes than it had told"):
        host.pull("r", PARTS)
    incoming = host._project.home / "incoming"
    assert sum(f.stat().st_size for f in incoming.rglob("*") if f.is_file()) < 3_000_000


def foreign(tmp_path: Path) -> dict[str, Any]:
    """A request with everything that must have no effect here."""
    return REQUEST | {
        "after": {
            "command": ["touch", str(tmp_path / "canary")],
            "when": "succeeded",
            "seconds": 0,
        },
        "then": ["merge", "poweroff"],
        "env": {"LD_PRELOAD": "/data/evil.so", "PYTHONPATH": "/data"},
        "turn": "wait",
        "limits": {"max_seconds": 0.001, "restarts": 10**9},
        "fetch": {"name": "org/evil", "mirror": "/data/m.yml", "store": "/data", "programs": "/d"},
        "predict": {"trust_remote_code": True, "model_name_or_path": "/data"},
        "trust_remote_code": True,
        "merge": REQUEST["merge"]
        | {"export_dir": "/data", "accept_mismatch": True, "export_device": "$(touch x)"},
        "overrides": {"trust_remote_code": True, "learning_rate": 0.1, "output_dir": "/x"},
        "unheard_of": {"command": ["touch", "x"]},
    }


def pulled(host: Host, tmp_path: Path, **config: Any) -> RunFolder:
    host.write("run.json", json.dumps(foreign(tmp_path)))
    host.write("config.yaml", yaml.safe_dump(CONFIG | config))
    return RunFolder(host.pull("r", PARTS))


def test_the_request_is_made_anew_of_known_fields(host: Host, tmp_path: Path) -> None:
    run = pulled(host, tmp_path)
    request = run.request()
    assert read_json(run.request_file).keys() <= {
        *("run_id", "created", "config_file", "stem", "title", "model", "overrides", "data"),
        *("owned", "phases", "prompts", "guard", "evaluate", "env", "limits", "merge", "version"),
    }
    assert encode(request.model) == REQUEST["model"] | {"path": None}
    assert request.phases == ("train", "merge")
    assert request.merge == {"export_size": 5, "infer_dtype": "bfloat16"}
    assert request.overrides == {"learning_rate": 0.1}
    assert (request.env, request.limits) == ({}, Limits())
    assert request.data[0].file == "rows.json"
    assert encode(request.prompts) == REQUEST["prompts"]
    assert request.after is None
    assert "/data" not in run.request_file.read_text()
    # What the host wrote is there to be looked at.
    assert read_json(run.path / "host/run.json") == foreign(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trust_remote_code", True),
        ("deepspeed", "/data/ds.json"),
        ("adapter_name_or_path", "/data/adapter"),
        ("cache_dir", "/data"),
        ("media_dir", "relative"),
        ("tokenized_path", "/data"),
        ("report_to", "wandb"),
        ("hub_token", "hf_x"),
        ("swanlab_lark_webhook_url", "https://evil.example"),
        ("resume_from_checkpoint", "/data"),
        ("export_dir", "x"),
        ("ref_model", "org/evil"),
        ("reward_model", "https://evil.example"),
        ("vllm_config", {"a": 1}),
        ("fsdp_config", {"a": 1}),
        ("optim_args", "x"),
        ("unheard_of", 1),
        ("dataset", "/etc/passwd"),
        ("template", "~/x"),
        ("lora_target", {"not": "plain"}),
        ("eval_dataset", ["../../x"]),
    ],
)
def test_the_config_keeps_figures_and_names(
    host: Host, tmp_path: Path, key: str, value: Any
) -> None:
    run = pulled(host, tmp_path, **{key: value})
    config = run.config()
    assert config.get(key) is None
    assert config["output_dir"] == str(host._project.runs / "r" / "output")
    assert config["model_name_or_path"] == "org/tiny"
    assert config["default_system"] == CONFIG["default_system"]
    assert config["lora_rank"] == 4


def test_no_command_of_a_host_follows_a_merge_here(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = {"fetch": "succeeded", "train": "succeeded"}
    host.write("status.json", json.dumps({"state": "failed", "phases": done}))
    run = pulled(host, tmp_path)
    monkeypatch.setattr(supervisor._Supervisor, "_run_phase", lambda *_: Outcome("succeeded"))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    hangup = signal.getsignal(signal.SIGHUP)
    try:
        # Were it obeyed it would be by now: the command comes before this returns.
        assert supervisor.supervise(run.path, ["merge"]) == 0
    finally:
        signal.signal(signal.SIGHUP, hangup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert run.status().state == "succeeded"
    assert not (tmp_path / "canary").exists()


@pytest.fixture
def bystander() -> Iterator[int]:
    """A process of this machine."""
    process = subprocess.Popen(["sleep", "600"])
    yield process.pid
    process.kill()
    process.wait()


def test_a_process_that_a_host_names_is_not_signalled(host: Host, bystander: int) -> None:
    named = identify(bystander).to_json()
    status = {"state": "running", "phases": {}, "supervisor": named}
    host.write("status.json", json.dumps(status))
    run = RunFolder(host.pull("r", PARTS))
    assert "supervisor" not in read_json(run.status_file)
    with pytest.raises(UsageError, match="is not running"):
        launch.stop(run.path)
    # Of a copy of an earlier version neither.
    write_json(run.status_file, status)
    with pytest.raises(UsageError, match="is not running"):
        launch.stop(run.path)


def test_a_copy_that_is_as_its_host_wrote_it_is_not_used_so(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "r")
    write_json(run.request_file, foreign(tmp_path))
    run.config_file.write_text(yaml.safe_dump(CONFIG | {"trust_remote_code": True}))
    write_json(run.path / COPY_FILE, {"from": "gpu1", "files": {}})
    for read in (run.request, run.config, lambda: supervisor.supervise(run.path, [])):
        with pytest.raises(UsageError, match="is as its host wrote it"):
            read()
    run_foreign.ensure(run)
    assert run.request().after is None
    assert "trust_remote_code" not in run.config()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"name": "/home/me/private"}, "a base model of its own"),
        ({"name": "../../models"}, "a base model of its own"),
        ({"files": {}}, "a base model of its own"),
    ],
)
def test_a_base_model_is_a_name_of_a_hub_with_known_weights(
    host: Host, change: dict[str, Any], told: str
) -> None:
    host.write("run.json", json.dumps(REQUEST | {"model": REQUEST["model"] | change}))
    folder = host.pull("r", PARTS)
    project: Any = SimpleNamespace(run_folder=lambda _: folder)
    with pytest.raises(UsageError, match=told):
        LocalTarget(project).adopt_pulled_run("r", lambda name: pytest.fail(f"fetched {name}"))


def test_adapters_below_that_are_not_here_are_told(host: Host, tmp_path: Path) -> None:
    run = pulled(host, tmp_path, adapter_name_or_path="/data/one", create_new_adapter=True)
    project: Any = SimpleNamespace(run_folder=lambda _: run.path)
    with pytest.raises(UsageError, match=r"with other adapters of its own") as caught:
        LocalTarget(project).adopt_pulled_run("r", lambda name: pytest.fail(f"fetched {name}"))
    assert caught.value.hint.endswith("--on gpu1")


def test_a_bundle_of_the_host_fits_the_run_here(host: Host, tmp_path: Path) -> None:
    run = pulled(host, tmp_path, cache_dir="/data/cache", fsdp_config={"a": 1})
    keys = {"export_size": 5}
    there = bundle.key_of(
        decode(RunRequest, foreign(tmp_path)),
        yaml.safe_load((host.there / "config.yaml").read_text()),
        keys,
    )
    assert bundle.key_of(run.request(), run.config(), keys) == there
    other = bundle.key_of(run.request(), run.config() | {"lora_rank": 8}, keys)
    assert other != there


@pytest.mark.parametrize("name", ["../../x.json", "/etc/x.json", "modeling.py", "a\nb.json", ".x"])
@pytest.mark.parametrize("key", ["files", "shards"])
def test_a_bundle_writes_files_of_a_model_only(tmp_path: Path, key: str, name: str) -> None:
    record: dict[str, Any] = {"key": "k", "shards": {}, "prompts": {}, "files": {}}
    record[key] = {name: {"in": "bundle", "sha256": SHA}}
    write_json(tmp_path / "bundle/bundle.json", record)
    asked: Any = SimpleNamespace(config={}, keys={}, adapters=["x"], base=tmp_path)
    with pytest.raises(UsageError, match=f"{key} lists a file"):
        bundle.find(tmp_path, tmp_path / "part", RunRequest(), asked)


@pytest.mark.parametrize("way", ["exchange", "journal"])
def test_a_pull_killed_at_any_step_leaves_a_whole_run(
    host: Host, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    def download(_: Any, folder: str, sizes: Any, into: Path, *__: Any) -> None:
        for name in sizes:
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(folder) / name, into / name)

    monkeypatch.setattr(transfer, "download", download)
    if way == "journal":
        monkeypatch.setattr(swap, "_exchanged", lambda *_: swap._CANNOT[0])
    step, weights = 0, b""
    while True:
        weights = f"adapter {step}".encode()
        host.write("output/adapter_model.safetensors", weights)
        killed = until_killed(step, lambda: host.pull("r", ["adapter"]))
        # The part that was not asked for is the one that a cut pull could lose.
        folder = host.pull("r", ["adapter"])
        assert (folder / "output/adapter_model.safetensors").read_bytes() == weights
        if step:
            assert (folder / "merged/model.safetensors").read_bytes() == b"merged"
        assert RunFolder(folder).request().run_id == "r"
        if step == 0:
            host.pull("r", ["merged"])
        if step and not killed:
            break
        step += 1
    assert step > 8


def test_two_pulls_of_a_run_at_once_are_one(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = host._manifest
    refused = []

    def meanwhile(run_id: str, parts: Sequence[str]) -> Any:
        monkeypatch.setattr(host, "_manifest", honest)
        with pytest.raises(UsageError, match="is being pulled from gpu1 by another command"):
            host.pull("r", PARTS)
        refused.append(True)
        return honest(run_id, parts)

    monkeypatch.setattr(host, "_manifest", meanwhile)
    assert tree(host.pull("r", PARTS)) == OURS
    assert refused


@pytest.mark.parametrize("name", ["run.json", "config.yaml"])
def test_a_run_that_is_damaged_there_is_told_and_not_pulled(host: Host, name: str) -> None:
    host.write(name, "{")
    with pytest.raises(TunesmithError, match=f"gpu1: run r: its {name} is damaged there: not "):
        host.pull("r", PARTS)
    assert not (host._project.runs / "r").exists()
