"""What a client asks of a host's runs: `python -m tunesmith.job.agent --runs DIR VERB ...`.

create             make a run: {"run_id", "request", "config", "inputs"} on stdin
renew RUN          give an idle run another request: {"request", "inputs"} on stdin
start RUN [PHASE]  start its phases, detached; a run that waits for its turn has started
stop RUN           ask it for a checkpoint and an end
find [RUN]         {"run_id"} of a run, by default the newest
show RUN           {"request", "config", "status"}
runs               {"runs": [status, created, title and path of each]}, oldest first
watch RUN          a line whenever something changes, until the run has ended
manifest RUN       {"files": {name: {"size", "sha256"}}}: what a pull brings
remove RUN         delete an idle run: {"freed": bytes}
afterwards RUN     {"command": [...]} on stdin, run once, after a success: {"code", "why"}
resume-all         start the runs that a restart of the host has cut off

The answer is one line of JSON on stdout (watch: many; manifest: lines {"hashing", "total"}
before it). What is refused is {"error", "detail"}, with exit code 2 (nothing was changed)
or 1. Standard library and yaml only, so that an answer takes a tenth of a second.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import yaml

from tunesmith.errors import TunesmithError, UsageError
from tunesmith.files import (
    fsync_folder,
    human_bytes,
    locked,
    read_json,
    sha256_of,
    write_json,
    write_text,
)
from tunesmith.job import gpu, launch, orders
from tunesmith.job.pulled import PARTS, USUAL, manifest, output_of
from tunesmith.job.removal import take_away
from tunesmith.job.rundir import RunFolder, acquire
from tunesmith.job.watch import look, watch

# A folder of a create that was killed: older than any upload's last step takes.
_STALE_SECONDS = 3600.0


def create(runs: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Make a run folder whole, or none. Returns {"run_id", "path"}.

    Inputs are hard links to the uploaded files (copies where that cannot be), so what is
    uploaded later must replace those files, never write into them. Raises UsageError for a
    run that exists or an input that is not what was promised.
    """
    run_id = _name(str(wanted["run_id"]))
    final = runs / run_id
    runs.mkdir(parents=True, exist_ok=True)
    with locked(runs / run_id):
        _sweep(runs)
    if final.exists():
        raise _exists(run_id)
    with tempfile.TemporaryDirectory(prefix=f".{run_id}.incoming-", dir=runs) as temporary:
        run = RunFolder(Path(temporary) / "run")
        run.path.mkdir()
        for name, record in (wanted.get("inputs") or {}).items():
            _take_input(run.path / "inputs", name, record)
        if wanted.get("config") is not None:
            body = yaml.safe_dump(wanted["config"], allow_unicode=True, sort_keys=True)
            write_text(run.config_file, body)
        write_json(run.request_file, wanted["request"])
        try:
            # Over a folder with files in it a rename fails: of two creates one succeeds.
            run.path.rename(final)
        except OSError:
            if not final.exists():
                raise
            raise _exists(run_id) from None
    fsync_folder(runs)
    return {"run_id": run_id, "path": str(final)}


def renew(run: RunFolder, wanted: dict[str, Any]) -> dict[str, Any]:
    """Replace run.json, and inputs, of a run nobody works in; UsageError when somebody does."""
    run.request()
    lock = acquire(run)
    try:
        for name, record in (wanted.get("inputs") or {}).items():
            _take_input(run.path / "inputs", name, record)
        write_json(run.request_file, wanted["request"])
    finally:
        lock.release()
    return {"run_id": run.run_id}


def find(runs: Path, run_id: str | None) -> RunFolder:
    """Return a run, by default the newest. Raises UsageError naming the newest ones."""
    folders = _folders(runs)
    if not folders:
        raise UsageError(f"no runs in {runs}; `inv train` makes one")
    if run_id is None:
        return RunFolder(max(folders, key=lambda f: (f / "run.json").stat().st_mtime))
    for folder in folders:
        if folder.name == run_id:
            return RunFolder(folder)
    shown = ", ".join(folder.name for folder in folders[-5:])
    raise UsageError(f"no run {run_id!r}; the newest are {shown} (`inv runs` lists all)")


def show(run: RunFolder) -> dict[str, Any]:
    """Return request, config (None without one) and status of a run."""
    config = None
    if run.config_file.exists():
        config = yaml.safe_load(run.config_file.read_text(encoding="utf-8"))
    return {"request": run.request(), "config": config, "status": run.status()}


