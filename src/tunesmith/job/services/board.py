"""LLaMA Board over our data, base models and runs: `python -m tunesmith.job.services.board RECORD`.

The Board of LLaMA-Factory 0.9.3 uses paths relative to its folder (webui/common.py): data/,
saves/<model>/<tuning>/<run>, cache/user_config.yaml. This module creates them below BASE/board and
starts the Board without a browser or a share link, only on loopback (in a container on the given
address, so that Docker can publish it), behind job/services/access.py: the Board itself has no
login and answers under any host name.

The Board allows hub code in everything it starts (trust_remote_code, hard-coded; CVE-2026-58116).
That is turned off here, so code in a model folder never runs because somebody selected it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tunesmith.basemodel import store as model_store
from tunesmith.basemodel.catalogue import load_models
from tunesmith.core.errors import UsageError
from tunesmith.core.files import read_json, write_text
from tunesmith.core.patching import install
from tunesmith.job.patches.llamafactory import NO_HUB_CODE
from tunesmith.job.run import seals
from tunesmith.job.run.folder import RunFolder
from tunesmith.job.services import manager
from tunesmith.job.services.access import before_asgi
from tunesmith.job.services.records import ServiceRecord

# Our sources are in one folder, in a clone and on a host.
_KNOWN = Path(__file__).resolve().parents[4] / "configs" / "models.yml"
# Marks a folder below saves/ that represents one of our runs.
OURS = ".tunesmith-run"
_USER_CONFIG = Path("cache", "user_config.yaml")


def populate(
    board: Path,
    settings: Mapping[str, str],
    names: Mapping[str, str],
) -> dict[str, Path]:
    """Fill the Board's folder with data, base models and finished runs.

    `settings` contains the folders `data`, `models` and `runs`, and `language`; `names` maps repo
    ids to the Board's model names (others use the last part of the id). Returns the folders of our
    base models by the Board's names.
    """
    board.mkdir(parents=True, exist_ok=True)
    _link(board / "data", Path(settings["data"]))
    models = {_board_name(name, names): path for name, path in base_models(settings["models"])}
    shown = set()
    newest = ""
    for run, name, config in _finished(Path(settings["runs"])):
        model = _board_name(name, names)
        tuning = str(config.get("finetuning_type", "lora"))
        folder = board / "saves" / model.replace(" ", "") / tuning / run.run_id
        if _as_sealed(run) and _show_run(folder, Path(config["output_dir"])):
            shown.add(folder)
            newest = model
    for marker in board.glob(f"saves/*/*/*/{OURS}"):
        if marker.parent not in shown:
            shutil.rmtree(marker.parent)  # only links: the run itself is elsewhere
    _configure(board, models, newest or next(iter(models), ""), settings["language"])
    return models


def base_models(store: str | Path) -> Iterator[tuple[str, Path]]:
    """Yield repo id and folder of every downloaded base model, oldest revision first."""
    names = {str(read_json(file)["name"]) for file in Path(store).glob(f"*/{model_store.MANIFEST}")}
    for name in sorted(names):
        for entry in model_store.entries(Path(store), name)[:1]:
            if entry.model.path.is_dir():
                yield name, entry.model.path


def _board_name(name: str, names: Mapping[str, str]) -> str:
    return names.get(name) or Path(name).name


def _finished(runs: Path) -> Iterator[tuple[RunFolder, str, dict[str, Any]]]:
    """Yield the runs whose training succeeded, with base model and config, oldest first."""
    for file in sorted(runs.glob("*/run.json"), key=lambda file: file.stat().st_mtime):
        run = RunFolder(file.parent)
        if run.status().phases.get("train") == "succeeded" and run.config_file.is_file():
            # A damaged run is not offered; `inv runs` reports it.
            with contextlib.suppress(UsageError):
                model, config = run.request().model, run.config()
                if model and model.name and config.get("output_dir"):
                    yield run, model.name, config


def _as_sealed(run: RunFolder) -> bool:
    """Whether a run's result matches its seal; if not, the Board's log says why it is hidden."""
    try:
        seals.check(run.path, ("output",), adopt=False)
    except UsageError as error:
        print(f"run {run.run_id} is not shown: {error.line}", file=sys.stderr, flush=True)
        return False
    return True


def _show_run(folder: Path, output: Path) -> bool:
    """Fill `folder` with links to a run's result files; return False if there are none any more.

    Links in a folder instead of a link to the folder: the Board writes to folders it can continue,
    and it offers to continue every folder with a checkpoint-N.
    """
    files = [path for path in sorted(output.glob("*")) if path.is_file() and path.name[0] != "."]
    if not any(path.suffix == ".safetensors" for path in files):
        return False
    folder.mkdir(parents=True, exist_ok=True)
    for path in files:
        _link(folder / path.name, path)
    write_text(folder / OURS, str(output))
    return True


def _link(path: Path, target: Path) -> None:
    if path.is_symlink():
        if path.readlink() == target:
            return
        path.unlink()
    elif path.exists():
        raise UsageError(f"{path}: already exists and is not a link of ours; move it away")
    path.symlink_to(target)


def _configure(board: Path, models: Mapping[str, Path], last: str, language: str) -> None:
    """Write user_config.yaml; the user's choices in the Board stay."""
    file = board / _USER_CONFIG
    was = (yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None) or {}
    paths = dict(was.get("path_dict") or {})
    for name, path in models.items():
        if not Path(str(paths.get(name, "missing"))).is_dir():
            paths[name] = str(path)
    now = {
        "lang": was.get("lang") or language,
        "last_model": was.get("last_model") or last or None,
        "path_dict": paths,
        "cache_dir": was.get("cache_dir"),
    }
    write_text(file, yaml.safe_dump(now, allow_unicode=True))


