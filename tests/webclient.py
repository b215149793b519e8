"""What the tests of the web services share: `inv` left running, LLaMA Board in Chromium, and a
page of somebody else in the same browser.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from support import lacking

# A name that leads to this machine, as whoever owns a name can have it at any time.
FOREIGN = "evil.example"
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def listeners(tables: str) -> set[tuple[str, int]]:
    """Return (address as hex, port) of the listening sockets in the text of /proc/net/tcp{,6}."""
    found = set()
    for line in tables.splitlines():
        fields = line.split()
        if len(fields) > 3 and fields[3] == "0A":
            address, _, port = fields[1].partition(":")
            found.add((address, int(port, 16)))
    return found


def sockets_of(processes: Iterable[int]) -> set[tuple[str, int]]:
    """Return the listening sockets of processes, as `listeners` does."""
    inodes = set()
    for pid in processes:
        for file in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = str(file.readlink())
            except FileNotFoundError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    lines = [
        line
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        if line.split()[9] in inodes
    ]
    return listeners("\n".join(lines))


LOOPBACK_HEX = {"0100007F", "00000000000000000000000001000000"}


@contextlib.contextmanager
def chromium(url: str, ready: str | None = "Preview command") -> Iterator[Any]:
    """The page at `url` in a real headless Chromium, when its button `ready` is there."""
    program = next((found for name in _BROWSERS if (found := shutil.which(name))), None)
    if program is None:
        lacking("no Chromium", "`apt-get install chromium` brings it")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Without a sandbox: tests run as root in containers.
        words = ["--no-sandbox", f"--host-resolver-rules=MAP {FOREIGN} 127.0.0.1"]
        browser = playwright.chromium.launch(executable_path=program, args=words)
        try:
            page = browser.new_context(viewport={"width": 1280, "height": 1000}).new_page()
            page.set_default_timeout(60_000)
            page.goto(url)
            if ready is not None:
                page.get_by_role("button", name=ready).wait_for()
            yield page
        finally:
            browser.close()


class _ForeignPage(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>foreign</title>")

    def log_message(self, *_words: object) -> None:
        return None


_ASK = """async ([target, paths]) => {
    const said = [];
    const ask = async (path, method, mode) => {
        const body = method === "POST" ? "{}" : undefined;
        try {
            const got = await fetch(target + path, {method, mode, body, credentials: "include"});
            said.push(`${got.type} ${got.status}`);
        } catch { said.push("blocked"); }
    };
    for (const path of paths)
        for (const method of ["GET", "POST"])
            for (const mode of ["no-cors", "cors"]) await ask(path, method, mode);
    await new Promise((done) => {
        const socket = new WebSocket(target.replace("http", "ws") + paths[0]);
        socket.onopen = () => { said.push("open"); done(); };
        socket.onerror = () => { said.push("blocked"); done(); };
    });
    return said;
}"""


def assert_refused(page: Any, port: int, paths: Sequence[str]) -> None:
    """Let a foreign page try all that a browser lets it, in the browser of `page`, which has
    the cookie of the service at `port`: by a name that leads there (DNS rebinding), from
    another site, and from another port of this machine, where the cookie goes along."""
    target = f"http://127.0.0.1:{port}"
    other = page.context.new_page()
    seen: list[tuple[str, str, int]] = []
    other.on(
        "response",
        lambda got: (
            seen.append((got.request.method, got.url, got.status))
            if f":{port}/" in got.url
            else None
        ),
    )
    rebound = f"http://{FOREIGN}:{port}"
    assert other.goto(f"{rebound}/").status == 421
    said = other.evaluate(_ASK, [rebound, paths])
    assert {word.rpartition(" ")[2] for word in said} <= {"421", "blocked"}, said

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _ForeignPage)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        for name in (FOREIGN, "127.0.0.1"):
            other.goto(f"http://{name}:{server.server_port}/")
            said = other.evaluate(_ASK, [target, paths])
            # A page is told nothing: no status, no body.
            assert set(said) <= {"blocked", "opaque 0"} and "opaque 0" in said, said
            with other.expect_navigation(url=f"{target}{paths[0]}"):
                other.evaluate(
                    """(action) => {
                        const form = document.createElement("form");
                        Object.assign(form, {action, method: "post"});
                        document.body.append(form);
                        form.submit();
                    }""",
                    f"{target}{paths[0]}",
                )
            other.goto(f"http://{name}:{server.server_port}/")
            with other.expect_response(lambda got: got.url == f"{target}/"):
                other.evaluate(
                    """(src) => {
                        const frame = document.createElement("iframe");
                        document.body.append(Object.assign(frame, {src}));
                    }""",
                    f"{target}/",
                )
    finally:
        server.shutdown()
        server.server_close()
    other.close()
    assert {status for _, _, status in seen} <= {401, 403, 421}, seen
    for path in paths:
        for method in ("GET", "POST"):
            assert (method, f"{target}{path}", 403) in seen, seen


def status_of(port: int, path: str, *headers: tuple[str, str], method: str = "GET") -> int:
    """Return the status of a request with exactly these headers beside Host, if that is none."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    own = any(name == "Host" for name, _ in headers)
    connection.putrequest(method, path, skip_host=own, skip_accept_encoding=True)
    bodyless = [] if method == "GET" else [("Content-Length", "0")]
    for name, value in (*headers, *bodyless):
        connection.putheader(name, value)
    connection.endheaders()
    try:
        return connection.getresponse().status
    finally:
        connection.close()


def choose(page: Any, label: str, option: str) -> list[str]:
    """Pick an option of a dropdown of the Board; return all that it offered."""
    page.get_by_label(label, exact=True).first.click()
    page.get_by_role("option").first.wait_for()
    offered: list[str] = page.get_by_role("option").all_inner_texts()
    page.get_by_role("option", name=option, exact=True).first.click()
    page.keyboard.press("Escape")
    return [text.replace("✓", "").strip() for text in offered]


def preview(page: Any) -> str:
    """Press "Preview command" and return the command."""
    page.get_by_role("button", name="Preview command").click()
    command = page.locator("code", has_text="llamafactory-cli train").first
    command.wait_for()
    text: str = command.inner_text()
    return text
