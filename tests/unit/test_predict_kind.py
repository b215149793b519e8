"""`inv predict` runs predictions, and nothing else that a YAML may ask for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.cli.options import TRAIN_CONFIG
from tunesmith.core.errors import UsageError
from tunesmith.plan import prediction
from tunesmith.project import Project
from tunesmith.targets import factory

pytestmark = pytest.mark.unit


def test_a_training_config_is_no_prediction(project: Project) -> None:
    target = factory.target_of(project, "local", print)
    with pytest.raises(UsageError, match="a config to train, not to predict") as caught:
        prediction.plan_predict(project, target, Path(TRAIN_CONFIG), (), None)
    assert f"inv train --config {project.root / TRAIN_CONFIG}" in caught.value.hint
