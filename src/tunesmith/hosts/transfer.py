"""Files to and from a host, by rsync over the inventory's ssh_config.

rsync sends what differs, goes on where a connection was cut, and is restarted here when it
is. Whether what arrived is right is not its word: the callers compare sha256.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from tunesmith.errors import TunesmithError, UsageError
from tunesmith.hosts import reasons
from tunesmith.hosts.remote import Remote

# rsync(1), EXIT VALUES: socket, stream and timeout errors; 255 is ssh's own.
_CUT = (10, 12, 30, 35, 255)
_NOT_FOUND = 127
# Seconds without a byte after which a connection counts as cut.
_STALLED = 20
_ATTEMPTS = 20

Tell = Callable[[str], None]


def upload(remote: Remote, files: Mapping[str, Path], folder: str, tell: Tell) -> None:
    """Bring files into a folder of the host: relative name -> file here.

    Files that are there with the same size and time stamp are not sent again.
    """
    with tempfile.TemporaryDirectory(prefix="tunesmith-upload-") as scratch:
        # A tree of links, so that one rsync has names of our choice.
        for name, source in files.items():
            link = Path(scratch) / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(source.absolute())
        target = f"{remote.name}:{shlex.quote(folder)}/"
        # mkdir and rsync at the far end in one command; --mkpath needs rsync 3.2.3 there.
        far = f"mkdir -p {shlex.quote(folder)} && rsync"
        options = ["-rtLz", "--partial-dir=.rsync-partial", f"--rsync-path={far}"]
        _rsync(remote, [*options, f"{scratch}/", target], tell)


def download(remote: Remote, folder: str, names: Iterable[str], into: Path, tell: Tell) -> None:
    """Bring files below a folder of the host under the same names below `into`.

    Half a file stays where it is and is gone on with, so `into` must be a folder for
    incomplete things.
    """
    with tempfile.NamedTemporaryFile("w", prefix="tunesmith-names-", suffix=".txt") as listed:
        listed.write("".join(f"{name}\n" for name in names))
        listed.flush()
        source = f"{remote.name}:{shlex.quote(folder)}/"
        options = ["-tz", "--inplace", "--no-whole-file", f"--files-from={listed.name}"]
        into.mkdir(parents=True, exist_ok=True)
        _rsync(remote, [*options, source, f"{into}/"], tell)


def _rsync(remote: Remote, arguments: list[str], tell: Tell) -> None:
    """Run rsync until it is through; a cut connection is taken up again.

    Raises UsageError when there is no rsync, here or there; TunesmithError when it fails.
    """
    program = shutil.which("rsync")
    if program is None:
        raise UsageError(
            "rsync is not installed here; `apt-get install rsync` (Debian, Ubuntu, WSL2) or "
            "`brew install rsync` (macOS) brings it"
        )
    # Of its own, so that a kept connection that hangs cannot hold it up.
    through = shlex.join(
        ["ssh", "-F", str(remote.config), "-o", "BatchMode=yes", "-o", "ControlPath=none"]
    )
    argv = [program, f"--timeout={_STALLED}", "-e", through, *arguments]
    wait = 1.0
    for attempt in range(1, _ATTEMPTS + 1):
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            return
        said = done.stderr.strip()
        if done.returncode == _NOT_FOUND or "rsync: command not found" in said:
            raise UsageError(
                f"{remote.name} has no rsync; `inv provision --on {remote.name}` installs it"
            )
        if done.returncode not in _CUT:
            break
        if done.returncode == 255:
            kind = reasons.kind_of(said, jump=remote.host.jump is not None)
            if kind in ("wrong_key", "changed", "unpinned"):
                where, line = remote.host.address, reasons.last_line(said)
                raise TunesmithError(reasons.message(kind, remote.name, where, line))
        tell(f"the connection was cut ({reasons.last_line(said)}); going on (attempt {attempt})")
        time.sleep(wait)
        wait = min(2 * wait, 15.0)
    raise TunesmithError(
        f"{remote.name}: rsync failed with exit code {done.returncode}; the same command goes on "
        "where it ended",
        done.stderr.strip().splitlines()[-5:],
    )
