"""Weights & Biases records online only where it can log in: else it is told to stay offline.

Without a key it raises at the first step, when the model is loaded and the GPU paid. Keys are not
ours to carry: they are in no config, request or command. A worker here has the user's environment.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tunesmith.plan.rules.packages import trackers
from tunesmith.plan.rules.settings import Settings

_HOST = "api.wandb.ai"
_MODES = ("online", "offline", "disabled", "shared")


def variables(
    config: Mapping[str, object], environ: Mapping[str, str], home: Path, *, here: bool
) -> dict[str, str]:
    """Return the variables that a run needs for the trackers of its config.

    `here`: its workers inherit `environ` and read the files of `home`. WANDB_MODE goes along
    wherever the run is; `online` trusts the login of that place.
    """
    if "wandb" not in trackers(Settings(config, {})):
        return {}
    mode = environ.get("WANDB_MODE")
    if mode in _MODES:
        return {"WANDB_MODE": mode}
    known = here and ("WANDB_API_KEY" in environ or _logged_in(environ, home))
    return {} if known else {"WANDB_MODE": "offline"}


def _logged_in(environ: Mapping[str, str], home: Path) -> bool:
    """Whether `wandb login` left a key: in the netrc file, as wandb looks for it."""
    netrc = Path(environ.get("NETRC") or home / ".netrc")
    return netrc.is_file() and _HOST in netrc.read_text(encoding="utf-8", errors="replace")
