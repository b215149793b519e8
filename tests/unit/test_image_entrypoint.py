"""The entry point's own judgement: mounts, shared memory, words as they are typed."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tunesmith.cli import container as cli_container
from tunesmith.cli import container_checks, container_runs, container_services, table
from tunesmith.cli.command import COMMAND, as_typed
from tunesmith.core.files import write_json
from tunesmith.core.patching import install, is_installed
from tunesmith.job.run.process import identify
from tunesmith.job.run.schema import ModelRef, RunRequest, RunStatus
from tunesmith.job.services import access
from tunesmith.job.services.manager import Service
from tunesmith.targets.container import input_folders, network, without_nested

pytestmark = pytest.mark.unit

ROOT_ONLY = "22 1 0:21 / / rw,relatime - overlay overlay rw\n23 22 0:5 / /proc rw - proc proc rw\n"
MOUNTED = ROOT_ONLY + "44 22 8:1 /home/me/x /workspace rw,relatime - ext4 /dev/sda1 rw\n"


def test_a_container_without_a_mount_is_refused() -> None:
    fault = container_checks.missing(ROOT_ONLY, (0, 0), writable=True)
    assert fault is not None
    assert 'add `-v "$PWD:/workspace"`' in fault.hint


def test_a_mount_that_belongs_to_somebody_else_names_its_owner() -> None:
    fault = container_checks.missing(MOUNTED, (501, 20), writable=False)
    assert fault is not None
    assert "add `--user 501:20`" in fault.hint
    assert f"{os.getuid()}:{os.getgid()}" in fault.message


def test_a_mount_that_can_be_written_is_good() -> None:
    assert container_checks.missing(MOUNTED, (501, 20), writable=True) is None


@pytest.mark.parametrize(
    ("config", "size", "gpus", "short"),
    [
        ({}, 67_108_864, 0, False),
        ({"dataloader_num_workers": 0}, 67_108_864, 1, False),
        ({"dataloader_num_workers": 4}, 67_108_864, 1, True),
        ({"dataloader_num_workers": 4}, 8_589_934_592, 1, False),
        ({}, 67_108_864, 2, True),
    ],
)
def test_shared_memory_matters_where_it_is_used(
    config: dict[str, int], size: int, gpus: int, short: bool
) -> None:
    said = container_checks.short_of_shm(config, size, gpus)
    assert (said is not None) == short
    assert said is None or "`--shm-size 8g`" in said.hint


def test_commands_in_messages_are_those_of_a_container(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = "gone; `inv resume --run x` continues it"
    monkeypatch.delenv(COMMAND)
    assert as_typed(text) == text
    monkeypatch.setenv(COMMAND, "docker run ... IMAGE")
    assert as_typed(text) == "gone; `docker run ... IMAGE resume --run x` continues it"


@pytest.fixture(autouse=True)
def command(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Words as the image says them; what main does to Invoke is undone."""
    monkeypatch.setenv(COMMAND, "docker run ... IMAGE")
    pages = {page: is_installed(page) for page in table.PAGES}
    yield
    for page, before in pages.items():
        if before:
            install(page, table.STEPS)


def test_every_verb_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_container.main([]) == 0
    page = capsys.readouterr().out
    verbs = [verb.name for _, verbs in cli_container.STEPS for verb in verbs]
    assert len(verbs) > 10
    for verb in (*verbs, *cli_container.PASSED_ON):
        assert re.search(rf"(?m)^  (?:.*\W)?{re.escape(verb)}\b", page), verb
    assert max(map(len, page.splitlines())) <= 95


def test_the_verbs_of_a_clone_are_the_same_here() -> None:
    """One declaration: options, help, checks and exit codes cannot differ."""
    clone = {command.name: command for command in table.COMMANDS}
    image = {verb.name: verb for _, verbs in cli_container.STEPS for verb in verbs}
    own = {name for name, verb in image.items() if verb is not clone.get(name)}
    # Those that are a service, that ask of this container, or whose words it says again.
    assert own == {"webui", "api", "address", "check", "version", "train", "resume"}
    assert {"merge", "predict", "chat", "report"} <= image.keys() - own
    collection = cli_container.program().namespace
    assert {name: collection[name] for name in collection.task_names} == image


