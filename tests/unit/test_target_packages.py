"""What a config may ask for on a target, and the command that brings what is missing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from standins.bare_target import BareTarget
from tunesmith.core.errors import UsageError
from tunesmith.core.names import ENVIRONMENT_MARKER
from tunesmith.plan.build import read_config
from tunesmith.plan.rules.packages import UNAVAILABLE
from tunesmith.plan.target_packages import TargetPackages
from tunesmith.project import Project

GALORE = ("finetuning_type=full", "use_galore=true")


def mark(project: Project, *extras: str) -> None:
    environment = project.environment()
    environment.path.mkdir(parents=True, exist_ok=True)
    found = {name: project.stack.find_extra(name).lock_sha256 for name in extras}
    (environment.path / ENVIRONMENT_MARKER).write_text(json.dumps({"extras": found}))


def read(project: Project, *overrides: str, target: BareTarget | None = None) -> None:
    read_config(project, Path("configs/train/smollm2_135m_lora_sft.yaml"), overrides, target=target)


def test_the_hint_brings_what_is_missing(bare: Project) -> None:
    mark(bare, "wandb")
    with pytest.raises(UsageError, match="needs galore-torch") as refused:
        read(bare, *GALORE)
    hint = str(refused.value.hint)
    assert hint == "run `inv stack.install --with galore`, or leave out `use_galore=...`"
    named = re.search(r"--with ([\w-]+)", hint)
    assert named
    mark(bare, "wandb", named[1])
    read(bare, *GALORE)


def test_a_target_is_asked_for_its_own(bare: Project) -> None:
    class Elsewhere(BareTarget):
        """A target whose environment has GaLore."""

        def extras(self) -> tuple[str, ...]:
            return ("galore",)

        def adding(self, extra: str) -> str:
            return f"run `inv provision --on far --with {extra}`"

    mark(bare, "badam")
    read(bare, *GALORE, target=Elsewhere())
    with pytest.raises(UsageError) as refused:
        read(bare, "finetuning_type=full", "use_badam=true", target=Elsewhere())
    assert "run `inv provision --on far --with badam`, or" in str(refused.value.hint)


def test_what_the_lock_has_asks_no_target(bare: Project) -> None:
    class Silent(BareTarget):
        """A target that must not be asked."""

        def extras(self) -> tuple[str, ...]:
            raise AssertionError("asked")

    read(bare, "plot_loss=true", target=Silent())


@pytest.mark.parametrize(
    ("override", "package"),
    [
        ("flash_attn=fa2", "flash-attn"),
        ("use_unsloth=true", "unsloth"),
        ("mixture_of_depths=convert", "mixture-of-depth"),
        ("report_to=swanlab", "swanlab"),
    ],
)
def test_what_cannot_be_had_is_refused_with_the_reason(
    bare: Project, override: str, package: str
) -> None:
    mark(bare)
    with pytest.raises(UsageError) as refused:
        read(bare, "finetuning_type=full", override)
    assert UNAVAILABLE[package] in refused.value.message
    assert "--with" not in str(refused.value.hint)


def test_an_extra_that_the_stack_does_not_know_is_passed_over(bare: Project) -> None:
    mark(bare, "galore")
    marker = bare.environment().path / ENVIRONMENT_MARKER
    marker.write_text(json.dumps({"extras": {"gone": "0" * 64, "galore": "0" * 64}}))
    there = TargetPackages(bare)
    assert "galore-torch" in there
    assert "badam" not in there


def test_an_optimizer_of_torchao_is_no_optimizer_of_bitsandbytes(bare: Project) -> None:
    mark(bare)
    with pytest.raises(UsageError, match="`optim` needs torchao"):
        read(bare, "finetuning_type=full", "optim=adamw_torch_8bit")