def list_runs(runs: Path) -> list[dict[str, Any]]:
    """Return the status of every run, oldest first.

    One whose files cannot be read is listed as failed, class `damaged`.
    """
    found = []
    for folder in _folders(runs):
        run = RunFolder(folder)
        try:
            request = run.request()
            shown = {"created": request["created"], "title": request["title"]}
            found.append(run.status() | shown | {"path": str(folder)})
        except (TunesmithError, ValueError, KeyError) as error:
            found.append(_damaged(run, error))
    return sorted(found, key=lambda item: (item["created"], item["run_id"]))


def remove(runs: Path, run: RunFolder) -> dict[str, Any]:
    """Delete a run nobody works in. Returns {"freed": bytes} and, under "left", a folder
    of results that lies elsewhere. Raises UsageError when somebody works in it."""
    run.request()
    output = output_of(run)
    doomed = runs / f".{run.run_id}.removed-{os.getpid()}"
    freed = take_away(run, doomed)
    with locked(doomed):
        # Another remove may have swept it up meanwhile.
        if doomed.exists():
            shutil.rmtree(doomed)
        _sweep(runs)
    outside = not output.is_relative_to(run.path) and output.is_dir()
    return {"freed": freed} | ({"left": str(output)} if outside else {})


def afterwards(run: RunFolder, wanted: dict[str, Any]) -> dict[str, Any]:
    """Run a command after a run has succeeded, once. Returns {"code", "why"}: `code` None
    when it could not be run. Raises UsageError when another run needs the host, the run has
    not succeeded, or its command was run before."""
    run.request()
    code, why = orders.once(run, [str(word) for word in wanted["command"]])
    return {"code": code, "why": why}


def resume_all(runs: Path) -> dict[str, Any]:
    """Start every run that ended without a word: power loss, restart, kill -9.

    Those that worked come before those that waited for their turn, then the oldest first.
    One that worked on a GPU is refused while there is none: a host that was started without
    one, to fetch results, has no memory for it either. Returns {"started": [run ids],
    "refused": {run id: message}}.
    """
    cut_off = []
    answer: dict[str, Any] = {"started": [], "refused": {}}
    for folder in _folders(runs):
        run = RunFolder(folder)
        try:
            left = read_json(run.status_file)
            if left["state"] in ("running", "queued") and not run.busy():
                if left.get("gpu") and not gpu.ask():
                    answer["refused"][run.run_id] = _no_gpu(run)
                    continue
                cut_off.append((left["state"] == "queued", str(run.request()["created"]), run))
        except FileNotFoundError:
            continue  # made, but never started
        except (TunesmithError, ValueError, KeyError):
            continue  # damaged: `runs` shows it
    for _, _, run in sorted(cut_off, key=lambda item: (*item[:2], item[2].run_id)):
        try:
            launch.start(run.path, [])
        except TunesmithError as error:
            answer["refused"][run.run_id] = error.message
        else:
            answer["started"].append(run.run_id)
    return answer


def _no_gpu(run: RunFolder) -> str:
    return (
        f"run {run.run_id} worked on a GPU, and there is none now; start the host with one, or "
        f"`inv resume --run {run.run_id}`"
    )


def main(argv: list[str] | None = None) -> int:
    """Do what the command line asks; return the exit code."""
    try:
        given = _parser().parse_args(argv)
        _answer(given)
    except BrokenPipeError:
        # The client is gone. Nothing more can be said, not even at the interpreter's exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except TunesmithError as error:
        _say({"error": error.message, "detail": list(error.detail)})
        return error.exit_code
    except Exception as error:  # noqa: BLE001 - the client understands JSON only
        traceback.print_exc()
        _say({"error": f"{type(error).__name__}: {error}", "detail": []})
        return 1
    return 0


def _answer(given: argparse.Namespace) -> None:
    runs: Path = given.runs.absolute()
    verb: str = given.verb
    if verb in ("create", "runs", "resume-all"):
        whole: dict[str, Callable[[], dict[str, Any]]] = {
            "create": lambda: create(runs, _stdin()),
            "runs": lambda: {"runs": list_runs(runs)},
            "resume-all": lambda: resume_all(runs),
        }
        _say(whole[verb]())
        return
    run = find(runs, given.run)
    if verb == "watch":
        if given.once:
            _say(look(run, given.events, given.log).to_json())
            return
        until = time.monotonic() + given.seconds
        for line in watch(run, given.events, given.log):
            _say(line.to_json())
            if time.monotonic() > until:
                return
        return
    answers: dict[str, Callable[[], dict[str, Any]]] = {
        "renew": lambda: renew(run, _stdin()),
        "start": lambda: _launched(launch.start, run, list(given.phases)),
        "stop": lambda: _launched(launch.stop, run),
        "find": lambda: {"run_id": run.run_id},
        "show": lambda: show(run),
        "manifest": lambda: manifest(run, given.what.split(","), _tell_hashing),
        "remove": lambda: remove(runs, run),
        "afterwards": lambda: afterwards(run, _stdin()),
    }
    _say(answers[verb]())


