"""Files to and from a host, by rsync over the inventory's ssh_config.

rsync sends what differs, goes on where a connection was cut, and is restarted here when it
is. Whether what arrived is right is not its word: the callers compare sha256.
"""

from __future__ import annotations

import functools
import re
import resource
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from tunesmith.core.callbacks import OnBytes, OnText
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.hosts import ssh_errors
from tunesmith.hosts.remote import FloodError, Remote, last_words, pieces

# rsync(1), EXIT VALUES: socket, stream and timeout errors; 255 is ssh's own.
_CUT = (10, 12, 30, 35, 255)
_NOT_FOUND = 127
# Seconds without a byte after which a connection counts as cut.
_STALLED = 20
_ATTEMPTS = 20
# Plain numbers, of all files together; and of those that need not be sent their names.
_COUNTED = ("--no-human-readable", "--info=progress2,name2")
_COUNT = re.compile(r"\s*(\d{1,19})\s+\d{1,3}%")
_THERE = " is uptodate"
# Contents only, whatever the other end or somebody's ~/.popt would like.
_PLAIN = ("--no-links", "--no-devices", "--no-specials", "--no-perms", "--no-owner", "--no-group")
_LONGEST_LINE = 8192
# What a file may have grown by since its size was asked.
_GROWTH = 256 << 20
_VERSION = re.compile(r"rsync +version v?(\d+)\.(\d+)")


def upload(
    remote: Remote,
    files: Mapping[str, Path],
    folder: str,
    tell: OnText,
    moved: OnBytes | None = None,
) -> None:
    """Bring files into a folder of the host: relative name -> file here.

    Files that are there with the same size and time stamp are not sent again.
    """
    sizes = {name: source.stat().st_size for name, source in files.items()}
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
        _rsync(remote, [*options, f"{scratch}/", target], tell, _Count(sizes, moved))


def download(
    remote: Remote,
    folder: str,
    sizes: Mapping[str, int],
    into: Path,
    tell: OnText,
    moved: OnBytes | None = None,
) -> None:
    """Bring files below a folder of the host under the same names below `into`.

    `sizes` has their names, with the bytes of each; a file that grows beyond the largest of them
    ends it with TunesmithError. Half a file stays where it is and is gone on
    with, so `into` must be a folder for incomplete things.
    """
    with tempfile.NamedTemporaryFile("w", prefix="tunesmith-names-", suffix=".txt") as listed:
        listed.write("".join(f"{name}\0" for name in sizes))
        listed.flush()
        source = f"{remote.name}:{shlex.quote(folder)}/"
        options = ["-tz", "--inplace", "--no-whole-file", *_PLAIN]
        options += ["--from0", f"--files-from={listed.name}"]
        into.mkdir(parents=True, exist_ok=True)
        largest = max(sizes.values(), default=0) + _GROWTH
        _rsync(remote, [*options, source, f"{into}/"], tell, _Count(sizes, moved), largest)


class _Count:
    """Reads off rsync's output how far it is.

    What the far end has of a file that was cut off counts as it is compared; a file that it has
    in full is told by its name, and left out of rsync's own count.
    """

    def __init__(self, sizes: Mapping[str, int], moved: OnBytes | None) -> None:
        self._sizes, self._moved = sizes, moved
        self._total = sum(sizes.values())
        self._there = self._most = 0
        self.options: Sequence[str] = _COUNTED if moved else ()

    def begin(self) -> None:
        """Read another rsync, which looks at all files again."""
        self._there = 0

    def hear(self, line: str) -> None:
        """Take one line of its output."""
        if self._moved is None:
            return
        count = _COUNT.match(line)
        if line.endswith(_THERE):
            self._there += self._sizes.get(line.removesuffix(_THERE), 0)
        done = self._there + (int(count[1]) if count else 0)
        if done > self._most:
            # Never back: after a cut what is there is counted from its beginning.
            self._most = min(done, self._total)
            self._moved(self._most, self._total)


def _rsync(
    remote: Remote,
    arguments: list[str],
    tell: OnText,
    count: _Count,
    largest: int | None = None,
) -> None:
    """Run rsync until it is through; a cut connection is taken up again.

    It may write no file of more than `largest` bytes. Raises UsageError when there is no rsync,
    here or there; TunesmithError when it fails.
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
    # Only who is to be told how far it is has to know.
    counted = count.options if count.options and counts(_version(program)) else ()
    argv = [program, f"--timeout={_STALLED}", "-e", through, *counted, *arguments]
    wait = 1.0
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            code, said = _run(argv, count, largest)
        except FloodError as flood:
            raise remote.flooded(flood) from None
        if code == 0:
            return
        if code == _NOT_FOUND or "rsync: command not found" in said:
            raise UsageError(
                f"{remote.name} has no rsync",
                hint=f"`inv provision --on {remote.name}` installs it",
            )
        if largest is not None and (code == -signal.SIGXFSZ or "File too large" in said):
            raise TunesmithError(
                f"{remote.name} sent a file of more bytes than it had told; nothing of it is used"
            )
        if code not in _CUT:
            break
        if code == 255:
            kind = ssh_errors.kind_of(said, jump=remote.host.jump is not None)
            if kind in ("wrong_key", "changed", "unpinned"):
                where, line = remote.host.address, ssh_errors.last_line(said)
                raise ssh_errors.reason(kind, remote.name, where, line).error()
        tell(f"the connection was cut ({ssh_errors.last_line(said)}); going on (attempt {attempt})")
        time.sleep(wait)
        wait = min(2 * wait, 15.0)
    raise TunesmithError(
        f"{remote.name}: rsync failed with exit code {code}; the same command goes on where it "
        "ended",
        said.splitlines()[-5:],
    )


def _version(program: str) -> str:
    argv = [program, "--version"]
    return subprocess.run(argv, capture_output=True, text=True, check=False).stdout


def counts(version: str) -> bool:
    """Whether an rsync that says this of itself can say how far it is: 3.1 and later.

    macOS has one "compatible with 2.6.9"; it moves files as well, without a count.
    """
    found = _VERSION.search(version)
    return found is not None and (int(found[1]), int(found[2])) >= (3, 1)


def _run(argv: Sequence[str], count: _Count, largest: int | None) -> tuple[int, str]:
    """Run an rsync to its end; return its exit code and what it said to stderr.

    No file that it writes grows beyond `largest` bytes.
    """
    count.begin()
    with tempfile.TemporaryFile() as errors:
        with subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            preexec_fn=None if largest is None else functools.partial(_bound, largest),
        ) as process:
            assert process.stdout is not None
            try:
                for line in _lines(process.stdout, errors):
                    count.hear(line)
            except BaseException:
                process.kill()  # Ctrl-C, above all
                raise
        return process.returncode, last_words(errors).strip()


def _bound(largest: int) -> None:
    """Let this process, before it becomes rsync, write no larger file: setrlimit(2).

    The far end says what it sends; that it is what was agreed is for us to see to.
    """
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))


def _lines(stdout: IO[bytes], errors: IO[bytes]) -> Iterator[str]:
    """Yield lines as they come; rsync ends those of its progress with a carriage return.

    Of a line without an end, which is none of rsync's, the beginning is dropped.
    """
    rest = b""
    for piece in pieces(stdout, errors):
        *whole, rest = re.split(rb"[\r\n]", rest[-_LONGEST_LINE:] + piece)
        yield from (line.decode(errors="replace") for line in whole)
