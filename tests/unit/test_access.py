"""Who may speak to a service: the decision, tokens, and the gate before both kinds of servers."""

from __future__ import annotations

import asyncio
import http.client
import threading
import wsgiref.simple_server
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tunesmith.core.errors import UsageError
from tunesmith.job.services import access
from tunesmith.job.services.access import (
    Gate,
    Request,
    before_asgi,
    before_wsgi,
    names_of,
    refusal,
)
from tunesmith.services.service import new_secret

pytestmark = pytest.mark.unit

KEY, TOKEN = "k" * 43, "t" * 43
NAMES = names_of("127.0.0.1")
HERE = ("host", "127.0.0.1:7860")


def asked(
    *headers: tuple[str, str], method: str = "GET", path: str = "/", query: str = ""
) -> Request:
    return Request(method, path, query, headers)


def status_of(*headers: tuple[str, str], names: frozenset[str] = NAMES, **more: Any) -> int | None:
    answer = refusal(asked(*headers, **more), names)
    return None if answer is None else answer.status


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1:7860", "127.0.0.1", "localhost:49152", "LocalHost:1", "[::1]:7860", "[::1]"],
)
def test_loopback_is_served_at_any_port(host: str) -> None:
    assert status_of(("host", host)) is None


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:7860",
        "127.0.0.1.evil.example:7860",
        "localhost.evil.example",
        "evil-localhost",
        "localhost.",  # another name, by which a page may be ours and not ours
        "127.0.0.1.:7860",
        "",
        " ",
        ":7860",
        "127.0.0.1:",
        "127.0.0.1:port",
        "127.0.0.1:786000",
        "127.0.0.1:-1",
        "me@127.0.0.1:7860",
        "127.0.0.1@evil.example",
        "evil.example#127.0.0.1",
        "127.0.0.1/evil.example",
        "127.0.0.1,evil.example",
        "127.0.0.1 evil.example",
        "127.0.0.1:7860\n",
        "127.1",
        "127.0.0.2",
        "2130706433",
        "0.0.0.0:7860",
        "0x7f.0.0.1",
        "[::ffff:127.0.0.1]:7860",
        "::1",
        "[::1",
        "[::]",
        "192.168.1.5:7860",
        "ｌocalhost",
        "locaIhost",
    ],
)
def test_another_host_is_misdirected(host: str) -> None:
    assert status_of(("host", host)) == 421


def test_one_host_is_expected() -> None:
    assert status_of() == 421
    assert status_of(HERE, HERE) == 421
    assert status_of(HERE, ("host", "evil.example")) == 421


def test_what_stands_elsewhere_is_no_host() -> None:
    """A proxy would say it; ours has none before it, so it is a page that says it."""
    for name in ("x-forwarded-host", "forwarded", "x-original-host", "x-host"):
        assert status_of(("host", "evil.example"), (name, "127.0.0.1:7860")) == 421
        assert status_of(HERE, (name, "evil.example")) is None


def test_a_target_that_names_a_host_is_refused() -> None:
    """RFC 9112 3.2.2: such a target overrides Host, and not every server tells us."""
    assert status_of(HERE, path="http://evil.example/") == 400
    assert status_of(HERE, path="*") == 400


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("127.0.0.1:7860", "http://127.0.0.1:7860"),
        ("localhost:7860", "http://localhost:7860"),
        ("[::1]:7860", "http://[::1]:7860"),
        ("LOCALHOST:7860", "http://localhost:7860"),
        ("127.0.0.1", "http://127.0.0.1"),
        ("127.0.0.1:80", "http://127.0.0.1"),
        ("localhost", "http://localhost:80"),
        ("localhost:443", "https://localhost"),
        ("localhost:8443", "https://localhost:8443"),
    ],
)
def test_the_origin_is_that_of_the_host(host: str, origin: str) -> None:
    assert status_of(("host", host), ("origin", origin), method="POST") is None


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "",
        "http://evil.example",
        "http://evil.example:7860",
        "https://evil.example",
        "http://127.0.0.1",  # port 80: another service of this machine
        "http://127.0.0.1:7861",
        "http://localhost:7860",  # another name than this request's
        "http://127.0.0.1:7860.evil.example",
        "http://127.0.0.1:7860@evil.example",
        "http://evil.example@127.0.0.1:7860",
        "http://127.0.0.1:7860/",
        "http://127.0.0.1:7860\n",
        "127.0.0.1:7860",
        "//127.0.0.1:7860",
        "file://",
        "file://127.0.0.1:7860",
        "chrome-extension://127.0.0.1:7860",
        "ws://127.0.0.1:7860",
        "http://127.0.0.1:7860, http://evil.example",
        "http://127.0.0.1:7860 http://evil.example",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_another_origin_is_refused(origin: str, method: str) -> None:
    assert status_of(HERE, ("origin", origin), method=method) == 403


