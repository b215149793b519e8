"""What a client asks of a host's runs.

`python -m tunesmith.job.supervisor.agent --runs DIR VERB ...`:

create             make a run: {"run_id", "request", "config", "inputs"} on stdin
renew RUN          give an idle run another request: {"request", "inputs"} on stdin
start RUN [PHASE]  start its phases, detached; a run that waits for its turn has started;
                   --cause says why (records.CAUSES)
stop RUN           ask it for a checkpoint and an end
find [RUN]         {"run_id"} of a run, by default the newest
show RUN           {"request", "config", "status"}
runs               {"runs": [status, created, title and path of each]}, oldest first
watch RUN          a line whenever something changes, until the run has ended
manifest RUN       {"files": {name: {"size", "sha256"}}}: what a pull brings
remove RUN         delete an idle run: {"freed": bytes}
afterwards RUN     {"command": [...]} on stdin, run once, after a success: {"code", "why"}
resume-all         start the runs that a restart of the host has cut off; --cause says why,
                   by default autostart: the host's own start asks

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

from tunesmith.core import formats
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import fsync_folder, locked, sha256_of, write_json, write_text
from tunesmith.job.run import inputs, limits, records, seals
from tunesmith.job.run.folder import RunFolder, acquire
from tunesmith.job.run.listing import find, folders, list_runs
from tunesmith.job.run.manifest import PARTS, USUAL, manifest, output_of
from tunesmith.job.run.removal import take_away
from tunesmith.job.run.run_id import RunId
from tunesmith.job.run.shapes import Check, anything, count, each, fields, items, maybe, text
from tunesmith.job.run.stored import parse_json
from tunesmith.job.run.watch import look, watch
from tunesmith.job.supervisor import launch
from tunesmith.job.system import disk, gpu

# A folder of a create that was killed: older than any upload's last step takes.
_STALE_SECONDS = 3600.0
_INPUT = fields({"source": text, "size": count, "sha256": text}, ("source", "size", "sha256"))
# What a client orders with create or renew.
_ORDER: Check = fields(
    {
        "request": records.REQUEST,
        "config": maybe(each(anything)),
        "inputs": maybe(each(_INPUT)),
    },
    ("request",),
)


def create(runs: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Make a run folder whole, or none. Returns {"run_id", "path"}.

    Inputs are hard links to the uploaded files (copies where that cannot be), so what is
    uploaded later must replace those files, never write into them. Raises UsageError for a
    run that exists or an input that is not what was promised.
    """
    run_id = RunId(wanted.get("run_id"))
    _checked(wanted)
    final = runs / run_id
    runs.mkdir(parents=True, exist_ok=True)
    with locked(runs / run_id):
        _sweep(runs)
    if final.exists():
        raise _exists(run_id)
    with tempfile.TemporaryDirectory(prefix=f".{run_id}.incoming-", dir=runs) as temporary:
        run = RunFolder(Path(temporary) / "run")
        run.path.mkdir()
        taken = {
            run.path / "inputs" / name: _take_input(run.path / "inputs", name, record)
            for name, record in (wanted.get("inputs") or {}).items()
        }
        if wanted.get("config") is not None:
            body = yaml.safe_dump(wanted["config"], allow_unicode=True, sort_keys=True)
            write_text(run.config_file, body)
        request = _recorded(wanted, taken, run.path, final)
        write_json(run.request_file, request)
        seals.seal(run.path, "create", seals.REQUEST)
        try:
            # Over a folder with files in it a rename fails: of two creates one succeeds.
            run.path.rename(final)
        except OSError:
            if not final.exists():
                raise
            raise _exists(run_id) from None
    fsync_folder(runs)
    inputs.remember(final, request, request["inputs"])
    inputs.remember_model(final, request)
    return {"run_id": run_id, "path": str(final)}


