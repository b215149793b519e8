"""The check phase: LLaMA-Factory's own parser, asked before anything that costs.

It is asked with the config as an attempt on this machine would run it, loads no model and reads no
rows: seconds for its imports, a hundredth of one for the answer. Where a base model is to be
downloaded, that is a phase of its own before it; where the model lies here already, the first phase
asks in a moment what its own start has imported (`beside`), and the check phase is over at once.

`python -m tunesmith.job.training.config_check REQUEST RESULT` asks for a config without a run
(plan/parser.py).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from tunesmith.basemodel import store
from tunesmith.core.documents import Arguments, JsonObject
from tunesmith.core.errors import TunesmithError
from tunesmith.core.files import read_json, write_json
from tunesmith.job.patches import imports
from tunesmith.job.run.codec import decode
from tunesmith.job.run.folder import RunFolder
from tunesmith.job.run.schema import RunRequest
from tunesmith.job.training import parser, phase

# What torchrun tells a process; one that is alone among several GPUs is told so here.
_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def run(run_dir: Path, request: RunRequest, _emit: Callable[..., None]) -> dict[str, Any]:
    """Ask the parser, unless the base model lies here already.

    Raises JobError of class `config` with LLaMA-Factory's sentence.
    """
    asked = request.fetch
    if asked is not None and store.is_here(Path(asked.store), asked.name, asked.revision):
        return {"asked": False}
    _import_parser_alone()
    with _as_one_of_several():
        parser.refuse(_of_run(run_dir, request))
    return {"asked": True}


def _import_parser_alone() -> None:
    with imports.parser_alone():
        importlib.import_module(parser.MODULE)


def beside(run_dir: Path, request: RunRequest) -> None:
    """Ask the parser in a fork: it leaves seeds, variables and a process group behind.

    Nothing may have touched the GPU before. Raises JobError as `run`. What the fork met besides
    is in the log: an error of the machine meets the phase itself in a moment.
    """
    imports.trim()
    importlib.import_module(parser.MODULE)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _tell(run_dir, request, writer)
    os.close(writer)
    with os.fdopen(reader) as stream:
        told = stream.read()
    os.waitpid(child, 0)
    if told:
        raise parser.Refusal(**json.loads(told)).error()


def _tell(run_dir: Path, request: RunRequest, writer: int) -> NoReturn:
    """Write the parser's refusal, if there is one, and end this process."""
    try:
        with _as_one_of_several(), os.fdopen(writer, "w") as stream:
            if found := parser.refusal(_of_run(run_dir, request)):
                json.dump(asdict(found), stream)
    except BaseException:  # noqa: BLE001 - it must end here, whatever it is
        traceback.print_exc()
    finally:
        os._exit(0)


@contextlib.contextmanager
def _as_one_of_several() -> Iterator[None]:
    """Where several processes would train: let this one be the first, in a group of its own.

    The parser has rules for that, and refuses several GPUs without it.
    """
    if phase.process_count() == 1 or "RANK" in os.environ:
        yield
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    values = ("0", "0", "1", "1", "127.0.0.1", str(port))
    os.environ |= dict(zip(_RANK, values, strict=True))
    try:
        yield
    finally:
        for name in _RANK:
            del os.environ[name]


def _of_run(run_dir: Path, request: RunRequest) -> Arguments:
    """Return the config of a run's training or prediction, fitted to this machine."""
    folder = RunFolder(run_dir)
    if "train" in request.needed_phases():
        return phase.fitted(phase.arguments(folder), request)
    return dict(request.predict or {})


def answer(asked: Mapping[str, Any]) -> JsonObject:
    """Return what the parser says: {} or {"error", "hint"}.

    `asked` has `config`, the `kind` of its parser, and the `request` of a training.
    """
    config, kind = dict(asked["config"]), str(asked["kind"])
    if asked.get("request"):
        config = phase.fitted(config, decode(RunRequest, asked["request"]))
    with _as_one_of_several():
        found = parser.refusal(config, kind)
    return {"error": found.message, "hint": found.hint} if found else {}


def main(argv: Sequence[str]) -> int:
    """Answer the file REQUEST in the file RESULT."""
    _import_parser_alone()
    try:
        write_json(Path(argv[1]), answer(read_json(Path(argv[0]))))
    except TunesmithError as error:
        print(error.render(), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
