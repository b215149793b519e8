"""Access control of web services: exact Host and Origin, and a secret.

Listening on loopback keeps out neither a web page (through a name that resolves to 127.0.0.1, DNS
rebinding, or a cross-origin request) nor other users of the same machine. So every request needs a
Host from the allow-list, the Origin of that same Host, and either the service's key or the cookie
given in exchange for the token of a printed address. A token works once; only its digest is
stored, as the name of an empty file.

All services use the same decision (`Gate.answer`), placed before ASGI (LLaMA Board, the API) or
WSGI (TensorBoard) applications. Standard library only, Python 3.10.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import re
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from tunesmith.core.errors import UsageError

# Variable with further names of a container's service, which can be published under any name.
ALLOWED = "TUNESMITH_ALLOWED_HOSTS"
# The local end of a tunnel has its own port, so loopback is allowed with any port: a browser that
# uses these names addresses this machine, and rebinding needs another name.
LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "[::1]"})
_WILDCARDS = ("", "0.0.0.0", "::", "[::]")  # noqa: S104 - recognised, not bound
_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9]([a-z0-9._-]*[a-z0-9])?)(:[0-9]{1,5})?")
_ORIGIN = re.compile(r"(https?)://(.+)")
_USUAL_PORTS = {"http": ":80", "https": ":443"}
_TOKEN = re.compile(r"[A-Za-z0-9_-]{43,128}")
# The most printed, unused addresses; the oldest are dropped.
_TOKENS_KEPT = 16
# Sec-Fetch-Site values of the user's own actions and of our own pages.
_OWN_SITES = ("none", "same-origin")
# Gradio would build its page's addresses from these headers, whoever sent them.
_FORWARDED = frozenset(
    {"forwarded", "x-forwarded-host", "x-forwarded-port", "x-forwarded-prefix", "x-original-host"}
)

Scope = Mapping[str, Any]
Message = Mapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]
Environ = dict[str, Any]
Wsgi = Callable[[Environ, Callable[..., Any]], Iterable[bytes]]


@dataclass(frozen=True)
class Request:
    """The checked parts of a request. Header names are lower case and may occur several times."""

    method: str
    path: str
    query: str
    headers: Sequence[tuple[str, str]]

    def values(self, name: str) -> list[str]:
        """Return all values of a header."""
        return [value for key, value in self.headers if key == name]


@dataclass(frozen=True)
class Answer:
    """An answer given instead of the service's."""

    status: int
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()


def names_of(listen: str, extra: Iterable[str] = ()) -> frozenset[str]:
    """Return the allow-list of a service: loopback, the address it listens on, and `extra`."""
    own = f"[{listen}]" if ":" in listen and not listen.startswith("[") else listen
    return LOOPBACK_NAMES | {*extra} | ({own.lower()} - {*_WILDCARDS})


def parse_names(text: str) -> tuple[str, ...]:
    """Return the names of a comma-separated list, each NAME (any port) or NAME:PORT.

    Raises UsageError for anything else.
    """
    names = [word.strip().lower() for word in text.split(",") if word.strip()]
    for word in names:
        if not _AUTHORITY.fullmatch(word):
            raise UsageError(
                f"{word!r} is not a host name: expected NAME or NAME:PORT, separated by commas "
                "(no pattern, no scheme)"
            )
    return tuple(names)


def refusal(request: Request, names: Collection[str], remedy: str = "") -> Answer | None:
    """Return the answer to a request that a foreign page may have caused, None for other requests.

    Pure: it uses only the request. `remedy` says how to allow another name. Refused are other Hosts
    (421), other Origins, including `null`, and requests that the browser marks as cross-site (403).
    A navigation of the whole tab with a token passes, because it needs the right token.
    """
    hosts, origins = request.values("host"), request.values("origin")
    if not request.path.startswith("/"):
        return _plain(400, "expected a path, not the address of a host")
    if len(hosts) != 1 or not _is_listed(hosts[0], names):
        listed = ", ".join(sorted(names))
        line = f"Host {_shown(hosts)} is not served here; served are: {listed}{remedy}"
        return _plain(421, line)
    if origins and (len(origins) > 1 or not _is_same(origins[0], hosts[0])):
        return _plain(403, f"Origin {_shown(origins)} differs from Host {_shown(hosts)}")
    foreign = [site for site in request.values("sec-fetch-site") if site not in _OWN_SITES]
    if foreign and not (_navigates(request) and _token(request)):
        return _plain(403, "requested by a page of another site; type the address yourself")
    return None


