"""The machine's Docker engine under another name: python docker_socket.py SOCKET.

So that a replica host has an engine of its own, at the path where the replica sees it.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path

ENGINE = "/var/run/docker.sock"


async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    """Pass bytes on; the end of one direction leaves the other open."""
    with contextlib.suppress(ConnectionError):
        while piece := await source.read(1 << 16):
            target.write(piece)
            await target.drain()
        target.write_eof()


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass one connection on."""
    there, back = await asyncio.open_unix_connection(ENGINE)
    await asyncio.gather(copy(reader, back), copy(there, writer))
    for one in (back, writer):
        one.close()


async def main(path: Path) -> None:
    """Listen until the process is ended."""
    server = await asyncio.start_unix_server(serve, path)
    path.chmod(0o666)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
