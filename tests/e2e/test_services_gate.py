"""Each service on its own, asked as no browser would: it stands behind the gate."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.run_folder import CONFIG, RUN_ID, build_run
from tunesmith.core.files import read_json, write_json
from tunesmith.job.services.manager import PATHS, Service
from tunesmith.job.services.process_tree import descendants
from tunesmith.project import Project
from tunesmith.services import service as services_service
from tunesmith.services import tensorboard_packages
from webclient import FOREIGN, sockets_of, status_of

pytestmark = pytest.mark.e2e

_SECONDS = "300"  # a cold disk reads gigabytes of libraries first


@pytest.fixture
def start(training_python: Path, tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Start a service as a client has it started, and return it when it answers."""

    def ask(*words: str, body: Any = None) -> dict[str, Any]:
        argv = [training_python, "-m", "tunesmith.job.services.manager", "--base", str(tmp_path)]
        done = subprocess.run(
            [*argv, *words], input=json.dumps(body), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer

    started: list[str] = []

    def serve(name: str, **body: Any) -> Service:
        folders = {key: str(tmp_path / key) for key in ("data", "models", "runs")}
        for folder in folders.values():
            Path(folder).mkdir(exist_ok=True)
        settings = {**folders, "language": "en", **body.pop("settings", {})}
        asked = {"serves": {}, "settings": settings, "key": services_service.new_secret(), **body}
        started.append(name)
        ask("start", name, body=asked)
        said = ask("wait", name, _SECONDS)
        assert said["state"] == "ready", said
        return Service(tmp_path, name)

    yield serve
    for name in started:
        ask("stop", name, "--force")


def port_of(service: Service) -> int:
    record = service.record()
    assert record
    return record.port


def assert_guarded(service: Service) -> None:
    """No other Host, no other Origin, nobody without a secret, and one port only."""
    owner, record, key = service.process(), service.record(), service.key()
    assert owner and record and key
    port, path = record.port, PATHS[service.name]
    found = sockets_of((owner.pid, *descendants(owner.pid)))
    assert found == {("0100007F", port)}, "no second way in"
    own = ("Authorization", f"Bearer {key}")
    assert status_of(port, path, own) == 200
    for host in (f"localhost:{port}", f"[::1]:{port}", "127.0.0.1:49152", "LOCALHOST"):
        assert status_of(port, path, own, ("Host", host)) == 200, host
    for host in (FOREIGN, f"{FOREIGN}:{port}", f"127.0.0.1.{FOREIGN}", "localhost.", "0.0.0.0"):
        assert status_of(port, path, own, ("Host", host)) == 421, host
        assert status_of(port, path, own, ("Host", host), ("X-Forwarded-Host", "localhost")) == 421
    assert status_of(port, path, own, ("Host", "localhost"), ("Host", FOREIGN)) in (400, 421)
    assert status_of(port, f"http://{FOREIGN}{path}", own) in (400, 421)
    same = f"http://127.0.0.1:{port}"
    assert status_of(port, path, own, ("Origin", same), ("Sec-Fetch-Site", "same-origin")) == 200
    for origin in (f"http://{FOREIGN}", "null", "http://127.0.0.1:1", f"http://localhost:{port}"):
        for method in ("GET", "POST", "OPTIONS"):
            assert status_of(port, path, own, ("Origin", origin), method=method) == 403, origin
    for site in ("cross-site", "same-site"):
        assert status_of(port, path, own, ("Sec-Fetch-Site", site)) == 403
    socket = (("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Version", "13"))
    asked = (*socket, ("Sec-WebSocket-Key", "AAAAAAAAAAAAAAAAAAAAAA=="), own)
    stream = "/gradio_api/stream/x"
    if service.name == "webui":
        assert status_of(port, stream, *asked) == 101
    assert status_of(port, stream, *asked, ("Host", FOREIGN)) in (403, 421)
    assert status_of(port, stream, *asked, ("Origin", f"http://{FOREIGN}")) == 403
    for other in ((), (("Authorization", f"Bearer {key[:-1]}"),)):
        assert status_of(port, path, *other) in (401, 403)


def test_the_board(start: Callable[..., Service]) -> None:
    token = services_service.new_secret()
    service = start("webui", tokens=[token])
    assert_guarded(service)
    port = port_of(service)
    assert status_of(port, "/gradio_api/startup-events") == 403
    assert [status_of(port, f"/?token={token}") for _ in range(2)] == [200, 403]
    assert token not in service.log_file.read_text()


def test_tensorboard(start: Callable[..., Service], project: Project) -> None:
    token = services_service.new_secret()
    packages = str(tensorboard_packages.install(project, "default"))
    service = start("tensorboard", settings={"packages": packages}, tokens=[token])
    assert_guarded(service)
    port = port_of(service)
    assert [status_of(port, f"/?token={token}") for _ in range(2)] == [200, 403]
    assert token not in service.log_file.read_text()


def test_the_api(start: Callable[..., Service], tiny_model: Path, tmp_path: Path) -> None:
    run = build_run(tmp_path / "runs")
    config = CONFIG | {"model_name_or_path": str(tiny_model)}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    # What is served is compared with the record: of the model that is there.
    request = read_json(run / "run.json")
    request["model"] |= {"path": str(tiny_model), "files": {}}
    write_json(run / "run.json", request)
    assert_guarded(start("api", run=RUN_ID, serves={"what": "base"}))
