"""Foreign text on its way to a terminal: what would command it is gone, the words stay."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunesmith.cli import console, follow
from tunesmith.core.errors import TunesmithError
from tunesmith.core.printable import one_line, printable, quoted
from tunesmith.core.progress import Display
from tunesmith.hosts import ssh_errors
from tunesmith.hosts.relay import Screen, run
from tunesmith.job.run.events import Note, PhaseStarted
from tunesmith.job.run.schema import RunStatus
from tunesmith.plan.target import RunUpdate

pytestmark = pytest.mark.unit

CLIPBOARD = "\x1b]52;c;dG91Y2ggQ0FOQVJZ\x07"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"a{CLIPBOARD}b", "ab"),
        ("\x1b]0;title\x1b\\a", "a"),
        ("\x1b[2J\x1b[1;1Ha\x1b[31mred\x1b[0m", "ared"),
        ("\x9b31ma\x9d0;t\x9cb\x85c", "abc"),
        ("\x1bPq#0\x1b\\a\x1bcb\x1b(Bc", "abc"),
        ("a\x7f\x08\x07\x00b", "ab"),
        ("one\r\ntwo\rthree\tx\n", "one\ntwo\nthree\tx\n"),
        ("\u202egpj.exe\u2066\u200f\u206a\u206f", "gpj.exe"),
        ("\x1b]52;c;" + "A" * 9000, "]52;c;" + "A" * 9000),
        ("\x1b\x1b[2J\x1b", ""),
        ("\ud800x", "x"),
        ("你好 é 🙂 [bold]x[/] {{ 1 }}", "你好 é 🙂 [bold]x[/] {{ 1 }}"),
    ],
)
def test_what_a_terminal_would_obey_is_taken_out(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_a_value_in_a_message_is_one_short_line() -> None:
    assert one_line("a\n b\x1b[2J\tc" + "x" * 500, 20) == "a b cxxxxxxxxxxxx..."
    assert quoted("\x1b[2J'\n") == r'"\x1b[2J\'\n"' or quoted("\x1b[2J'\n").isprintable()
    assert len(quoted("9" * 10**6)) <= 80
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert quoted(deep) == "list"


def test_an_error_is_printable_whatever_it_quotes() -> None:
    error = TunesmithError(f"gpu1: it says {CLIPBOARD}hello", [f"\x1b[2J{CLIPBOARD}x"])
    assert error.render() == "error: gpu1: it says hello\n  x"
    assert error.message == "gpu1: it says hello"


def test_what_ssh_said_last_is_printable() -> None:
    assert ssh_errors.last_line(f"debug1: x\n{CLIPBOARD}Welcome\x1b[2J\r\n") == "Welcome"


def plain(width: int = 60) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    made = console.PlainConsole(
        file=stream, width=width, markup=False, emoji=False, highlight=False, force_terminal=True
    )
    return made, stream


def test_the_console_prints_text_as_text() -> None:
    made, stream = plain()
    table = Table("name", "value")
    table.add_row(f"[red]run{CLIPBOARD}[/]", "\x1b[2J:smile:")
    made.print(table)
    made.print(f"a{CLIPBOARD}[link=http://x]b[/link]")
    shown = stream.getvalue()
    assert "[red]run[/]" in shown and ":smile:" in shown and "a[link=http://x]b[/link]" in shown
    assert "\x1b]" not in shown and "\x1b[2J" not in shown


def test_the_one_console_is_such_a_console() -> None:
    assert isinstance(console.console, console.PlainConsole)
    assert console.console.render_str("[red]x[/]").plain == "[red]x[/]"


def test_a_said_line_is_printable(capsys: pytest.CaptureFixture[str]) -> None:
    console.say(f"a{CLIPBOARD}\x1b[2J[red]b")
    console.write(f"log{CLIPBOARD}\r\nmore\n")
    assert capsys.readouterr().out == "a[red]b\nlog\nmore\n"


def test_a_followed_run_is_printable() -> None:
    for terminal in (False, True):
        stream = io.StringIO()
        made = Console(file=stream, width=100, force_terminal=terminal)
        status = RunStatus(phase="[red]tr", state="running")
        told = (PhaseStarted(phase="[red]tr"), Note(text=f"a{CLIPBOARD}[bold]b"))
        with Display(made) as display:
            follow._View(display).update(RunUpdate(status, told, 0, "", 0))
        assert "a[bold]b" in stream.getvalue()
        assert "\x1b]" not in stream.getvalue()


def test_nothing_that_is_drawn_is_read_as_markup(root: Path) -> None:
    for file in (root / "src/tunesmith").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert not [word for word in ("TextColumn(", "from_markup", "markup=True") if word in text]


def test_line_editing_of_a_host_passes_and_nothing_else() -> None:
    screen = Screen()
    said = f"> \x1b[3D\x1b[K\rhi {CLIPBOARD}\x1b[2J\x1b[6n\x1b[?1049h\x07there 你\x1b".encode()
    shown = "".join(screen.feed(bytes([byte])) for byte in said) + screen.feed(b"", last=True)
    assert shown == "> \x1b[3D\x1b[K\rhi \x07there 你"


def test_a_command_on_a_host_is_shown_through_the_filter(
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = r"printf 'a\033]0;t\007b\n'; printf 'e\033[2Jf\n' >&2; exit 3"
    assert run(["sh", "-c", script]) == 3
    said = capsys.readouterr()
    assert (said.out, said.err) == ("ab\n", "ef\n")


def test_a_drawn_text_is_printable() -> None:
    made, stream = plain()
    made.print(Text("a\x1b[2Jb\x1b]0;t"))
    assert "a" in stream.getvalue() and "\x1b[2J" not in stream.getvalue()
    assert "\x1b]" not in stream.getvalue()


def test_an_answer_in_a_chat_is_printable(capsys: pytest.CaptureFixture[str]) -> None:
    from tunesmith.job.evaluation import chat

    for piece in ("Hello", f" {CLIPBOARD}you", "\x1b", "]0;x\x07", "\n"):
        chat._write(piece)
    assert capsys.readouterr().out == "Hello you]0;x\n"
