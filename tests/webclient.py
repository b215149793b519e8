"""What the tests of the web services share: `inv` left running, and LLaMA Board in Chromium."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from support import lacking

URL = re.compile(r"is at (http://127\.0\.0\.1:(\d+))")
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def until(true: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """Return what `true` gives as soon as it is true; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.1)
    return found


class Client:
    """An `inv` command that stays, as a user has it in a terminal."""

    def __init__(self, folder: Path, root: Path, variables: Mapping[str, str], *words: str) -> None:
        self._output = folder / f"client-{time.monotonic_ns()}.txt"
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "invoke", *words],
                cwd=root,
                env={**variables, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def said(self) -> str:
        """All that it has printed."""
        return self._output.read_text(encoding="utf-8")

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Wait until it has printed `text`."""

        def there() -> bool:
            if self.process.poll() is not None:
                assert text in self.said(), f"it ended: {self.said()}"
            return text in self.said()

        try:
            until(there, text, seconds)
        except AssertionError:
            print(self.said())
            raise

    def url(self, seconds: float = 240) -> str:
        """The address that it told."""
        self.wait_for("Ctrl-C ends", seconds)
        found = URL.search(self.said())
        assert found, self.said()
        return found[1]

    @property
    def port(self) -> int:
        """The port of `url`."""
        return int(self.url().rpartition(":")[2])

    def interrupt(self, seconds: float = 60) -> int:
        """Press Ctrl-C; return the exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(seconds)

    def end(self) -> None:
        """Be gone, however."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def listeners(tables: str) -> set[tuple[str, int]]:
    """Return (address as hex, port) of the listening sockets in the text of /proc/net/tcp{,6}."""
    found = set()
    for line in tables.splitlines():
        fields = line.split()
        if len(fields) > 3 and fields[3] == "0A":
            address, _, port = fields[1].partition(":")
            found.add((address, int(port, 16)))
    return found


LOOPBACK_HEX = {"0100007F", "00000000000000000000000001000000"}


@contextlib.contextmanager
def chromium(url: str) -> Iterator[Any]:
    """The page at `url` in a real headless Chromium."""
    program = next((found for name in _BROWSERS if (found := shutil.which(name))), None)
    if program is None:
        lacking("no Chromium", "`apt-get install chromium` brings it")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Without a sandbox: tests run as root in containers.
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            page = browser.new_page(viewport={"width": 1280, "height": 1000})
            page.set_default_timeout(60_000)
            page.goto(url)
            page.get_by_role("button", name="Preview command").wait_for()
            yield page
        finally:
            browser.close()


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
