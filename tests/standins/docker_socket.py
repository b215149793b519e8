"""The machine's Docker engine under another name: python docker_socket.py SOCKET [HOST].

So that a replica host has an engine of its own, at the path where the replica sees it. HOST is
the replica's container: what is to have the host's network gets that one's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sys
from functools import partial
from pathlib import Path

ENGINE = "/var/run/docker.sock"
_CREATE = re.compile(rb"POST \S*/containers/create\b")
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
_UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)


async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    """Pass bytes on; the end of one direction leaves the other open."""
    with contextlib.suppress(ConnectionError):
        while piece := await source.read(1 << 16):
            target.write(piece)
            await target.drain()
        target.write_eof()


async def ask(source: asyncio.StreamReader, target: asyncio.StreamWriter, host: str) -> None:
    """Pass requests on, one after the other; a stream is passed on as it is."""
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        while True:
            head = await source.readuntil(b"\r\n\r\n")
            length = _LENGTH.search(head)
            body = await source.readexactly(int(length[1])) if length else b""
            if _CREATE.match(head) and length:
                body = on_host(body, host)
                head = _LENGTH.sub(b"\r\nContent-Length: %d" % len(body), head)
            target.write(head + body)
            await target.drain()
            while _CHUNKED.search(head):
                size = await source.readline()
                rest = await source.readexactly(int(size, 16) + 2)
                target.write(size + rest)
                await target.drain()
                if rest == b"\r\n":
                    break
            if _UPGRADE.search(head):
                break
    await copy(source, target)


def on_host(body: bytes, host: str) -> bytes:
    """Return what a container is made from, with the host's network where it asks for that."""
    asked = json.loads(body)
    if asked.get("HostConfig", {}).get("NetworkMode") == "host":
        asked["HostConfig"]["NetworkMode"] = f"container:{host}"
    return json.dumps(asked).encode()


async def serve(host: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass one connection on."""
    there, back = await asyncio.open_unix_connection(ENGINE)
    way = ask(reader, back, host) if host else copy(reader, back)
    await asyncio.gather(way, copy(there, writer))
    for one in (back, writer):
        one.close()


async def main(path: Path, host: str) -> None:
    """Listen until the process is ended."""
    server = await asyncio.start_unix_server(partial(serve, host), path)
    path.chmod(0o666)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), *(sys.argv[2:] or [""])))