def _is_listed(host: str, names: Collection[str]) -> bool:
    match = _AUTHORITY.fullmatch(host.lower())
    return match is not None and (match[1] in names or host.lower() in names)


def _is_same(origin: str, host: str) -> bool:
    """Whether a page of `origin` has the address `host`; a missing port is the default one."""
    match = _ORIGIN.fullmatch(origin.lower())
    if match is None or not _AUTHORITY.fullmatch(match[2]):
        return False
    usual = _USUAL_PORTS[match[1]]
    return match[2].removesuffix(usual) == host.lower().removesuffix(usual)


def _navigates(request: Request) -> bool:
    """Whether the request is a navigation of the whole tab, not of a frame or a script."""
    mode, aim = request.values("sec-fetch-mode"), request.values("sec-fetch-dest")
    return (request.method, mode, aim) == ("GET", ["navigate"], ["document"])


def _token(request: Request) -> str | None:
    """Return the token of an address, or None."""
    if request.method != "GET" or request.path != "/":
        return None
    given = parse_qs(request.query).get("token", [])
    return given[0] if len(given) == 1 and _TOKEN.fullmatch(given[0]) else None


def _shown(values: Sequence[str]) -> str:
    return repr(", ".join(values)[:100]) if values else "(none)"


def _plain(status: int, line: str, *more: tuple[str, str]) -> Answer:
    ascii_line = line.encode("ascii", "backslashreplace") + b"\n"
    return Answer(status, ascii_line, (("content-type", "text/plain; charset=utf-8"), *more))


def admit(folder: Path, token: str) -> None:
    """Allow a token to be exchanged once, at any time; only its digest is stored, privately.

    Raises UsageError if it is not one of ours (43 or more URL-safe characters).
    """
    if not _TOKEN.fullmatch(token):
        raise UsageError(f"a token of {len(token)} characters; expected 43 or more, URL-safe")
    folder.mkdir(mode=0o700, exist_ok=True)
    waiting = []
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # used meanwhile
            waiting.append((file.stat().st_mtime_ns, file))
    for _, file in sorted(waiting)[: max(0, len(waiting) + 1 - _TOKENS_KEPT)]:
        file.unlink(missing_ok=True)
    (folder / _digest(token)).touch(mode=0o600)


def spend(folder: Path, token: str) -> bool:
    """Use up a token; return whether it was valid. Of two simultaneous calls one gets True."""
    try:
        (folder / _digest(token)).unlink()
    except FileNotFoundError:
        return False
    return True


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


