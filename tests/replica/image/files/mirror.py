"""Serve /srv/mirror on 127.0.0.1:8099, or answer as a sick mirror would.

/etc/replica/mirror has one fault a line: a path's beginning and what happens to it, a
status (`/conda-forge 503`), `stall` (no answer) or `cut` (half of the body, then the end).
/var/log/mirror.log has one line a request.
"""

from __future__ import annotations

import http.server
import io
import time
from pathlib import Path
from typing import BinaryIO

FAULTS = Path("/etc/replica/mirror")
STALL_SECONDS = 600


class Handler(http.server.SimpleHTTPRequestHandler):
    """Static files with faults."""

    def send_head(self) -> io.BytesIO | BinaryIO | None:
        for line in FAULTS.read_text().splitlines() if FAULTS.exists() else ():
            start, _, what = line.partition(" ")
            if not self.path.startswith(start):
                continue
            if what == "stall":
                time.sleep(STALL_SECONDS)
                return None
            if what == "cut":
                head = super().send_head()
                content = head.read() if head else b""
                self.close_connection = True
                return io.BytesIO(content[: len(content) // 2])
            self.send_error(int(what))
            return None
        return super().send_head()


class Server(http.server.ThreadingHTTPServer):
    """One thread a request; a stalled one does not hold the others."""

    daemon_threads = True


def main() -> None:
    """Serve until ended."""
    Handler.protocol_version = "HTTP/1.0"
    Server(("127.0.0.1", 8099), lambda *a: Handler(*a, directory="/srv/mirror")).serve_forever()


if __name__ == "__main__":
    main()