class _Parser(argparse.ArgumentParser):
    """Refuses in the agent's own way: the client reads stdout."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m tunesmith.job.agent")
    parser.add_argument("--runs", type=Path, required=True, help="folder of run folders")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name in ("create", "runs", "resume-all"):
        verbs.add_parser(name)
    verbs.add_parser("find").add_argument("run", nargs="?")
    for name in ("renew", "start", "stop", "show", "watch", "manifest", "remove", "afterwards"):
        verb = verbs.add_parser(name)
        verb.add_argument("run")
        if name == "start":
            verb.add_argument("phases", nargs="*")
        elif name == "watch":
            verb.add_argument("--events", type=int, default=0, help="byte of events.jsonl")
            verb.add_argument("--log", type=int, default=-1, help="byte of train.log; -1: none")
            verb.add_argument("--once", action="store_true", help="one line, then end")
            verb.add_argument("--seconds", type=float, default=math.inf, help="end after them")
        elif name == "manifest":
            known = ",".join(PARTS)
            verb.add_argument("--what", default=",".join(USUAL), help=f"of {known}")
    return parser


def _launched(do: Callable[..., None], run: RunFolder, *arguments: Any) -> dict[str, Any]:
    do(run.path, *arguments)
    return {"run_id": run.run_id}


def _tell_hashing(done: int, total: int) -> None:
    _say({"hashing": done, "total": total})


def _say(value: dict[str, Any]) -> None:
    # UTF-8 whatever the host's locale; what is no text at all becomes an escape of JSON.
    line = json.dumps(value, ensure_ascii=False) + "\n"
    sys.stdout.buffer.write(line.encode("utf-8", "backslashreplace"))
    sys.stdout.buffer.flush()


def _stdin() -> dict[str, Any]:
    try:
        value = json.loads(sys.stdin.buffer.read())
    except ValueError as error:
        raise UsageError(f"stdin is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UsageError("stdin is not a JSON object")
    return value


def _name(run_id: str) -> str:
    """Refuse a run id that is no plain name of a folder."""
    if not run_id or run_id.startswith((".", "-")) or "/" in run_id or "\0" in run_id:
        raise UsageError(f"run id {run_id!r} cannot name a folder")
    return run_id


def _exists(run_id: str) -> UsageError:
    return UsageError(f"run {run_id} is there already; `inv runs` lists it")


def _folders(runs: Path) -> list[Path]:
    return sorted(
        path.parent for path in runs.glob("*/run.json") if not path.parent.name.startswith(".")
    )


def _take_input(folder: Path, name: str, record: dict[str, Any]) -> None:
    """Link an uploaded file into the run, after its size and sha256 were checked."""
    target, source = folder / name, Path(record["source"])
    part = target.with_name(f".{target.name}.part")
    if Path(name).is_absolute() or ".." in Path(name).parts or target == folder:
        raise UsageError(f"input {name!r} lies outside the run")
    if not source.is_file():
        raise UsageError(f"input {name}: {source} was not uploaded")
    target.parent.mkdir(parents=True, exist_ok=True)
    part.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), part)
    except OSError:
        # Another file system, or one without hard links (some network disks).
        shutil.copyfile(source, part)
    # What lies in the run is checked: the upload may be replaced at any moment.
    size, sha256 = part.stat().st_size, sha256_of(part)
    if (size, sha256) != (record["size"], record["sha256"]):
        part.unlink()
        raise UsageError(
            f"input {name}: expected {human_bytes(record['size'])} with sha256 "
            f"{record['sha256']}, {source} has {human_bytes(size)} with {sha256}; upload it again"
        )
    with part.open("rb") as stream:
        os.fsync(stream.fileno())  # a run survives a power loss together with its data
    if target.exists() and part.samefile(target):
        part.unlink()  # a rename between two names of one file does nothing
    else:
        part.replace(target)


def _sweep(runs: Path) -> None:
    """Delete what a killed create or remove has left."""
    for path in runs.glob(".*.removed-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in runs.glob(".*.incoming-*"):
        if time.time() - path.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def _damaged(run: RunFolder, error: Exception) -> dict[str, Any]:
    return {
        "run_id": run.run_id,
        "state": "failed",
        "phases": {},
        "failure": "damaged",
        "message": f"its files cannot be read: {error}",
        "created": "",
        "title": "(damaged)",
        "path": str(run.path),
    }


if __name__ == "__main__":
    sys.exit(main())