@dataclass(frozen=True)
class Gate:
    """The access check before a service.

    `key` grants access as `Authorization: Bearer KEY`. `tokens` is the folder of tokens that
    browsers exchange for a cookie, None if only the key is accepted. `hint` says how to get
    access, `remedy` how to allow another name of the service, if that is possible.
    """

    names: frozenset[str]
    key: str
    tokens: Path | None
    hint: str
    remedy: str = ""

    @property
    def cookie(self) -> tuple[str, str]:
        """Name and value. Browsers store cookies per host, ignoring the port, so other services
        on loopback must not share the name; the value does not reveal the key."""
        name = hashlib.sha256(self.key.encode()).hexdigest()[:12]
        value = hmac.new(self.key.encode(), b"cookie", hashlib.sha256).hexdigest()
        return f"tunesmith-{name}", value

    def answer(self, request: Request) -> Answer | None:
        """Return the answer of the gate, None if the service may answer."""
        refused = refusal(request, self.names, self.remedy)
        if refused is not None:
            return refused
        token = _token(request) if self.tokens else None
        if self.tokens and token and spend(self.tokens, token):
            return self._welcome()
        if self._is_authorized(request):
            # A used token from the browser's history: remove it from the address.
            return self._welcome() if token else None
        if self.tokens is None:
            scheme = ("www-authenticate", "Bearer")
            return _plain(401, f"`Authorization: Bearer KEY` is required; {self.hint}", scheme)
        what = "this address was used already" if token else "no cookie of this service"
        return _plain(403, f"{what}; {self.hint}")

    def _is_authorized(self, request: Request) -> bool:
        name, value = self.cookie
        good, authorized = value.encode(), False
        for header in request.values("cookie"):
            for part in header.split(";"):
                key, _, given = part.strip().partition("=")
                same = hmac.compare_digest(given.encode("utf-8", "replace"), good)
                authorized |= same and key == name and self.tokens is not None
        for header in request.values("authorization"):
            scheme, _, given = header.strip().partition(" ")
            same = hmac.compare_digest(
                given.strip().encode("utf-8", "replace"), self.key.encode("utf-8", "replace")
            )
            authorized |= same and scheme.lower() == "bearer"
        return authorized

    def _welcome(self) -> Answer:
        """Set the cookie, and continue without the token in the address.

        With a page instead of a redirect: a strict cookie is not sent on the redirect of a
        navigation that started elsewhere (a link in a web terminal, the file that opens the
        browser).
        """
        name, value = self.cookie
        page = (
            b'<!doctype html><meta charset="utf-8"><title>tunesmith</title>'
            b'<meta http-equiv="refresh" content="0; url=/">\n'
        )
        return Answer(
            200,
            page,
            (
                ("content-type", "text/html; charset=utf-8"),
                ("set-cookie", f"{name}={value}; Path=/; HttpOnly; SameSite=Strict"),
                ("referrer-policy", "no-referrer"),
            ),
        )


def _headers(answer: Answer) -> list[tuple[str, str]]:
    """Return the headers of our own answer, which must not be cached."""
    return [
        *answer.headers,
        ("content-length", str(len(answer.body))),
        ("cache-control", "no-store"),
        ("x-content-type-options", "nosniff"),
    ]


def holders(port: int) -> set[int]:
    """Return the user ids that listen on a port of this machine, from /proc/net/tcp."""
    users = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in table.read_text().splitlines()[1:] if table.exists() else ():
            fields = line.split()
            if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                users.add(int(fields[7]))
    return users


def before_asgi(app: Asgi, gate: Gate) -> Asgi:
    """Return the application behind a gate, for HTTP and web sockets alike."""

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):  # startup and shutdown
            await app(scope, receive, send)
            return
        pairs = [(key.lower(), value) for key, value in scope["headers"]]
        headers = [(key.decode("latin-1"), value.decode("latin-1")) for key, value in pairs]
        query = scope["query_string"].decode("latin-1")
        request = Request(scope.get("method", "GET"), scope["path"], query, headers)
        answer = gate.answer(request)
        if answer is None:
            own = [pair for pair in pairs if pair[0].decode("latin-1") not in _FORWARDED]
            await app({**scope, "headers": own}, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})  # the server sends a 403
        else:
            # An unread request body may still arrive.
            closing = [*_headers(answer), ("connection", "close")]
            sent = [(key.encode(), value.encode()) for key, value in closing]
            await send({"type": "http.response.start", "status": answer.status, "headers": sent})
            body = b"" if request.method == "HEAD" else answer.body
            await send({"type": "http.response.body", "body": body})

    return guarded


def before_wsgi(app: Wsgi, gate: Gate) -> Wsgi:
    """Return the application behind a gate."""

    def guarded(environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        headers = [
            (key[5:].lower().replace("_", "-"), str(value))
            for key, value in environ.items()
            if key.startswith("HTTP_")
        ]
        method, query = environ["REQUEST_METHOD"], environ.get("QUERY_STRING", "")
        answer = gate.answer(Request(method, environ.get("PATH_INFO", ""), query, headers))
        if answer is None:
            hidden = {f"HTTP_{name.upper().replace('-', '_')}" for name in _FORWARDED}
            own = {key: value for key, value in environ.items() if key not in hidden}
            return app(own, start_response)
        line = f"{answer.status} {HTTPStatus(answer.status).phrase}"
        start_response(line, _headers(answer))
        return [b"" if method == "HEAD" else answer.body]

    return guarded
