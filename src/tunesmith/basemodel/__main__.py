"""`python -m tunesmith.basemodel fetch NAME ...`: the fetch on a host, JSON lines out."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunesmith.basemodel.catalogue import load_models
from tunesmith.basemodel.download import Progress
from tunesmith.basemodel.fetch import CONFIGS, convert_with, fetch
from tunesmith.core.documents import JsonObject
from tunesmith.core.errors import TunesmithError
from tunesmith.core.mirrors import load_mirror


def main(argv: Sequence[str] | None = None) -> int:
    """Run `fetch` from a shell: progress as JSON lines on stderr, the result on stdout."""
    parser = argparse.ArgumentParser(prog="python -m tunesmith.basemodel")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("fetch", help="fetch and verify a base model")
    verb.add_argument("name", help="repo id, or a folder to verify")
    verb.add_argument(
        "--configs", type=Path, default=CONFIGS, help="folder with models.yml, mirrors/"
    )
    verb.add_argument("--hf-home", type=Path, required=True, help="huggingface_hub's HF_HOME")
    verb.add_argument("--store", type=Path, required=True, help="folder of tunesmith's models")
    verb.add_argument("--mirror", default="default")
    verb.add_argument("--revision")
    verb.add_argument("--from", dest="from_path", type=Path, help="folder or archive")
    verb.add_argument("--allow-pickle", action="store_true")
    verb.add_argument("--verify", choices=("quick", "full"), default="quick")
    given = parser.parse_args(argv)

    def report(progress: Progress) -> None:
        _line(sys.stderr, dataclasses.asdict(progress))

    try:
        model = fetch(
            given.name,
            models=load_models(given.configs / "models.yml"),
            mirror=load_mirror(given.mirror, given.configs / "mirrors"),
            hf_home=given.hf_home,
            store=given.store,
            revision=given.revision,
            convert=functools.partial(convert_with, Path(sys.executable)),
            from_path=given.from_path,
            allow_pickle=given.allow_pickle,
            verify=given.verify,
            progress=report,
        )
    except TunesmithError as error:
        _line(sys.stdout, {"error": error.line, "detail": list(error.detail)})
        return error.exit_code
    _line(sys.stdout, {**dataclasses.asdict(model), "path": str(model.path)})
    return 0


def _line(stream: Any, value: JsonObject) -> None:
    stream.write(json.dumps(value, ensure_ascii=False) + "\n")
    stream.flush()


if __name__ == "__main__":
    sys.exit(main())
