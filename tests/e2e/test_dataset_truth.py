"""`kept` is what LLaMA-Factory itself keeps: its loader, converter and first filter are run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tunesmith.dataset.check import check_file
from tunesmith.dataset.registry import load_registry

pytestmark = pytest.mark.e2e

# One process for all cases. For each key: the rows kept, or why LLaMA-Factory stopped.
ORACLE = """
import json, sys
from types import SimpleNamespace as Values
from llamafactory.data.loader import _get_merged_dataset

folder, found = sys.argv[1], {}
model = Values(cache_dir=folder + "/cache", hf_hub_token=None, trust_remote_code=False)
training = Values(seed=1, local_process_index=0, dataloader_num_workers=0)
for key in json.load(open(folder + "/dataset_info.json")):
    data = Values(dataset_dir=folder, media_dir=folder, max_samples=None, streaming=False,
                  preprocessing_num_workers=None, overwrite_cache=True, mix_strategy="concat")
    try:
        rows = _get_merged_dataset([key], model, data, training, "sft")
        # SupervisedDatasetProcessor.preprocess_dataset drops the others.
        kept = sum(len(r["_prompt"]) % 2 == 1 and len(r["_response"]) == 1 for r in rows)
        found[key] = [kept, None]
    except Exception as error:
        found[key] = [0, type(error).__name__]
json.dump(found, open(folder + "/found.json", "w"))
"""


def alpaca(**change: Any) -> dict[str, Any]:
    value = {"instruction": "q", "input": "", "output": "a", **change}
    return {key: held for key, held in value.items() if held is not ...}


def talk(*roles: str) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": "t"} for role in roles]}


NAMED = {"columns": {"prompt": "instruction", "query": "input", "response": "output"}}
TALKS = {"formatting": "sharegpt"}
# key: (rows, entry, rows kept, whether LLaMA-Factory stops with an error)
CASES: dict[str, tuple[list[Any], dict[str, Any], int, bool]] = {
    "good": ([alpaca(), alpaca(output="1")], NAMED, 2, False),
    "no_output": ([alpaca(), alpaca(output=...), alpaca(output=None)], NAMED, 1, False),
    "empty_output": ([alpaca(), alpaca(output="")], NAMED, 2, False),
    "all_numbers": ([alpaca(output=1), alpaca(output=2)], NAMED, 0, False),
    "one_number": ([alpaca(), alpaca(output=2)], NAMED, 0, True),
    "number_asked": ([alpaca(instruction=5)], NAMED, 0, True),
    "mixed_kinds": ([alpaca(id=1), alpaca(id="b")], NAMED, 0, True),
    "false_asked": ([alpaca(instruction=False)], NAMED, 1, False),
    "some_inputs": ([alpaca(), alpaca(input=...)], {}, 2, False),
    "no_inputs": ([alpaca(input=...)], {}, 0, True),
    "no_response": ([alpaca()], {"columns": {"prompt": "instruction"}}, 0, False),
    "bad_history": (
        [alpaca(history=[["q"]])],
        {"columns": {**NAMED["columns"], "history": "history"}},
        0,
        True,
    ),
    "ranking": ([alpaca()], {**NAMED, "ranking": True}, 0, True),
    "talks": (
        [
            talk("human", "gpt"),
            talk("system", "human", "gpt", "human", "gpt"),
            talk("gpt", "human"),
            talk("human"),
            talk("user", "gpt"),
            talk(),
        ],
        TALKS,
        2,
        False,
    ),
    "no_talk": ([talk("human", "gpt"), {"conversations": None}], TALKS, 0, True),
}
# key: (bytes, suffix, rows kept, whether LLaMA-Factory stops with an error)
RAW: dict[str, tuple[bytes, str, int, bool]] = {
    "lines": (b'{"instruction": "q", "output": "a"}\n\n' * 2, ".jsonl", 2, False),
    "lines_as_json": (b'{"instruction": "q", "output": "a"}\n' * 2, ".json", 2, False),
    "list_as_jsonl": (b'[{"instruction": "q", "output": "a"}]', ".jsonl", 1, False),
    "bom_list": (b'\xef\xbb\xbf[{"instruction": "q", "output": "a"}]', ".json", 0, True),
    "bom_lines": (b'\xef\xbb\xbf{"instruction": "q", "output": "a"}\n', ".jsonl", 1, False),
    "trailing_comma": (b'[{"instruction": "q", "output": "a"},\n]', ".json", 0, True),
    "key_twice_list": (b'[{"instruction": "q", "output": "a", "output": "b"}]', ".json", 1, False),
    "key_twice_lines": (b'{"instruction": "q", "output": "a", "output": "b"}', ".jsonl", 0, True),
    "dates_lines": (b'{"instruction": "q", "output": "2024-05-01"}\n', ".jsonl", 0, False),
    "dates_list": (b'[{"instruction": "q", "output": "2024-05-01"}]', ".json", 1, False),
    "huge_number": (
        b'[{"instruction": "q", "output": "a", "n": 1000000000000000000000000000000}]',
        ".json",
        0,
        True,
    ),
    "empty": (b"", ".json", 0, True),
}


def test_kept_is_what_llamafactory_keeps(tmp_path: Path, root: Path, training_python: Path) -> None:
    registry: dict[str, Any] = {}
    expected: dict[str, tuple[int, bool]] = {}
    for key, (rows, entry, kept, stops) in CASES.items():
        for suffix in (".json", ".jsonl"):
            name = key + suffix
            text = "\n".join(map(json.dumps, rows)) if suffix == ".jsonl" else json.dumps(rows)
            (tmp_path / name).write_text(text)
            registry[name] = {"file_name": name, **entry}
            expected[name] = (kept, stops)
    for key, (data, suffix, kept, stops) in RAW.items():
        (tmp_path / (key + suffix)).write_bytes(data)
        columns = {"columns": {"prompt": "instruction", "response": "output"}}
        registry[key] = {"file_name": key + suffix, **columns}
        expected[key] = (kept, stops)
    demo = json.loads((root / "data/dataset_info.json").read_bytes())["philosophy_conch"]
    shutil.copy(root / "data/philosophy_data.json", tmp_path)
    registry["demo"] = demo
    expected["demo"] = (120, False)
    (tmp_path / "dataset_info.json").write_text(json.dumps(registry))

    done = subprocess.run(
        [str(training_python), "-c", ORACLE, str(tmp_path)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert {key: (kept, why is not None) for key, (kept, why) in found.items()} == expected
    entries = load_registry(tmp_path).items()
    ours = {key: check_file(e.path(tmp_path), e, "sft").kept for key, e in entries}
    assert ours == {key: kept for key, (kept, _) in expected.items()}