@pytest.mark.parametrize(("verb", "more"), [("train", {"new"}), ("resume", set())])
def test_a_training_takes_the_options_of_a_clone(verb: str, more: set[str]) -> None:
    clone = {command.name: command for command in table.COMMANDS}[verb]
    image = {made.name: made for _, verbs in cli_container.STEPS for made in verbs}[verb]
    left_out = {name.replace("-", "_") for name in cli_container.LEFT_OUT}
    here, there = (
        {name: (option.default, option.annotation) for name, option in signature.items()}
        for signature in (inspect.signature(made.function).parameters for made in (image, clone))
    )
    assert here.keys() == there.keys() - left_out | more
    assert {name: here[name] for name in here.keys() - more} == {
        name: there[name] for name in here.keys() - more
    }
    assert {n: text for n, text in image.texts.items() if n not in more}.items() <= (
        clone.texts.items()
    )


@pytest.mark.parametrize("verb", ["train", "predict"])
def test_options_that_mean_nothing_in_a_container_are_not_there(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli_container.main([verb, "--on", "gpu1"]) == 2
    assert f"`docker run ... IMAGE {verb}` has no option --on" in capsys.readouterr().err
    assert cli_container.main([verb, "--help"]) == 0
    page = capsys.readouterr().out
    assert "--on" not in page
    assert ("--new" in page) == (verb == "train")
    assert f"Example:\n  docker run ... IMAGE {verb} --config " in page


def test_an_unknown_verb_is_misuse(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_container.main(["trian"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: there is no command 'trian'\nhint: did you mean `docker run ")
    assert "IMAGE train`" in said


def test_a_container_without_a_mount_does_no_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fault = container_checks.missing(ROOT_ONLY, (0, 0), writable=True)
    monkeypatch.setattr(container_checks, "mount_fault", lambda **_: fault)
    for words in (["train"], ["resume"], ["merge"], ["predict"], ["report"], ["data.check"]):
        assert cli_container.main(words) == 2, words
        assert "nothing is mounted on /workspace" in capsys.readouterr().err, words


@pytest.mark.parametrize("listen", ["0.0.0.0", "127.0.0.1"])
def test_an_api_needs_a_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], listen: str
) -> None:
    monkeypatch.setenv("API_HOST", listen)
    monkeypatch.setenv(COMMAND, "docker run ... IMAGE")
    monkeypatch.delenv("API_KEY", raising=False)
    assert cli_container.main(["api", "x.yaml"]) == 2
    assert "add `-e API_KEY` to docker run" in capsys.readouterr().err


def test_an_api_serves_a_run_and_tells_whose_command_a_config_is_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("API_HOST", raising=False)
    monkeypatch.setenv("API_KEY", "right")
    assert cli_container.main(["api", "x.yaml"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: api x.yaml: it serves a run, not a config\nhint: ")
    assert "`docker run ... IMAGE llamafactory-cli api x.yaml`" in said


def test_a_key_may_come_in_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv(COMMAND, "docker run ... IMAGE")
    monkeypatch.delenv("API_KEY", raising=False)
    file = tmp_path / "key"
    monkeypatch.setenv("API_KEY_FILE", str(file))
    assert cli_container.main(["api"]) == 2
    assert f"API_KEY_FILE={file}: [Errno 2]" in capsys.readouterr().err
    file.write_text("\n")
    assert cli_container.main(["api"]) == 2
    assert "without an API_KEY" in capsys.readouterr().err
    file.write_text("right\n")
    assert container_services._given_key() == "right"
    monkeypatch.setenv("API_KEY", "own")
    assert container_services._given_key() == "own"
    assert "API_KEY" not in os.environ


def test_names_to_be_published_under_are_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(COMMAND, "docker run ... IMAGE")
    monkeypatch.setattr(container_services, "mount_fault", lambda: None)
    for wrong in ("*", "http://lab.example"):
        monkeypatch.setenv("TUNESMITH_ALLOWED_HOSTS", wrong)
        assert cli_container.main(["webui"]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: TUNESMITH_ALLOWED_HOSTS: '{wrong}' is not a host name")
        assert len(said.splitlines()) == 1


def test_the_address_of_a_board_is_told_beside_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv(COMMAND, "docker run ... IMAGE")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cli_container.main(["address"]) == 2
    assert "LLaMA Board does not run in this container" in capsys.readouterr().err
    service = Service(tmp_path / "tunesmith-x", "webui")
    record = {"name": "webui", "port": 7860, "process": identify().to_json()}
    write_json(service.record_file, record)
    for _ in range(2):  # each for one browser
        assert cli_container.main(["address"]) == 0
        address, _, token = capsys.readouterr().out.strip().partition("?token=")
        assert address == "http://127.0.0.1:7860/"
        assert access.spend(service.tokens, token)
    write_json(service.record_file, record | {"process": identify().to_json() | {"started": 1}})
    assert cli_container.main(["address"]) == 2, "it has ended"


@pytest.mark.parametrize("port", ["0", "65536", "http", "٣"])
def test_a_port_that_is_none_is_told(
    port: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("API_PORT", port)
    monkeypatch.setenv(COMMAND, "docker run ... IMAGE")
    assert cli_container.main(["api"]) == 2
    assert f"API_PORT={port}: a number from 1 to 65535" in capsys.readouterr().err


def test_llamafactorys_own_servers_are_given_explicitly(monkeypatch: pytest.MonkeyPatch) -> None:
    became: list[list[str]] = []
    monkeypatch.setattr(os, "execvp", lambda _program, argv: became.append(argv))
    monkeypatch.setenv("PYTHONUNBUFFERED", "")
    monkeypatch.setenv(COMMAND, "docker run ... IMAGE")
    cli_container.main(["llamafactory-cli", "webui"])
    cli_container.main(["webchat", "x.yaml"])
    cli = "llamafactory-cli"
    assert became == [[cli, "webui"], [cli, "webchat", "x.yaml"]]


def test_a_container_sees_the_folders_its_config_names(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "ds.json").write_text("{}")
    found = input_folders(
        {
            "dataset_dir": str(tmp_path / "data"),
            "deepspeed": str(tmp_path / "ds.json"),
            "output_dir": str(tmp_path / "saves/new/deep"),
            "model_name_or_path": "org/model",
        }
    )
    # The output's folder is not there yet: its parent is mounted, and may be written.
    assert found == {tmp_path / "data": False, tmp_path: True}
    assert without_nested(found) == {tmp_path: True}
    assert without_nested({Path("/a"): False, Path("/a/b"): True}) == {
        Path("/a"): False,
        Path("/a/b"): True,
    }


@pytest.mark.parametrize(
    ("state", "failure", "train", "goes_on"),
    [
        ("stopped", None, "stopped", True),
        ("failed", "killed", "running", True),
        ("failed", "gpu_oom", "failed", False),
        ("succeeded", None, "succeeded", False),
        ("stopped", None, "succeeded", False),
        ("running", None, "running", False),
    ],
)
def test_the_same_words_go_on_with_what_was_cut_off(
    state: str, failure: str | None, train: str, goes_on: bool
) -> None:
    status = RunStatus(state=state, failure=failure, phases={"train": train})
    assert container_runs.may_continue(status) == goes_on


def test_two_runs_are_the_same_but_for_what_each_has_of_its_own() -> None:
    config = {"learning_rate": 1e-4, "output_dir": "/a", "model_name_or_path": "/m/1"}
    other = config | {"output_dir": "/b", "model_name_or_path": "org/model"}
    request = RunRequest(model=ModelRef("org/model"))
    assert container_runs.identity(request, config) == container_runs.identity(request, other)
    changed = other | {"learning_rate": 2e-4}
    assert container_runs.identity(request, config) != container_runs.identity(request, changed)
    assert container_runs.identity(
        RunRequest(model=ModelRef("x")), config
    ) != container_runs.identity(request, config)


def test_a_container_reaches_what_this_machine_reaches_and_gets_no_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(os.environ):
        if name.upper().endswith(("_PROXY", "_CERT_FILE", "_CA_BUNDLE")):
            monkeypatch.delenv(name)
    bundle = tmp_path / "ca.pem"
    bundle.write_text("x")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    monkeypatch.setenv("SSL_CERT_FILE", str(bundle))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/no/such/file")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert network() == {"HTTPS_PROXY": "http://proxy:3128", "SSL_CERT_FILE": str(bundle)}
