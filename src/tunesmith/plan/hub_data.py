"""Data sets that LLaMA-Factory fetches itself: which can be had, and the way to them.

Source: get_dataset_list (data/parser.py) and _load_single_dataset (data/loader.py) of
LLaMA-Factory 0.9.3.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from tunesmith.basemodel.endpoint import SourceError, network_environment, reach
from tunesmith.core import documents
from tunesmith.core.errors import UsageError
from tunesmith.core.mirrors import Mirror
from tunesmith.dataset.entry import Entry
from tunesmith.dataset.registry import resolve

_PATIENCE = 5.0  # seconds until an endpoint that does not answer is none
_MODELSCOPE = "https://www.modelscope.cn"
# What modelscope 1.40.2 imports for data sets, besides what it installs.
_NEEDED = "addict"
_SAVED = "save its rows as JSON Lines and register them with `inv data.register FILE KEY`"


def remote_entries(values: documents.Config) -> tuple[Entry, ...]:
    """Return the data sets of a config that lie on a hub. Raises UsageError for an unknown name."""
    names = [str(values[key]) for key in ("dataset", "eval_dataset") if values.get(key)]
    if not names:
        return ()
    entries = resolve(Path(str(values.get("dataset_dir") or "data")), ",".join(names))
    return tuple(entry for entry in entries if entry.remote)


def check(entries: Sequence[Entry], installed: Collection[str], on: str = "") -> None:
    """Raise UsageError for a data set that the training environment cannot fetch.

    `installed` are its packages; `on` names the host it is on.
    """
    for entry in entries:
        hub, what = _source(entry), f"data set {entry.key} is {entry.remote}"
        if hub == "script_url":
            raise UsageError(
                f"{what}: a script that loads rows is code, and nobody has checked it", hint=_SAVED
            )
        if hub == "cloud_file_name":
            raise UsageError(
                f"{what}: the training environment has no s3fs and no gcsfs", hint=_SAVED
            )
        if hub == "om_hub_url":
            raise UsageError(f"{what}: the training environment has no openmind", hint=_SAVED)
        if hub == "ms_hub_url" and _NEEDED not in installed:
            install = f"inv provision --on {on}" if on else "inv stack.install"
            raise UsageError(
                f"{what}: modelscope needs {_NEEDED} for it, which the training environment lacks",
                hint=f"`{install} --with modelscope`",
            )


def environment(entries: Sequence[Entry], mirror: Mirror) -> dict[str, str]:
    """Return the variables with which a job here fetches data sets, by an endpoint that answers.

    Raises UsageError at once where none of them does.
    """
    if not entries:
        return {"HF_HUB_OFFLINE": "1"}
    found = {"HF_HUB_OFFLINE": "0", **network_environment(mirror)}
    for entry in entries:
        modelscope = _source(entry) == "ms_hub_url"
        if "HF_ENDPOINT" in found and not modelscope:
            continue
        endpoints = (_MODELSCOPE,) if modelscope else mirror.hf_endpoints
        endpoint, why = _first(endpoints, mirror)
        if endpoint is None:
            raise UsageError(
                f"data set {entry.key} is {entry.remote}, and no hub can be reached: {why[0]}",
                why[1:],
                hint=f"with a network, or with `--mirror cn`; or {_SAVED}",
            )
        if not modelscope:
            found["HF_ENDPOINT"] = endpoint
    return found


def _first(endpoints: Sequence[str], mirror: Mirror) -> tuple[str | None, list[str]]:
    why = []
    for endpoint in endpoints:
        try:
            reach(endpoint, mirror, _PATIENCE)
        except SourceError as error:
            why.append(f"{endpoint}: {error}")
        else:
            return endpoint, why
    return None, why


def _source(entry: Entry) -> str:
    """Return the key of an entry that LLaMA-Factory goes by."""
    there = entry.other
    if "hf_hub_url" in there:
        return "hf_hub_url"
    names = ("ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
    return next(name for name in names if name in there)