def test_one_origin_at_most() -> None:
    own = ("origin", "http://127.0.0.1:7860")
    assert status_of(HERE, own) is None
    assert status_of(HERE, own, own) == 403


NAVIGATION = (("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "document"))


@pytest.mark.parametrize("site", ["cross-site", "same-site", "", "Same-Origin", "other"])
def test_the_doing_of_another_site_is_refused(site: str) -> None:
    """`same-site` is another port of this machine. Pictures and scripts have no Origin."""
    said = ("sec-fetch-site", site)
    assert status_of(HERE, said) == 403
    assert status_of(HERE, said, *NAVIGATION) == 403
    token = f"token={TOKEN}"
    # A link with a token, as in a terminal that is a page: of the whole tab, and to the door.
    assert status_of(HERE, said, *NAVIGATION, query=token) is None
    assert status_of(HERE, said, *NAVIGATION, query=token, method="POST") == 403
    assert status_of(HERE, said, *NAVIGATION, query=token, path="/config") == 403
    assert status_of(HERE, said, query=token) == 403
    frame = (NAVIGATION[0], ("sec-fetch-dest", "iframe"))
    assert status_of(HERE, said, *frame, query=token) == 403


def test_the_users_own_doing_passes() -> None:
    for site in ("none", "same-origin"):
        assert status_of(HERE, ("sec-fetch-site", site)) is None
    assert status_of(HERE, ("sec-fetch-site", "none"), ("sec-fetch-site", "cross-site")) == 403


def test_the_address_it_listens_on_and_named_ones_are_served() -> None:
    assert names_of("0.0.0.0") == names_of("::") == names_of("127.0.0.1")
    assert "172.17.0.2" in names_of("172.17.0.2")
    assert "[fd00::2]" in names_of("fd00::2")
    names = names_of("0.0.0.0", access.parse_names(" Lab.Example, 192.168.1.5:8080 ,"))
    assert status_of(("host", "lab.example:8080"), names=names) is None
    assert status_of(("host", "lab.example"), names=names) is None
    assert status_of(("host", "192.168.1.5:8080"), names=names) is None
    assert status_of(("host", "192.168.1.5:8081"), names=names) == 421
    assert status_of(("host", "sub.lab.example"), names=names) == 421
    https = ("origin", "https://lab.example")
    assert status_of(("host", "lab.example"), https, names=names) is None


@pytest.mark.parametrize("word", ["*", "*.example", "http://lab", "lab/", "lab:port", "a b", "@"])
def test_a_pattern_is_no_name(word: str) -> None:
    with pytest.raises(UsageError, match="not a host name"):
        access.parse_names(f"lab.example,{word}")


def test_what_is_refused_is_told_in_one_line_without_controls() -> None:
    for host in ("evil\x1b]52;c;x\x07.example", "e" * 5000, "\xff\r\nX: y"):
        answer = refusal(asked(("host", host)), NAMES)
        assert answer
        assert answer.body.count(b"\n") == 1 and len(answer.body) < 500
        assert all(32 <= byte < 127 for byte in answer.body[:-1])


def test_where_another_name_may_be_added_the_way_is_told() -> None:
    gate = Gate(NAMES, KEY, None, "hint", "; `-e NAMES=NAME` adds one")
    answer = gate.answer(asked(("host", "lab.example")))
    assert answer
    assert answer.body.decode() == (
        "Host 'lab.example' is not served here; served are: 127.0.0.1, [::1], localhost; "
        "`-e NAMES=NAME` adds one\n"
    )


# --- tokens ---------------------------------------------------------------------------------


def test_a_token_opens_once_and_leaves_no_trace(tmp_path: Path) -> None:
    folder, token = tmp_path / "x.tokens", new_secret()
    access.admit(folder, token)
    assert folder.stat().st_mode & 0o777 == 0o700
    [kept] = folder.iterdir()
    assert kept.stat().st_mode & 0o777 == 0o600
    assert token not in kept.name and kept.read_bytes() == b""
    assert not access.spend(folder, token[:-1])
    assert access.spend(folder, token)
    assert not access.spend(folder, token)
    assert not access.spend(tmp_path / "nowhere", token)


def test_of_two_that_spend_a_token_at_once_one_gets_in(tmp_path: Path) -> None:
    folder, token = tmp_path / "x.tokens", new_secret()
    access.admit(folder, token)
    together, won = threading.Barrier(8), []

    def spend() -> None:
        together.wait()
        won.append(access.spend(folder, token))

    threads = [threading.Thread(target=spend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False] * 7 + [True]


def test_old_tokens_give_way(tmp_path: Path) -> None:
    tokens = [new_secret() for _ in range(40)]
    for token in tokens:
        access.admit(tmp_path / "x", token)
    assert len(list((tmp_path / "x").iterdir())) == 16
    assert access.spend(tmp_path / "x", tokens[-1])
    assert not access.spend(tmp_path / "x", tokens[0])


@pytest.mark.parametrize("token", ["", "short", "../" * 20, "t" * 43 + "\n", "t" * 1000])
def test_what_is_no_token_is_not_admitted(tmp_path: Path, token: str) -> None:
    with pytest.raises(UsageError, match="a token of"):
        access.admit(tmp_path / "x", token)
    assert not (tmp_path / "x").exists()


# --- the gate -------------------------------------------------------------------------------


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    access.admit(tmp_path / "tokens", TOKEN)
    return Gate(NAMES, KEY, tmp_path / "tokens", "`inv webui` tells the way in")


def cookie_of(gate: Gate) -> tuple[str, str]:
    return ("cookie", "other=1; {}={}; more=2".format(*gate.cookie))


def test_without_key_or_cookie_nothing_is_served(gate: Gate) -> None:
    name, value = gate.cookie
    for header in (
        ("x-nothing", ""),
        ("cookie", f"{name}="),
        ("cookie", f"{name}={value[:-1]}"),
        ("cookie", f"other={value}"),
        ("cookie", f"{name}={KEY}"),
        ("authorization", f"Bearer {KEY[:-1]}"),
        ("authorization", f"Basic {KEY}"),
        ("authorization", KEY),
        ("authorization", "Bearer"),
        ("authorization", f"Bearer {value}"),
        ("authorization", "Bearer ÿ"),
    ):
        answer = gate.answer(asked(HERE, header))
        assert answer and answer.status == 403, header
        assert b"`inv webui` tells the way in" in answer.body
    assert gate.answer(asked(HERE, ("authorization", f"bearer {KEY}"))) is None
    assert gate.answer(asked(HERE, cookie_of(gate))) is None


def test_a_secret_does_not_make_another_origin_ours(gate: Gate) -> None:
    """A browser sends the cookie along, whoever had it ask (another port is the same site)."""
    known = (cookie_of(gate), ("authorization", f"Bearer {KEY}"))
    for header in (("origin", "http://127.0.0.1:9"), ("sec-fetch-site", "same-site")):
        answer = gate.answer(asked(HERE, *known, header, method="POST"))
        assert answer and answer.status == 403
    answer = gate.answer(asked(("host", "evil.example"), *known))
    assert answer and answer.status == 421


def test_a_token_becomes_a_strict_cookie(gate: Gate) -> None:
    query = f"x=1&token={TOKEN}"
    for spared in ({"method": "HEAD"}, {"method": "POST"}, {"path": "/config"}):
        answer = gate.answer(asked(HERE, query=query, **spared))
        assert answer and answer.status == 403, "it is not spent by that"
    answer = gate.answer(asked(HERE, query=query))
    assert answer and answer.status == 200
    assert TOKEN.encode() not in answer.body
    cookie = dict(answer.headers)["set-cookie"]
    pair, *attributes = cookie.split("; ")
    assert attributes == ["Path=/", "HttpOnly", "SameSite=Strict"]
    assert KEY not in cookie and TOKEN not in cookie
    again = gate.answer(asked(HERE, query=query))
    assert again and (again.status, b"used already" in again.body) == (403, True)
    # From a history, with the cookie: on to the page without it.
    known = gate.answer(asked(HERE, ("cookie", pair), query=query))
    assert known and known.status == 200
    assert gate.answer(asked(HERE, ("cookie", pair))) is None


def test_the_api_opens_by_its_key_alone(tmp_path: Path) -> None:
    gate = Gate(NAMES, KEY, None, "hint")
    answer = gate.answer(asked(HERE, query=f"token={TOKEN}"))
    assert answer and answer.status == 401
    answer = gate.answer(asked(HERE, cookie_of(gate)))
    assert answer and answer.status == 401
    assert gate.answer(asked(HERE, ("authorization", f"Bearer {KEY}"))) is None


def test_two_services_of_one_machine_have_cookies_of_their_own(gate: Gate) -> None:
    other = Gate(NAMES, "o" * 43, None, "hint")
    assert gate.cookie[0] != other.cookie[0]
    assert gate.cookie[1] != other.cookie[1]


# --- before servers -------------------------------------------------------------------------


def called(gate: Gate, scope: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Return what a gate sent, and the scopes that came to the application."""
    sent: list[Any] = []
    reached: list[Any] = []

    async def application(scope: Any, _receive: Any, send: Any) -> None:
        reached.append(scope)

    async def receive() -> dict[str, Any]:
        return {"type": f"{scope['type']}.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(before_asgi(application, gate)(scope, receive, send))  # type: ignore[arg-type]
    return sent, reached


def scope_of(*headers: tuple[str, str], kind: str = "http") -> dict[str, Any]:
    raw = [(key.encode("latin-1"), value.encode("latin-1")) for key, value in headers]
    scope = {"type": kind, "path": "/gradio_api/queue/join", "query_string": b"", "headers": raw}
    return scope | ({"method": "POST"} if kind == "http" else {})


def test_web_sockets_and_requests_stop_at_the_gate(gate: Gate) -> None:
    known = cookie_of(gate)
    for foreign in (("Origin", "http://evil.example"), ("X-Nothing", "")):
        who = (HERE, foreign, *([known] if foreign[1] else []))
        sent, reached = called(gate, scope_of(*who))
        assert [message.get("status") for message in sent] == [403, None]
        assert not [key for key, _ in sent[0]["headers"] if b"access-control" in key]
        assert reached == []
        sent, reached = called(gate, scope_of(*who, kind="websocket"))
        assert [message["type"] for message in sent] == ["websocket.close"]
        assert reached == []
    own = ("origin", "http://127.0.0.1:7860")
    for kind in ("http", "websocket"):
        sent, reached = called(gate, scope_of(HERE, known, own, kind=kind))
        assert (sent, len(reached)) == ([], 1)
    assert called(gate, {"type": "lifespan"})[1] == [{"type": "lifespan"}]


def test_gradio_is_not_told_of_another_host(gate: Gate) -> None:
    """It would build the addresses of its scripts from it."""
    known = (HERE, cookie_of(gate), ("X-Forwarded-Host", "evil.example"), ("X-Other", "1"))
    [scope] = called(gate, scope_of(*known))[1]
    assert [key for key, _ in scope["headers"]] == [b"host", b"cookie", b"x-other"]


@pytest.fixture
def served(gate: Gate) -> Iterator[int]:
    """The port of a real WSGI server behind the gate."""

    class Quiet(wsgiref.simple_server.WSGIRequestHandler):
        def log_message(self, *_words: object) -> None:
            return None

    def application(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [environ.get("HTTP_X_FORWARDED_HOST", "none").encode()]

    with wsgiref.simple_server.make_server(
        "127.0.0.1", 0, before_wsgi(application, gate), handler_class=Quiet
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def fetch(port: int, *headers: tuple[str, str], path: str = "/") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.putrequest("GET", path, skip_host=any(key == "Host" for key, _ in headers))
    for key, value in headers:
        connection.putheader(key, value)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_a_wsgi_server_behind_the_gate(served: int, gate: Gate) -> None:
    known = ("Cookie", "{}={}".format(*gate.cookie))
    assert fetch(served)[0] == 403
    assert fetch(served, known, ("X-Forwarded-Host", "evil.example")) == (200, b"none")
    assert fetch(served, known, ("Host", "evil.example"))[0] == 421
    assert fetch(served, known, ("Origin", "http://evil.example"))[0] == 403
    status, page = fetch(served, path=f"/?token={TOKEN}")
    assert (status, b"refresh" in page) == (200, True)
    assert fetch(served, path=f"/?token={TOKEN}")[0] == 403


def test_the_holder_of_a_port_is_known(served: int) -> None:
    import os

    assert access.holders(served) == {os.getuid()}
    connection = http.client.HTTPConnection("127.0.0.1", served)
    connection.connect()
    assert connection.sock is not None
    assert access.holders(connection.sock.getsockname()[1]) == set(), "it does not listen"
    connection.close()