def _add_models(models: Mapping[str, Path], templates: Mapping[str, str]) -> None:
    """Add our models to the Board's list, each with the template it was trained with."""
    from llamafactory.extras import constants

    for name, path in models.items():
        if name not in constants.SUPPORTED_MODELS:
            constants.SUPPORTED_MODELS[name] = {constants.DownloadSource.DEFAULT: str(path)}
    constants.DEFAULT_TEMPLATE.update(templates)


def _names() -> dict[str, str]:
    """Return the Board's name of each model by its repo id."""
    from llamafactory.extras import constants

    return {
        str(sources[constants.DownloadSource.DEFAULT]): name
        for name, sources in constants.SUPPORTED_MODELS.items()
        if constants.DownloadSource.DEFAULT in sources
    }


def serve(record_file: Path) -> None:
    """Serve until the process ends.

    Raises UsageError if the folder cannot be filled, or without a key.
    """
    record = ServiceRecord.read(record_file)
    gate = manager.gate(record_file, browser=True)
    board = Path(record.base) / "board"
    names = _names()
    models = populate(board, record.settings, names)
    catalogue = load_models(_KNOWN)
    os.chdir(board)
    os.environ["GRADIO_TEMP_DIR"] = str(board / "cache" / "gradio")
    _add_models(
        models, {_board_name(name, names): model.template for name, model in catalogue.items()}
    )
    for patch in NO_HUB_CODE:
        install(patch)

    import uvicorn  # type: ignore[import-not-found]  # part of the training environment
    from fastapi import FastAPI  # type: ignore[import-not-found]
    from gradio import mount_gradio_app  # type: ignore[import-not-found]
    from llamafactory.webui.interface import create_ui

    # Not Gradio's launch(), which sends HTTP requests to itself, creates share links, and allows no
    # middleware before its own (which answers every origin, with credentials).
    # With path="/" Gradio 5.31 redirects / to //.
    app = mount_gradio_app(FastAPI(openapi_url=None), create_ui().queue(), path="")
    uvicorn.run(
        before_asgi(app, gate),
        host=record.listen,
        port=record.port,
        log_level="warning",
        access_log=False,  # addresses contain tokens
        timeout_graceful_shutdown=2,  # an open page keeps its connections open forever
    )


if __name__ == "__main__":
    sys.exit(manager.serve_record(serve))
