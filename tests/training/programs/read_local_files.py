"""Read small data sets as a training does: read_local_files.py FOLDER here|anywhere.

Prints whether the readers of the network were loaded; in a process of its own for that, and
because the libraries look at HF_HOME when they are imported.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tunesmith.job.training import dataset_cache

home, place = Path(sys.argv[1]), sys.argv[2]
os.environ["HF_HOME"] = str(home)
data = home / "data"
data.mkdir()
rows = [{"text": "Who are you?"}, {"text": "你是谁？"}]
for name, lines in (("a.json", [json.dumps(rows)]), ("b.jsonl", map(json.dumps, rows))):
    (data / name).write_text("".join(f"{line}\n" for line in lines))
(data / "c.csv").write_text("text\nWho are you?\n你是谁？\n")
registry = {path.stem: {"file_name": path.name} for path in data.iterdir()}
(data / "dataset_info.json").write_text(json.dumps(registry))
config: dict[str, Any] = {"dataset": "a,b,c", "dataset_dir": str(data)}
view = dataset_cache.by_content(config)
if place == "here":
    config["dataset_dir"] = view
dataset_cache.hasten(config)
from datasets import load_dataset  # noqa: E402

for kind, name in (("json", "a.json"), ("json", "b.jsonl"), ("csv", "c.csv")):
    found = load_dataset(kind, data_files=[f"{view}/{name}"], split="train", cache_dir=str(home))
    assert found.to_list() == rows, name
print("scipy.io" in sys.modules)
