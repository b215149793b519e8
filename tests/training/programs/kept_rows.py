"""What LLaMA-Factory makes of each registered data set: kept_rows.py FOLDER MODEL.

FOLDER/how.json has {key: {"stage", "template"}} for those that are none of stage sft. Writes to
FOLDER/found.json a list of two: for each key what `Found` has, and what
`python -m tunesmith.job.data.tables` says of each file that is no JSON.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamafactory.data.loader import _get_dataset_processor, _get_merged_dataset
from llamafactory.data.template import TEMPLATES

from tunesmith.job.data.replay import judge
from tunesmith.job.data.rows import DataPipeline
from tunesmith.job.data.tables import lines

_TABLES = (".csv", ".parquet", ".arrow", ".txt")
_ENCODED = 1000  # rows of a data set that are turned into tokens at most
_ROOM = {"image_max_pixels": 1 << 20, "image_min_pixels": 32 * 32}


@dataclass(frozen=True)
class Found:
    """Rows kept, and why the loader stopped or the processor refused them; tokens with a loss, and
    (rows, tokens) as our replay counts them."""

    kept: int
    why: str | None = None
    refused: str | None = None
    trained: int | None = None
    replayed: tuple[int, int] | None = None


def main(folder: Path, model: Path) -> None:
    """Ask LLaMA-Factory about all of them, in one process."""
    config = {
        "model_name_or_path": str(model),
        "do_train": True,
        "finetuning_type": "lora",
        "dataset_dir": str(folder),
        "media_dir": str(folder / "media"),
        "template": "smollm",
        "cutoff_len": 16,
        "packing": False,
    }
    pipelines = {
        stage: DataPipeline.of({**config, "stage": stage}, str(folder / "scratch"))
        for stage in ("sft", "pt")
    }
    hows = json.loads((folder / "how.json").read_text(encoding="utf-8"))
    found: dict[str, dict[str, Any]] = {}
    tables: dict[str, list[str]] = {}
    registry = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
    for key, entry in registry.items():
        how = hows.get(key, {})
        stage = how.get("stage", "sft")
        pipeline = pipelines.get(stage, pipelines["sft"])
        found[key] = vars(_look(key, pipeline, stage, how.get("template")))
        path = folder / entry["file_name"]
        if path.suffix in _TABLES:
            tables[str(path)] = list(lines([str(path)]))
    (folder / "found.json").write_text(json.dumps([found, tables]))


def _look(key: str, pipeline: DataPipeline, stage: str, template: str | None) -> Found:
    context = (pipeline.model_args, pipeline.data_args, pipeline.training_args)
    try:
        rows = _get_merged_dataset([key], *context, stage)
        kept = sum(_keeps(row, stage) for row in rows)
    except Exception as error:  # noqa: BLE001  whatever it is, the training would end by it
        return Found(0, type(error).__name__)
    if len(rows) > _ENCODED:
        return Found(kept)
    try:
        if template is not None:
            _media(rows, template)
            return Found(kept)
        codec = pipeline.codec
        processor = _get_dataset_processor(
            pipeline.data_args, stage, codec.template, codec.tokenizer, codec.processor
        )
        made = processor.preprocess_dataset(rows[:])
    except Exception as error:  # noqa: BLE001
        return Found(kept, refused=f"{type(error).__name__}: {error}"[:200])
    if stage not in ("sft", "pt"):
        return Found(kept)
    # Of texts to read every token is trained: the collator makes labels of them.
    learned = made.get("labels", made.get("input_ids", []))
    trained = sum(label != -100 for labels in learned for label in labels)
    part = judge(pipeline, list(rows), 1)
    return Found(kept, None, None, trained, (len(part.kept), part.trained_tokens))


def _keeps(row: dict[str, Any], stage: str) -> bool:
    """Whether the processor of a stage takes a row (data/processor)."""
    if stage == "pt":
        return True
    answers = len(row["_response"])
    fits = answers == 1 if stage == "sft" else answers >= 2
    return len(row["_prompt"]) % 2 == 1 and fits


def _media(rows: Any, template: str) -> None:
    """Let a template's own code count and open the media of rows, as for a model that has it."""
    plugin = TEMPLATES[template].mm_plugin
    for row in rows:
        held = [row[name] or [] for name in ("_images", "_videos", "_audios")]
        if template == "qwen" or (template == "llava" and held[1]):
            plugin._validate_input(None, *held)
        for answer in row["_response"]:
            plugin._validate_messages([*row["_prompt"], answer], *held)
        plugin._regularize_images(held[0], **_ROOM)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
