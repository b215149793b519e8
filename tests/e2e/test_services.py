"""LLaMA Board, the API and TensorBoard on this machine, as a user has them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import cli
from cli import Client, until
from tunesmith.job.services import manager, process_tree
from tunesmith.job.services.manager import Service
from tunesmith.project import Project
from webclient import (
    LOOPBACK_HEX,
    assert_refused,
    choose,
    chromium,
    preview,
    sockets_of,
    status_of,
)

pytestmark = pytest.mark.e2e

RUN = "small"
# One step of training: what is asked here is not how well it learns.
SMALL = ("max_samples=8", "num_train_epochs=1", "per_device_train_batch_size=4")


@pytest.fixture(scope="module")
def home(project: Project, base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .tunesmith of its own, with the environment and the base model of the project."""
    assert base_model.is_dir()
    folder = tmp_path_factory.mktemp("home with a space")
    for shared in ("envs", "models"):
        (folder / shared).symlink_to(project.home / shared)
    return folder


@pytest.fixture(scope="module")
def variables(home: Path) -> dict[str, str]:
    # A proxy in between, as AutoDL has one, must not be asked for loopback.
    return {**os.environ, "TUNESMITH_HOME": str(home), "http_proxy": "http://127.0.0.1:9"}


@pytest.fixture(scope="module")
def inv(root: Path, variables: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    return lambda *words: cli.run(root, *words, env=variables)


@pytest.fixture(scope="module")
def client(root: Path, home: Path, variables: dict[str, str]) -> Iterator[Callable[..., Client]]:
    """Start an `inv` that stays."""
    with cli.clients(root, variables) as start:
        yield start
    for name in manager.MODULES:
        manager.stop(Service(home, name), force=True)


@pytest.fixture(scope="module")
def trained(inv: Any, home: Path) -> Path:
    """The folder of a run that `inv train` made."""
    done = inv("train", "--run", RUN, "--no-evaluate", *SMALL)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return home / "runs" / RUN


def own_listeners(service: Service) -> set[tuple[str, int]]:
    """Return the listening sockets of a service's processes."""
    owner = service.process()
    assert owner
    return sockets_of((owner.pid, *process_tree.descendants(owner.pid)))


def assert_secret(service: Service, *told: str) -> None:
    """No other user of this machine may learn what opens a service: not by a process list, an
    environment, a file or a log."""
    owner, key = service.process(), service.key()
    assert owner and key
    secrets = [word.encode() for word in (key, *told)]
    for pid in (owner.pid, *process_tree.descendants(owner.pid)):
        for place in ("cmdline", "environ"):
            found = Path(f"/proc/{pid}/{place}").read_bytes()
            assert not any(word in found for word in secrets), (pid, place)
    assert service.folder.stat().st_mode & 0o077 == 0
    for file in service.folder.rglob("*"):
        if file.name.startswith((f"{service.name}.", f".{service.name}.")):
            assert file.stat().st_mode & 0o077 == 0, file
            if file.is_file() and file != service.key_file:
                assert not any(word in file.read_bytes() for word in secrets), file


def test_the_board_in_a_browser_and_a_training_that_outlives_it(
    home: Path, trained: Path, client: Callable[..., Client], inv: Any
) -> None:
    opened = client("webui", "--no-open")
    url = opened.url()
    service = Service(home, "webui")
    found = own_listeners(service)
    assert found
    assert {address for address, _ in found} <= LOOPBACK_HEX

    with chromium(opened.address()) as page:
        assert page.url == f"{url}/", "the token is out of the address"
        paths = ("/", "/config", "/gradio_api/queue/join", "/gradio_api/upload")
        assert_refused(page, opened.port, (*paths, "/gradio_api/call/x", "/gradio_api/stream/x"))
        page.reload()
        page.get_by_role("button", name="Preview command").wait_for()
        assert "philosophy_conch" in choose(page, "Dataset", "philosophy_conch")
        assert RUN in choose(page, "Checkpoint path", RUN), "finished runs are there"
        command = preview(page)
        assert "--dataset philosophy_conch" in command
        assert "--template smollm " in command
        assert f"--model_name_or_path {home}/models/" in command
        assert f"--adapter_name_or_path saves/SmolLM2-135M-Instruct/lora/{RUN}" in command
        assert "trust_remote_code" not in command
        picture = home / "board.png"
        page.screenshot(path=picture, full_page=True)
        assert picture.stat().st_size > 50_000
        page.get_by_label("Max samples").first.fill("4")
        page.get_by_label("Epochs").first.fill("1.0")
        choose(page, "Compute type", "fp32")  # bf16, its default, needs a GPU
        page.get_by_role("button", name="Start", exact=True).click()
        training = until(lambda: manager.state(service)["training"], "a training")

    assert opened.interrupt() == 0
    assert f"trains {training['folder']}, so it stays" in opened.said
    assert "come back: `inv webui --on local`" in opened.said
    again = client("webui", "--no-open")
    assert again.url() == url
    assert again.address() != opened.address()
    token, other = (one.address().partition("?token=")[2] for one in (opened, again))
    assert status_of(opened.port, f"/?token={token}") == 403, "it works once"
    assert_secret(service, token, other)
    assert status_of(opened.port, f"/?token={other}") == 200
    assert f"is there already, training {training['folder']}" in again.said

    adapter = home / "board" / training["folder"] / "adapter_model.safetensors"
    until(lambda: not manager.state(service)["training"], "the end of the training", 300)
    assert adapter.is_file(), service.log_file.read_text()[-2000:]
    assert again.interrupt() == 0
    assert "LLaMA Board is ended" in again.said
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", again.port), 5).close()

    # A wrong state: one line that says what to do.
    (home / "board" / "data").unlink()
    (home / "board" / "data").mkdir()
    said = cli.refusal(inv("webui", "--no-open"), code=1)
    assert f"local: {home}/board/data: already exists" in said
    assert "move it away" in said
    (home / "board" / "data").rmdir()


def ask(port: int, path: str, key: str | None, body: Any = None) -> Any:
    """Return the answer of the API. Raises HTTPError."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}")
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    if body is not None:
        request.add_header("Content-Type", "application/json")
        request.data = json.dumps(body).encode()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=120) as answer:
        return json.load(answer)


def test_the_api_serves_a_run_to_who_has_the_key(
    home: Path, trained: Path, client: Callable[..., Client], inv: Any
) -> None:
    opened = client("api", "--run", RUN)
    port = opened.port
    key = opened.said.partition("export API_KEY=")[2].split()[0]
    assert len(key) >= 43
    assert {address for address, _ in own_listeners(Service(home, "api"))} <= LOOPBACK_HEX
    for wrong in (None, "wrong", key[:-1]):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(port, "/v1/models", wrong)
    assert [model["id"] for model in ask(port, "/v1/models", key)["data"]] == [RUN]
    body = {"model": RUN, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
    answer = ask(port, "/v1/chat/completions", key, body)
    assert answer["choices"][0]["message"]["content"].strip()

    assert_secret(Service(home, "api"))
    with chromium(f"http://127.0.0.1:{port}/v1/models", ready=None) as page:
        assert_refused(page, port, ("/v1/models", "/v1/chat/completions", "/docs"))

    other = cli.refusal(inv("api", "--run", RUN, "--what", "base"))
    assert f"the API of local serves what adapter, run {RUN}" in other
    assert "`inv api --on local --stop`" in other
    assert inv("api", "--stop").returncode == 0
    assert opened.end(120) == 1
    assert "was ended from elsewhere" in opened.said
    missing = inv("api", "--run", RUN, "--what", "merged")
    assert f"`inv merge --run {RUN}`" in cli.refusal(missing, code=1)


def test_tensorboard_has_the_curves_of_runs(
    home: Path, trained: Path, client: Callable[..., Client]
) -> None:
    opened = client("tensorboard", "--no-open")
    port, service = opened.port, Service(home, "tensorboard")
    assert own_listeners(service) == {("0100007F", port)}, "no second way to what it shows"
    with chromium(opened.address(), ready=None) as page:
        page.get_by_text("train/loss").first.wait_for()
        assert page.url.startswith(f"{opened.url()}/") and "token" not in page.url
        assert_refused(page, port, ("/", "/data/runs", "/data/environment"))
    assert_secret(service, opened.address().partition("?token=")[2])
    path = f"/data/plugin/scalars/scalars?tag=train/loss&run={RUN}"

    def curve() -> Any:
        try:
            return ask(port, path, service.key())
        except urllib.error.HTTPError:
            return None  # not read yet

    shown = [(step, round(value, 4)) for _, step, value in until(curve, "the curve")]
    events = [json.loads(line) for line in (trained / "events.jsonl").read_text().splitlines()]
    logged = [(e["step"], e["loss"]) for e in events if e["event"] == "log"]
    assert shown == [(step, pytest.approx(loss, abs=1e-3)) for step, loss in logged]
    assert opened.interrupt() == 0
