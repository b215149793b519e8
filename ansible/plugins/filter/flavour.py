"""The flavour for a host, with what was learned there before: the filter `flavour_for`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ansible.errors import AnsibleFilterError

from tunesmith.core.errors import TunesmithError
from tunesmith.doctor.flavours import choose_from_lines


def flavour_for(
    lines: Sequence[str],
    stack: Mapping[str, Any],
    environment: Mapping[str, str],
    requested: str | None = None,
) -> dict[str, Any]:
    """Return the decision for GPU `lines` of nvidia-smi, as `choose_from_lines` does.

    `environment` is the finish marker of the environment that is there. Two things in it
    count: without a GPU nothing speaks against its flavour, so it stays; and a flavour whose
    self-test failed on this very host is not tried again. `tested_on` names the GPUs a
    self-test is valid for; `refusal` is what the marker shall hold if it fails.
    """
    try:
        decision = choose_from_lines(list(lines), stack, requested or None)
    except TunesmithError as error:
        raise AnsibleFilterError(str(error)) from error
    made = environment["flavour"]
    decision["tested_on"] = "; ".join(sorted(set(lines))) if decision["gpus"] else ""
    decision["refused"] = ""
    # None: there is a GPU, and it is refused.
    stays = made in stack["flavours"] and decision["flavour"] not in (None, made)
    if stays and not decision["gpus"] and not requested:
        decision |= {"flavour": made, "why": f"no GPU is seen, and {made} is there and stays"}
    if decision["flavour"]:
        decision["refusal"] = _refusal(decision, stack)
    if decision["fallback"] and environment["refused"] == decision["refusal"]:
        why = f"{decision['flavour']} failed its self-test on this host"
        decision |= {"flavour": decision["fallback"], "fallback": None, "why": why}
        decision["refused"] = environment["refused"]
    return decision


def _refusal(decision: Mapping[str, Any], stack: Mapping[str, Any]) -> str:
    build = stack["flavours"][decision["flavour"]]
    return f"{' '.join(build['requirements'])} on {decision['tested_on']}"


class FilterModule:
    """Ansible's way to find the filters of a file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        return {"flavour_for": flavour_for}
