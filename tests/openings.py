"""Run a command of ours in this process, and write down what the process opened and started.

As `python openings.py RECORD inv|image WORD ...`: RECORD becomes {"read": {path: times},
"started": [[word, ...], ...]}. What other processes read is not in it.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any


def main() -> int:
    """Do what the words say; return the exit code."""
    record, command, *words = sys.argv[1:]
    read: Counter[str] = Counter()
    started: list[list[str]] = []

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | os.PathLike):
            if (arguments[2] or 0) & os.O_ACCMODE == os.O_RDONLY:
                read[str(Path(arguments[0]).absolute())] += 1
        elif event == "subprocess.Popen":
            started.append([str(word) for word in arguments[1]])

    sys.addaudithook(note)
    sys.argv = [command, *words]
    try:
        return _inv() if command == "inv" else _image(words)
    finally:
        Path(record).write_text(json.dumps({"read": read, "started": started}), encoding="utf-8")


def _inv() -> int:
    from invoke.main import program

    try:
        program.run()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def _image(words: list[str]) -> int:
    from tunesmith.cli import container, container_checks

    # What an image has mounted; here a mount that every Linux has.
    container_checks.WORKSPACE = Path("/dev/shm")
    return container.main(words)


if __name__ == "__main__":
    sys.exit(main())
