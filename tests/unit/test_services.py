"""The services' job half: processes and records, the Board's folder, the curves."""

from __future__ import annotations

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli import until
from support import lacking
from tests.unit.run_folder import CONFIG, RUN_ID, build_run
from tunesmith.core.errors import UsageError
from tunesmith.core.files import write_json
from tunesmith.job.patches.llamafactory import without_hub_code
from tunesmith.job.run.process import Identity, identify, start_ticks
from tunesmith.job.services import access, api, board, manager, process_tree, tensorboard
from tunesmith.job.services.manager import Service
from tunesmith.job.services.records import ServiceRequest

pytestmark = pytest.mark.unit


@pytest.fixture
def answering() -> Iterator[int]:
    """A port on loopback that answers 200 to the right key only, as the API does."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            good = self.headers.get("Authorization") == "Bearer right"
            self.send_response(200 if good else 401)
            self.end_headers()

        def log_message(self, *_words: object) -> None:
            return None

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """A living process to write into a record, with a child that a Board might have."""
    program = (
        "import subprocess, sys, time; "
        "subprocess.Popen([sys.executable, sys.argv[1], 'train', '/b/saves/m/lora/t1/a.yaml'])"
        "if sys.argv[1:] else None; time.sleep(600)"
    )
    started: list[subprocess.Popen[bytes]] = []

    def make(*words: str) -> subprocess.Popen[bytes]:
        started.append(
            subprocess.Popen([sys.executable, "-c", program, *words], start_new_session=True)
        )
        return started[-1]

    yield make  # type: ignore[misc]
    for one in started:
        process_tree.end_tree(one.pid)
        one.wait()


def cli_of(folder: Path) -> str:
    """A program that waits, under the name of the one the Board starts."""
    program = folder / "llamafactory-cli"
    program.write_text("import time; time.sleep(600)\n")
    return str(program)


def recorded(folder: Path, name: str, port: int, pid: int, **more: Any) -> Service:
    service = Service(folder, name)
    record = {"name": name, "port": port, "process": identify(pid).to_json(), "serves": {}} | more
    write_json(service.record_file, record)
    return service


def test_states_of_a_service(tmp_path: Path, answering: int, process: Any) -> None:
    service = Service(tmp_path, "api")
    assert manager.state(service)["state"] == "absent"
    running = process()
    recorded(tmp_path, "api", answering, running.pid)
    # Without the key nothing answers 200: it counts as starting.
    assert manager.wait(service, 0.3)["state"] == "starting"
    service.key_file.write_text("right")
    assert manager.wait(service, 5)["state"] == "ready"
    service.log_file.write_text("one\n\nOSError: the last word\n")
    running.kill()
    running.wait()
    said = manager.state(service)
    assert (said["state"], said["tail"]) == ("ended", ["one", "OSError: the last word"])


def test_a_pid_of_somebody_else_is_not_the_service(
    tmp_path: Path, answering: int, process: Any
) -> None:
    """Ended services must not make us kill whoever has the number now."""
    running = process()
    there = identify(running.pid).to_json() | {"started": 1}
    service = recorded(tmp_path, "webui", answering, running.pid, process=there)
    assert manager.state(service)["state"] == "ended"
    assert manager.stop(service, force=True)["state"] == "ended"
    assert running.poll() is None


def test_a_board_that_trains_is_not_ended_unless_forced(tmp_path: Path, process: Any) -> None:
    running = process(cli_of(tmp_path))
    until(lambda: process_tree.board_training(running.pid), "a training")
    service = recorded(tmp_path, "webui", 9, running.pid)
    kept = manager.stop(service, force=False)
    assert (kept["state"], kept["training"]["folder"]) == ("kept", "/b/saves/m/lora/t1")
    assert running.poll() is None and service.record_file.exists()
    trainer = kept["training"]["pid"]
    assert manager.stop(service, force=True)["state"] == "stopped"
    assert running.wait(60) is not None
    assert not Path(f"/proc/{trainer}").exists() or not process_tree.command_of(trainer)
    assert not service.record_file.exists()


def test_an_end_is_waited_for_to_the_last_thread() -> None:
    """A first thread that has ended leaves a zombie whose sockets the others keep open."""
    program = (
        "import ctypes, signal, socket, threading, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True)\n"
        "threading.Thread(target=time.sleep, args=(600,)).start()\n"
        "ctypes.CDLL(None).pthread_exit(None)\n"
    )
    argv = [sys.executable, "-c", program]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        port = int(process.stdout.readline())
        state = Path(f"/proc/{process.pid}/stat")
        until(lambda: state.read_text().rpartition(")")[2].split()[0] == "Z", "a zombie")
        socket.create_connection(("127.0.0.1", port)).close()
        assert not process_tree._has_ended(zombie(process.pid))
        process.kill()
        until(lambda: process_tree._has_ended(zombie(process.pid)), "its end")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))


def zombie(pid: int) -> Identity:
    """The identity of a process, taken whatever its state."""
    started = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return Identity(pid, started, start_ticks(1) or 0, socket.gethostname())


def test_the_secrets_go_with_the_service(tmp_path: Path, process: Any) -> None:
    service = recorded(tmp_path, "webui", 9, process().pid)
    service.key_file.write_text("right")
    access.admit(service.tokens, "t" * 43)
    manager.stop(service, force=False)
    assert not service.key_file.exists() and not service.tokens.exists()


def test_secrets_are_the_owners_whatever_the_umask(tmp_path: Path) -> None:
    service = Service(tmp_path, "webui")
    service.folder.mkdir(mode=0o755)
    access.admit(service.folder / "webui.tokens", "o" * 43)  # of an earlier start
    umask = os.umask(0)
    try:
        with service.locked():
            manager._keep_key(service, ServiceRequest({}, {}, key="right", tokens=("t" * 43,)))
    finally:
        os.umask(umask)
    assert service.key() == "right"
    assert service.folder.stat().st_mode & 0o777 == 0o700
    for file in (service.tokens, *service.folder.rglob("*")):
        assert file.stat().st_mode & 0o077 == 0, file
    assert access.spend(service.tokens, "t" * 43)
    assert not access.spend(service.tokens, "o" * 43)


def test_each_client_of_a_living_service_gets_in(tmp_path: Path, process: Any) -> None:
    service = recorded(tmp_path, "webui", 9, process().pid)
    for token in ("1" * 43, "2" * 43):
        manager.start(service, ServiceRequest({}, {}, key="another", tokens=(token,)))
    assert service.key() is None, "the key stays that of its start"
    assert access.spend(service.tokens, "1" * 43)
    assert access.spend(service.tokens, "2" * 43)
    with pytest.raises(UsageError, match="a token of 0 characters"):
        manager.start(service, ServiceRequest({}, {}, tokens=("",)))


def test_the_key_is_not_shown_to_who_took_the_port(tmp_path: Path, process: Any) -> None:
    """While a service loads, another user of the machine may listen in its place."""
    if os.geteuid() != 0:
        lacking("not root", "as root a socket can be given to another user")
    shown: list[str | None] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            shown.append(self.headers.get("Authorization"))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_words: object) -> None:
            return None

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        service = recorded(tmp_path, "webui", server.server_port, process().pid)
        service.key_file.write_text("right")
        os.fchown(server.fileno(), 65534, -1)
        assert manager.state(service)["state"] == "starting"
        assert shown == []
        os.fchown(server.fileno(), os.geteuid(), -1)
        assert manager.state(service)["state"] == "ready"
        assert shown == ["Bearer right"]
        server.shutdown()


def test_a_living_service_of_something_else_is_refused(tmp_path: Path, process: Any) -> None:
    service = recorded(tmp_path, "api", 9, process().pid, serves={"what": "adapter", "run": "r1"})
    with pytest.raises(UsageError, match=r"^serves what adapter, run r1$"):
        manager.start(service, ServiceRequest({"what": "base", "run": "r1"}, {}))
    same = ServiceRequest({"what": "adapter", "run": "r1"}, {})
    assert manager.start(service, same)["reused"] is True


def test_registered_data_of_others_stays(tmp_path: Path, process: Any) -> None:
    data = tmp_path / "data"
    write_json(data / "dataset_info.json", {"theirs": {"file_name": "t.json"}, "both": {"old": 1}})
    service = recorded(tmp_path, "webui", 9, process().pid)
    request = ServiceRequest({}, {"data": str(data)}, datasets={"both": {"new": 1}})
    manager.start(service, request)
    merged = json.loads((data / "dataset_info.json").read_text())
    assert merged == {"theirs": {"file_name": "t.json"}, "both": {"new": 1}}
    (data / "dataset_info.json").write_text("{broken")
    with pytest.raises(UsageError, match=r"dataset_info.json: not JSON"):
        manager.start(service, request)
    assert (data / "dataset_info.json").read_text() == "{broken"


def test_the_answer_comes_past_a_proxy(answering: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoDL's turbo proxy answers 503 for loopback."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert manager.http_status(answering, "/v1/models", "right") == 200
    assert manager.http_status(answering, "/v1/models", "wrong") == 401
    assert manager.http_status(manager.free_port(), "/") is None


def test_nothing_private_is_readable_by_others(tmp_path: Path, root: Path) -> None:
    """As a client asks: one process, JSON in, JSON out, files for the owner alone."""
    runs = tmp_path / "runs"
    build_run(runs)
    # A training environment has llamafactory; here its version is all that is asked for.
    version = tmp_path / "lib" / "llamafactory-0.9.3.dist-info"
    version.mkdir(parents=True)
    (version / "METADATA").write_text("Metadata-Version: 2.1\nName: llamafactory\nVersion: 0.9.3\n")
    asked = {
        "serves": {"what": "merged"},
        "settings": {"runs": str(runs)},
        "run": None,
        "key": "canary",
    }
    argv = [sys.executable, "-m", "tunesmith.job.services.manager", "--base", str(tmp_path)]
    path = os.pathsep.join([str(root / "src"), str(tmp_path / "lib")])

    def ask(*words: str, text: str = "") -> dict[str, Any]:
        done = subprocess.run(
            [*argv, *words],
            input=text,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
            check=False,
        )
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer | {"code": done.returncode}

    said = ask("start", "api", text=json.dumps(asked))
    assert said["serves"] == {"what": "merged", "run": RUN_ID}
    assert said["key"] == "canary"
    ended = ask("wait", "api", "30")
    # The run has no merged model: refused by the API's own process, with the command.
    assert ended["state"] == "ended"
    assert "`inv merge --run" in ended["tail"][-1]
    for file in (tmp_path / "services").rglob("*"):
        assert file.stat().st_mode & 0o077 == 0, file
    assert "canary" not in (tmp_path / "services" / "api.json").read_text()
    missing = ask("start", "api", text=json.dumps(asked | {"run": "nope"}))
    assert missing["code"] == 2
    assert "no run 'nope'" in missing["error"]
    assert ask("stop", "nothing")["code"] == 2


@pytest.mark.parametrize(("name", "module"), manager.MODULES.items())
def test_without_a_key_nobody_is_served(tmp_path: Path, root: Path, name: str, module: str) -> None:
    """LLaMA-Factory takes an empty API_KEY for "everybody may"."""
    record = Service(tmp_path, name).record_file
    settings = {"run": str(build_run(tmp_path)), "packages": str(tmp_path)}
    serves = {"run": RUN_ID, "what": "base"}
    write_json(record, {"name": name, "port": 9, "settings": settings, "serves": serves})
    done = subprocess.run(
        [sys.executable, "-m", f"tunesmith.job.services.{module}", str(record)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root / "src"), "API_KEY": ""},
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == f"refused: {name} was started without a key; `inv {name}` creates one\n"


def test_a_record_of_a_client_never_opens_more_than_loopback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _name: "0.9.3")
    asked = {"serves": {}, "settings": {}, "listen": "0.0.0.0", "port": 1, "base": "/x"}
    record = manager._record(Service(tmp_path, "webui"), ServiceRequest.of(asked))
    assert (record.listen, record.base) == ("127.0.0.1", str(tmp_path))
    assert record.port != 1


def test_a_service_of_a_container_leaves_the_records_of_others_alone(
    tmp_path: Path, root: Path
) -> None:
    """The folder it works in may be a laptop's, with a service of its own. What it refuses is
    raised, and its key goes with it."""
    home, passing = tmp_path / "home", tmp_path / "tmp"
    passing.mkdir()
    build_run(home / "runs")
    outside = Service(home, "api")
    write_json(outside.record_file, {"name": "api", "port": 9, "process": None})
    before = outside.record_file.read_bytes()
    program = (
        "import sys\n"
        "from importlib import metadata\n"
        "from pathlib import Path\n"
        "metadata.version = lambda _name: '0.9.3'\n"
        "from tunesmith.core.errors import UsageError\n"
        "from tunesmith.job.services import manager\n"
        "from tunesmith.job.services.records import ServiceRequest\n"
        "home = Path(sys.argv[1])\n"
        "asked = {'serves': {'what': 'merged'}, 'settings': {'runs': str(home / 'runs')}}\n"
        "asked |= {'run': None, 'key': 'canary'}\n"
        "try:\n"
        "    request = ServiceRequest.of(asked)\n"
        "    manager.serve_here('api', request, base=home, listen='0.0.0.0', port=8000)\n"
        "except UsageError as error:\n"
        "    print(error.render())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(home)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root / "src"), "TMPDIR": str(passing)},
        check=False,
    )
    assert "no merged model\n" in done.stdout, done.stderr
    assert f"hint: `inv merge --run {RUN_ID}` creates it" in done.stdout
    assert not list(passing.iterdir())
    assert [file.name for file in outside.folder.iterdir()] == ["api.json"]
    assert outside.record_file.read_bytes() == before


def test_a_base_model_that_is_elsewhere_is_told(tmp_path: Path) -> None:
    """A run of the laptop in a container: its paths are those of the laptop."""
    run = build_run(tmp_path)
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"model_name_or_path": "/no/model"}))
    with pytest.raises(
        UsageError, match=rf"^/no/model: the base model of run {RUN_ID} is missing; "
    ):
        api.arguments(run, "adapter")


# --- the Board's folder ---------------------------------------------------------------------

NAMES = {"HuggingFaceTB/SmolLM2-135M-Instruct": "SmolLM2-135M-Instruct"}


@pytest.fixture
def house(tmp_path: Path) -> dict[str, str]:
    """Folders with one run and one base model, as a target has them."""
    run = build_run(tmp_path / "runs")
    output = run / "output"
    (output / "checkpoint-104").mkdir(parents=True)
    for name in ("adapter_model.safetensors", "adapter_config.json", ".hidden"):
        (output / name).write_text(name)
    config = CONFIG | {"output_dir": str(output)}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    model = tmp_path / "models" / "HuggingFaceTB--SmolLM2-135M-Instruct@pypi"
    record = {"size": 2, "sha256": "0" * 64, "mtime_ns": 1}
    write_json(
        model / "tunesmith-model.json",
        {
            "name": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "path": ".",
            "source": "folder",
            "revision": None,
            "requested": None,
            "fetched_at": "2026",
            "files": {"config.json": record},
        },
    )
    (tmp_path / "data").mkdir()
    return {
        **{name: str(tmp_path / name) for name in ("data", "models", "runs")},
        "language": "zh",
    }


def test_the_board_sees_data_models_and_runs(tmp_path: Path, house: dict[str, str]) -> None:
    folder = tmp_path / "board"
    found = board.populate(folder, house, NAMES)
    model = tmp_path / "models" / "HuggingFaceTB--SmolLM2-135M-Instruct@pypi"
    assert found == {"SmolLM2-135M-Instruct": model}
    assert (folder / "data").resolve() == tmp_path / "data"
    shown = folder / "saves" / "SmolLM2-135M-Instruct" / "lora" / RUN_ID
    assert (shown / "adapter_model.safetensors").read_text() == "adapter_model.safetensors"
    # The Board goes on training in whatever has a checkpoint: our run must not be that.
    assert not list(shown.glob("checkpoint-*")) and not shown.is_symlink()
    config = yaml.safe_load((folder / "cache" / "user_config.yaml").read_text())
    assert config["path_dict"] == {"SmolLM2-135M-Instruct": str(model)}
    assert (config["lang"], config["last_model"]) == ("zh", "SmolLM2-135M-Instruct")


def test_a_second_start_keeps_the_users_choices(tmp_path: Path, house: dict[str, str]) -> None:
    folder = tmp_path / "board"
    own = tmp_path / "own-model"
    own.mkdir()
    board.populate(folder, house, NAMES)
    config = folder / "cache" / "user_config.yaml"
    chosen = {"lang": "en", "last_model": "Custom", "cache_dir": None}
    chosen |= {"path_dict": {"SmolLM2-135M-Instruct": str(own), "Custom": "/x"}}
    config.write_text(yaml.safe_dump(chosen))
    board.populate(folder, house, NAMES)
    assert yaml.safe_load(config.read_text()) == chosen


def test_a_run_that_is_gone_is_no_longer_shown(tmp_path: Path, house: dict[str, str]) -> None:
    folder = tmp_path / "board"
    board.populate(folder, house, NAMES)
    trained = folder / "saves" / "SmolLM2-135M-Instruct" / "lora" / "train_2026"
    trained.mkdir()
    (trained / "adapter_model.safetensors").write_text("the Board's own")
    run = tmp_path / "runs" / RUN_ID
    run.rename(tmp_path / "elsewhere")
    board.populate(folder, house, NAMES)
    assert [path.name for path in trained.parent.iterdir()] == ["train_2026"]
    assert (tmp_path / "elsewhere" / "output" / "adapter_config.json").exists()


def test_a_data_folder_in_the_way_is_not_removed(tmp_path: Path, house: dict[str, str]) -> None:
    (tmp_path / "board" / "data").mkdir(parents=True)
    with pytest.raises(UsageError, match="board/data: already exists"):
        board.populate(tmp_path / "board", house, NAMES)


def test_hub_code_is_off_in_what_the_board_starts() -> None:
    seen: list[Any] = []

    @without_hub_code
    def parse(data: dict[str, Any]) -> dict[str, Any]:
        return {"model_name_or_path": data["model"], "trust_remote_code": True}

    @without_hub_code
    def load(_self: object, args: dict[str, Any] | None = None) -> None:
        seen.append(args)

    assert parse({"model": "m"})["trust_remote_code"] is False
    load(object(), {"trust_remote_code": True})
    load(object(), args={"trust_remote_code": True, "template": "qwen"})
    load(object())
    assert seen == [
        {"trust_remote_code": False},
        {"trust_remote_code": False, "template": "qwen"},
        None,
    ]


# --- curves ---------------------------------------------------------------------------------


def test_curves_of_a_run_continued_from_a_checkpoint(tmp_path: Path) -> None:
    run = build_run(tmp_path)
    written: list[tuple[int, dict[str, float]]] = []
    again: list[int] = []
    curve = tensorboard.Curve(
        run / "events.jsonl", lambda _when, step, values: written.append((step, dict(values)))
    )
    curve.update(lambda _when, step: again.append(step))
    steps = [step for step, values in written if "train/loss" in values]
    assert steps == [*range(1, 68), *range(61, 105)]
    assert again == [61]
    assert set(written[0][1]) == {"train/loss", "train/learning_rate", "train/grad_norm"}
    assert [values for step, values in written if step == 13][1].keys() == {"eval/loss"}
    curve.update(lambda _when, step: again.append(step))
    assert len(written) == len(steps) + 9


def test_curves_of_the_board_have_its_names() -> None:
    line = {"current_steps": 5, "total_steps": 9, "loss": 1.5, "lr": 5e-5, "eval_loss": None}
    assert tensorboard.scalars(line) == {"train/loss": 1.5, "train/learning_rate": 5e-5}
    assert tensorboard.step_of(line) == 5
    assert tensorboard.scalars({"event": "log", "step": 1, "loss": "NaN"}) == {}
    assert tensorboard.scalars({"event": "checkpoint", "step": 1, "path": "x"}) == {}


def test_runs_of_the_board_are_not_shown_twice(tmp_path: Path, house: dict[str, str]) -> None:
    board.populate(tmp_path / "board", house, NAMES)
    saves = tmp_path / "board" / "saves"
    run = tmp_path / "runs" / RUN_ID
    (run / "output" / "trainer_log.jsonl").write_text("{}\n")
    board.populate(tmp_path / "board", house, NAMES)
    own = saves / "Qwen3-8B" / "lora" / "train_2026" / "trainer_log.jsonl"
    own.parent.mkdir(parents=True)
    own.write_text("{}\n")
    found = dict(tensorboard.sources(tmp_path / "runs", saves, None))
    assert found == {RUN_ID: run / "events.jsonl", "board/Qwen3-8B/train_2026": own}
    only = dict(tensorboard.sources(tmp_path / "runs", saves, str(run)))
    assert only == {RUN_ID: run / "events.jsonl"}