def _recorded(
    wanted: dict[str, Any], taken: dict[Path, dict[str, Any]], now: Path, final: Path
) -> dict[str, Any]:
    """Return the request with the record of its inputs, which get their final name later."""
    asked, config = (_moved(wanted.get(key), final, now) for key in ("request", "config"))
    made = inputs.recorded(asked, config, taken)["inputs"]
    return dict(wanted["request"]) | {"inputs": _moved(made, now, final)}


def _moved(value: Any, old: Path, new: Path) -> Any:
    """Return a value of JSON whose paths below `old` are below `new`."""
    if isinstance(value, dict):
        return {_moved(k, old, new): _moved(v, old, new) for k, v in value.items()}
    if isinstance(value, list):
        return [_moved(item, old, new) for item in value]
    inside = isinstance(value, str) and value.startswith(f"{old}/")
    return f"{new}{value[len(str(old)) :]}" if inside else value


def renew(run: RunFolder, wanted: dict[str, Any]) -> dict[str, Any]:
    """Replace run.json, and inputs, of a run nobody works in; UsageError when somebody does."""
    _checked(wanted)
    run.request()
    lock = acquire(run)
    try:
        taken = {
            run.path / "inputs" / name: _take_input(run.path / "inputs", name, record)
            for name, record in (wanted.get("inputs") or {}).items()
        }
        request = inputs.recorded(wanted["request"], None, taken)
        with seals.rewriting(run.path, "renew", run.request_file.name):
            write_json(run.request_file, request)
        inputs.remember(run.path, request, inputs.lacking(wanted["request"], None))
    finally:
        lock.release()
    return {"run_id": run.run_id}


def show(run: RunFolder) -> dict[str, Any]:
    """Return request, config (None without one) and status of a run."""
    config = run.config() if run.config_file.exists() else None
    return {"request": run.request(), "config": config, "status": run.status()}


def remove(runs: Path, run: RunFolder) -> dict[str, Any]:
    """Delete a run nobody works in. Returns {"freed": bytes} and, under "left", a folder
    of results that lies elsewhere. Raises UsageError when somebody works in it."""
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
    if fault := items(text)(wanted.get("command"), "command"):
        raise UsageError(f"stdin: {fault}")
    code, why = limits.once(run, [str(word) for word in wanted["command"]])
    return {"code": code, "why": why}


def resume_all(runs: Path, cause: records.Cause = "autostart") -> dict[str, Any]:
    """Start every run that ended without a word: power loss, restart, kill -9.

    Those that worked come before those that waited for their turn, then the oldest first.
    One that worked on a GPU is refused while there is none: a host that was started without
    one, to fetch results, has no memory for it either. Returns {"started": [run ids],
    "refused": {run id: message}}.
    """
    cut_off = []
    answer: dict[str, Any] = {"started": [], "refused": {}}
    for folder in folders(runs):
        run = RunFolder(folder)
        # Empty for one that was made, but never started.
        left = run.last_status()
        if left.get("state") not in ("running", "queued") or run.busy():
            continue
        try:
            created = str(run.request().get("created", ""))
        except TunesmithError:
            continue  # damaged: `runs` shows it
        if left.get("gpu") and not gpu.ask():
            answer["refused"][run.run_id] = _no_gpu(run)
            continue
        cut_off.append((left["state"] == "queued", created, run))
    for _, _, run in sorted(cut_off, key=lambda item: (*item[:2], item[2].run_id)):
        try:
            launch.start(run.path, [], cause)
        except TunesmithError as error:
            answer["refused"][run.run_id] = error.line
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
        _say({"error": error.line, "detail": list(error.detail)})
        return error.exit_code
    except OSError as error:
        return _refused(error, given.runs)
    except Exception as error:  # noqa: BLE001 - the client understands JSON only
        traceback.print_exc()
        _say({"error": f"{type(error).__name__}: {error}", "detail": []})
        return 1
    return 0


def _refused(error: OSError, runs: Path) -> int:
    """Say what the system refused: in one line where it is the disk's fault."""
    if disk.refused(error):
        _say({"error": disk.explain(error, runs).message, "detail": []})
    else:
        traceback.print_exc()
        _say({"error": f"{type(error).__name__}: {error}", "detail": []})
    return 1


