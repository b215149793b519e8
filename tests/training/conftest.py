"""What the tests inside the training environment share. They run in one process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from standins import tiny_llama, tiny_r1


@pytest.fixture(scope="session")
def base_model() -> Path:
    """Folder of SmolLM2-135M-Instruct; tests/e2e/test_training_side.py names it."""
    return Path(os.environ["TUNESMITH_TEST_MODEL"])


@pytest.fixture(scope="session")
def tiny_model(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two small layers, with the base model's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny model")
    tiny_llama.main(base_model, folder, "float32")
    return folder


@pytest.fixture(scope="session")
def r1_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of the shape of DeepSeek-R1-Distill-Qwen."""
    folder = tmp_path_factory.mktemp("R1") / "R1 shape"
    tiny_r1.build(folder)
    return folder
