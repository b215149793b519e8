"""What a run is told about trackers, and that no key is among it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.plan.trackers import variables

WANDB = {"report_to": "wandb"}
OFFLINE = {"WANDB_MODE": "offline"}
KEY = {"WANDB_API_KEY": "canary"}


@pytest.mark.parametrize("report_to", ["none", "tensorboard", ["mlflow"]])
def test_without_wandb_nothing_is_said(report_to: object, tmp_path: Path) -> None:
    assert variables({"report_to": report_to}, KEY, tmp_path, here=True) == {}


def test_without_a_login_it_stays_offline(tmp_path: Path) -> None:
    assert variables(WANDB, {}, tmp_path, here=True) == OFFLINE
    assert variables({"report_to": ["tensorboard", "wandb"]}, {}, tmp_path, here=True) == OFFLINE


def test_a_key_is_inherited_and_never_recorded(tmp_path: Path) -> None:
    assert variables(WANDB, KEY, tmp_path, here=True) == {}
    # To a host no key goes.
    assert variables(WANDB, KEY, tmp_path, here=False) == OFFLINE


def test_a_login_of_wandb_counts_here(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password canary\n")
    assert variables(WANDB, {}, tmp_path, here=True) == {}
    assert variables(WANDB, {}, tmp_path, here=False) == OFFLINE
    assert variables(WANDB, {"NETRC": str(tmp_path / "none")}, tmp_path, here=True) == OFFLINE


def test_a_mode_of_the_users_own_goes_along(tmp_path: Path) -> None:
    given = {"WANDB_MODE": "online", **KEY}
    assert variables(WANDB, given, tmp_path, here=False) == {"WANDB_MODE": "online"}
    assert variables(WANDB, {"WANDB_MODE": "canary"}, tmp_path, here=True) == OFFLINE
