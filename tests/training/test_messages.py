"""Every sentence of our tables is LLaMA-Factory's, and what it raises besides is known, too."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import llamafactory

from tunesmith.job.patches import imports
from tunesmith.job.run.config_messages import CONFIG
from tunesmith.job.run.data_messages import DATA, MODEL

PACKAGE = Path(llamafactory.__file__).parent
# What a config, data or a model can bring about is raised here.
FOLDERS = ("hparams", "data", "model", "train", "eval")
# Faults of code, of theirs or of ours: no config and no rows lead there.
OF_CODE = {
    "Template is required for MultiModalDataCollator.": "the trainer always gives one",
    "Qwen2-VL/Qwen2.5-Omni model requires 3D position ids for mrope.": "of the collator itself",
    "Dataset converter {} already exists.": "a registration at import",
    "Multimodal plugin {} already exists.": "a registration at import",
    "Multimodal plugin `{}` not found.": "templates name it, not configs",
    "Template {} already exists.": "a registration at import",
    "Empty formatter should not contain any placeholder.": "of a template's definition",
    "A placeholder is required in the string formatter.": "of a template's definition",
    "Stop words are required to replace the EOS token.": "of a template's definition",
    "Input must be string, set[str] or dict[str, str], got {}.": "of a template's definition",
    "Input must be string, set[str] or dict[str, str], got {}": "of a template's definition",
    "Dict is not supported.": "of a template's definition",
    "The length of packed example should be identical to the cutoff length.": "of packing itself",
    "Please update `transformers`.": "the lock has the version",
    "Mismatched shape of inputs and labels.": "of the trainer itself",
    "Logits (batchsize x seqlen) and labels must have the same shape.": "of the trainer itself",
    "Cannot process the logits.": "of the trainer itself",
}


def of(node: ast.expr) -> str | None:
    """Return a text as the tables have it, `{}` for what is put in; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        return "".join(map(str, parts))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        text = of(node.func.value) if node.func.attr == "format" else None
        return None if text is None else re.sub(r"\{[^}]*\}", "{}", text)
    return None


def raised(file: Path) -> Iterator[str]:
    """Yield the texts of errors that a file raises or asserts."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        found = None
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            found = of(node.exc.args[0])
        elif isinstance(node, ast.Assert) and node.msg is not None:
            found = of(node.msg)
        if found:
            yield found


def test_each_sentence_is_in_the_file_that_the_table_names() -> None:
    tables = [
        (name, list(texts)) for table in (CONFIG, DATA, MODEL) for name, texts in table.items()
    ]
    missing = [
        (name, text)
        for name, texts in tables
        for text in texts
        if text not in set(raised(PACKAGE / name))
    ]
    assert missing == []


def test_nothing_that_they_raise_is_unknown() -> None:
    known = {text for table in (CONFIG, DATA, MODEL) for texts in table.values() for text in texts}
    files = [file for folder in FOLDERS for file in sorted((PACKAGE / folder).rglob("*.py"))]
    found = {text for file in files for text in raised(file) if file.name != "test_utils.py"}
    assert len(found) > 120
    assert sorted(found - known - OF_CODE.keys()) == []
    assert sorted(OF_CODE.keys() - found) == []
    assert sorted(OF_CODE.keys() & known) == []


def test_the_names_that_stand_in_for_peft_are_its_own() -> None:
    utils = importlib.import_module("peft.utils")
    assert {name: getattr(utils, name) for name in imports.PEFT_NAMES} == imports.PEFT_NAMES