def _answer(given: argparse.Namespace) -> None:
    runs: Path = given.runs.absolute()
    verb: str = given.verb
    if verb in ("create", "runs", "resume-all"):
        whole: dict[str, Callable[[], dict[str, Any]]] = {
            "create": lambda: create(runs, _stdin()),
            "runs": lambda: {"runs": list_runs(runs)},
            "resume-all": lambda: resume_all(runs, given.cause),
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
        "start": lambda: _launched(launch.start, run, list(given.phases), given.cause),
        "stop": lambda: _launched(launch.stop, run),
        "find": lambda: {"run_id": run.run_id},
        "show": lambda: show(run),
        "manifest": lambda: _sealed_manifest(run, given.what.split(",")),
        "remove": lambda: remove(runs, run),
        "afterwards": lambda: afterwards(run, _stdin()),
    }
    _say(answers[verb]())


class _Parser(argparse.ArgumentParser):
    """Refuses in the agent's own way: the client reads stdout."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m tunesmith.job.supervisor.agent")
    parser.add_argument("--runs", type=Path, required=True, help="folder of run folders")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name in ("create", "runs"):
        verbs.add_parser(name)
    resuming = verbs.add_parser("resume-all")
    resuming.add_argument("--cause", choices=records.CAUSES, default="autostart")
    verbs.add_parser("find").add_argument("run", nargs="?")
    for name in ("renew", "start", "stop", "show", "watch", "manifest", "remove", "afterwards"):
        verb = verbs.add_parser(name)
        verb.add_argument("run")
        if name == "start":
            verb.add_argument("phases", nargs="*")
            verb.add_argument("--cause", choices=records.CAUSES, default="user")
        elif name == "watch":
            verb.add_argument("--events", type=int, default=0, help="byte of events.jsonl")
            verb.add_argument("--log", type=int, default=-1, help="byte of train.log; -1: none")
            verb.add_argument("--once", action="store_true", help="one line, then end")
            verb.add_argument("--seconds", type=float, default=math.inf, help="end after them")
        elif name == "manifest":
            known = ",".join(PARTS)
            verb.add_argument("--what", default=",".join(USUAL), help=f"of {known}")
    return parser


def _sealed_manifest(run: RunFolder, what: list[str]) -> dict[str, Any]:
    """Return what a pull brings, once every result in it was compared with its seal.

    A run that is worked on may be between a file and its seal.
    """
    sealed = seals.read(run.path)
    said = manifest(run, what, _tell_hashing, sealed.keys())
    if not said["busy"]:
        seals.refuse_other(run.path, said["files"])
    return said


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
        value = parse_json(sys.stdin.buffer.read())
    except ValueError as error:
        raise UsageError(f"stdin is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UsageError("stdin is not a JSON object")
    return value


def _checked(wanted: dict[str, Any]) -> None:
    if fault := _ORDER(wanted, ""):
        raise UsageError(f"stdin: {fault}")


def _exists(run_id: str) -> UsageError:
    return UsageError(f"run {run_id} is there already; `inv runs` lists it")


def _take_input(folder: Path, name: str, record: dict[str, Any]) -> dict[str, Any]:
    """Link an uploaded file into the run, after its size and sha256 were checked; return them."""
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
            f"input {name}: expected {formats.size(record['size'])} with sha256 "
            f"{record['sha256']}, {source} has {formats.size(size)} with {sha256}; upload it again"
        )
    with part.open("rb") as stream:
        os.fsync(stream.fileno())  # a run survives a power loss together with its data
    if target.exists() and part.samefile(target):
        part.unlink()  # a rename between two names of one file does nothing
    else:
        part.replace(target)
    return {"size": size, "sha256": sha256}


def _sweep(runs: Path) -> None:
    """Delete what a killed create or remove has left."""
    for path in runs.glob(".*.removed-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in runs.glob(".*.incoming-*"):
        if time.time() - path.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
