"""LLaMA Board and the API of the image: the guards of a host's, published by Docker alone."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import cli
from cli import until
from image.conftest import UID, Workspace
from tunesmith.job.services.manager import http_status
from webclient import (
    FOREIGN,
    assert_refused,
    choose,
    chromium,
    listeners,
    preview,
    status_of,
)

pytestmark = pytest.mark.image

# Loading the libraries from a cold disk takes minutes.
SECONDS = 600
# One of LLaMA-Factory's own list; it is not fetched.
MODEL = "Qwen2.5-0.5B-Instruct"
INSIDE = {("0100007F", 7860)}


@pytest.fixture
def serve(workspace: Callable[[], Workspace]) -> Iterator[Callable[..., str]]:
    """Start containers that stay; return the id of each."""
    started: list[str] = []

    def start(place: Workspace, *words: str, options: tuple[str, ...] = ()) -> str:
        argv = place.argv(*words, options=("--detach", *options))
        done = subprocess.run(argv, capture_output=True, text=True, check=True)
        started.append(done.stdout.strip())
        return started[-1]

    yield start
    for one in started:
        docker("rm", "--force", one)


def docker(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["docker", *words], capture_output=True, text=True, check=True)


def inside(container: str) -> set[tuple[str, int]]:
    """Return who listens in a container, without its engine's own name server."""
    shown = docker("exec", container, "cat", "/proc/net/tcp", "/proc/net/tcp6").stdout
    return {(address, port) for address, port in listeners(shown) if address != "0B00007F"}


def here(port: int) -> set[str]:
    """Return the addresses of this machine where somebody listens on a port."""
    tables = [Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6")]
    return {address for address, at in listeners("\n".join(tables)) if at == port}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def said(container: str) -> str:
    done = docker("logs", container)
    return done.stdout + done.stderr


def ask(port: int, path: str, key: str, body: Any) -> Any:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), headers
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def test_the_board_is_that_of_a_host_and_listens_where_it_is_told(
    workspace: Callable[[], Workspace], serve: Callable[..., str]
) -> None:
    """By itself on the container's loopback only; published when that is asked for."""
    place, alone, plain = workspace(), workspace(), workspace()
    port = free_port()
    asked = ("-e", "GRADIO_SERVER_NAME=0.0.0.0", "-p", f"127.0.0.1:{port}:7860")
    # A share link is never made, whatever the variable says.
    named = ("-e", "GRADIO_SHARE=1", "-e", "TUNESMITH_ALLOWED_HOSTS=lab.example")
    published = serve(place, "webui", options=(*asked, *named))
    quiet = serve(alone, "webui")
    own = serve(plain, "llamafactory-cli", "webui")
    until(lambda: http_status(port, "/") == 403, said(published), SECONDS)
    assert here(port) == {"0100007F"}
    assert "public URL" not in said(published)
    assert (place.folder / ".tunesmith/board/cache/user_config.yaml").stat().st_uid == UID
    # The command that the log tells; the log itself has no token.
    how = "python -I -m tunesmith.cli.container address"
    assert f"`docker exec {published[:12]} {how}`" in said(published)
    address = docker("exec", published, *how.split()).stdout.strip()
    assert address.startswith("http://127.0.0.1:7860/?token=")
    token = address.partition("=")[2]
    assert status_of(port, "/", ("Host", FOREIGN)) == 421
    assert status_of(port, "/", ("Host", "lab.example")) == 403, "a name that is given is served"
    with chromium(f"http://127.0.0.1:{port}/?token={token}") as page:
        assert page.url == f"http://127.0.0.1:{port}/"
        assert_refused(page, port, ("/", "/gradio_api/queue/join"))
        assert "rows" in choose(page, "Dataset", "rows"), "the data sets of the folder"
        page.get_by_label("Model name", exact=True).first.fill(MODEL)
        page.get_by_role("option", name=MODEL, exact=True).first.click()
        until(page.get_by_label("Model path").first.input_value, "the model's path")
        command = preview(page)
        assert "llamafactory-cli train" in command
        assert "trust_remote_code" not in command
    assert status_of(port, f"/?token={token}") == 403, "it works once"
    assert token not in said(published)
    until(lambda: inside(quiet) == INSIDE, said(quiet), SECONDS)
    assert "add `-e GRADIO_SERVER_NAME=0.0.0.0 -p 127.0.0.1:7860:7860`" in said(quiet)
    # Given explicitly, LLaMA-Factory's own is started: it knows nothing of ours.
    until(lambda: inside(own) == INSIDE, said(own), SECONDS)
    assert not (plain.folder / ".tunesmith").exists()


def test_the_api_serves_a_run_to_who_has_the_key(
    workspace: Callable[[], Workspace], serve: Callable[..., str]
) -> None:
    place = workspace()
    few = ("max_steps=2", "save_steps=2", "--no-evaluate", "--run", "one")
    done = place.run("train", "tiny.yaml", *few)
    assert done.returncode == 0, done.stdout + done.stderr
    port = free_port()
    published = ("-e", "API_HOST=0.0.0.0", "-p", f"127.0.0.1:{port}:8000", "-e", "API_KEY=right")
    given = serve(place, "api", "--run=", options=published)
    until(lambda: http_status(port, "/v1/models", "right") == 200, said(given), SECONDS)
    assert http_status(port, "/v1/models") == 401
    assert http_status(port, "/v1/models", "wrong") == 401
    own = ("Authorization", "Bearer right")
    assert status_of(port, "/v1/models", own, ("Host", FOREIGN)) == 421
    assert status_of(port, "/v1/models", own, ("Origin", f"http://{FOREIGN}")) == 403
    with chromium(f"http://127.0.0.1:{port}/v1/models", ready=None) as page:
        assert_refused(page, port, ("/v1/models", "/v1/chat/completions"))
    assert here(port) == {"0100007F"}
    body = {"model": "one", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    assert ask(port, "/v1/chat/completions", "right", body)["model"] == "one"
    assert "model one (adapter)" in said(given)
    assert "right" not in said(given)
    began = time.monotonic()
    docker("stop", "--time", "200", given)
    assert time.monotonic() - began < 180

    refused = place.run("api", "--what", "merged", options=("-e", "API_KEY=right"))
    assert "`docker run ... IMAGE merge --run one`" in cli.refusal(refused)


def test_compose_serves_the_newest_run(workspace: Callable[[], Workspace], root: Path) -> None:
    """Its words are those of the entry point: a container of them refuses what is not there."""
    place = workspace()
    text = (root / "docker/compose.yaml").read_text(encoding="utf-8")
    words = ["api", "--run=", "--what=adapter"]
    assert '[api, "--run=${RUN:-}", "--what=${WHAT:-adapter}"]' in text
    done = place.run(*words, options=("-e", "API_KEY=right"))
    assert done.returncode == 2
    assert "no runs in /workspace/.tunesmith/runs" in done.stderr
