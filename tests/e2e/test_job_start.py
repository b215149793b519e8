"""How a training starts: with what it needs and no more, on rows that are the data's.

What is left out and what is found again must not be seen in the result: the adapter is that of
`llamafactory-cli train`, byte for byte.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import STANDINS, Job
from tunesmith.core.files import read_json, sha256_of

pytestmark = pytest.mark.e2e


# For three steps: no checkpoint between.
SHORT: dict[str, Any] = {"max_steps": 3, "save_steps": 100}


QUANTISED = """
import sys
from tunesmith.job.patches import imports

imports.trim()
import torch
import bitsandbytes  # as transformers does when it loads a quantised model
from peft import LoraConfig, get_peft_model

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.plain = torch.nn.Linear(8, 8)
        self.four = bitsandbytes.nn.Linear4bit(8, 8)

model = Model()
model.is_loaded_in_4bit = True  # as transformers says it
adapted = get_peft_model(
    model, LoraConfig(target_modules=["plain", "four"])
).base_model.model
print(type(adapted.plain).__module__, type(adapted.four).__module__)
print(type(adapted.four).__name__, "sklearn" in sys.modules)
"""


TEXTS = r"""
import json, sys
from transformers import AutoTokenizer
from tunesmith.job.patches.transformers import ENCODE_STRAIGHT
from tunesmith.core.patching import install

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
marks = [*tokenizer.all_special_tokens, *tokenizer.added_tokens_decoder.values()]
texts = ["", " ", "Who are you?\n", "你是谁？", "e\u0301 \U0001f9d1\u200d\U0001f680", "\x00\ufffd"]
texts += [f"a{mark} b" for mark in map(str, marks)] + [text * 3000 for text in texts]

def ids(split):
    tokenizer.split_special_tokens = split
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]

def others():
    cut = tokenizer.encode("one two three four", truncation=True, max_length=2)
    return [cut, tokenizer.encode("one", "two"), ids(False), tokenizer.encode("one")]

before = [ids(False), ids(True), others()]
install(ENCODE_STRAIGHT)
install(ENCODE_STRAIGHT)
assert [ids(False), ids(True), others()] == before
print(len(texts))
"""


READING = r"""
import json, os, sys
from pathlib import Path
from tunesmith.job.training import dataset_cache

os.environ["HF_HOME"] = sys.argv[1]
data = Path(sys.argv[1], "data")
data.mkdir()
rows = [{"text": "Who are you?"}, {"text": "你是谁？"}]
for name, lines in (("a.json", [json.dumps(rows)]), ("b.jsonl", map(json.dumps, rows))):
    (data / name).write_text("".join(f"{line}\n" for line in lines))
(data / "c.csv").write_text("text\nWho are you?\n你是谁？\n")
registry = {path.stem: {"file_name": path.name} for path in data.iterdir()}
(data / "dataset_info.json").write_text(json.dumps(registry))
config = {"dataset": "a,b,c", "dataset_dir": str(data)}
view = dataset_cache.by_content(config)
if sys.argv[2] == "here":
    config["dataset_dir"] = view
dataset_cache.hasten(config)
from datasets import load_dataset

for kind, name in (("json", "a.json"), ("json", "b.jsonl"), ("csv", "c.csv")):
    found = load_dataset(kind, data_files=[f"{view}/{name}"], split="train", cache_dir=sys.argv[1])
    assert found.to_list() == rows, name
print("scipy.io" in sys.modules)
"""


CONVERTING = r"""
import gc
from types import SimpleNamespace
from datasets import Dataset, arrow_writer
from llamafactory.data import loader
from llamafactory.data.parser import DatasetAttr
from tunesmith.job.patches import tokenizing
from tunesmith.job.patches.datasets import INFER_TYPE_ONCE, REMEMBER_TYPE
from tunesmith.job.patches.llamafactory import CONVERT_IN_BATCHES
from tunesmith.core.patching import install

def talk(*turns):
    return {"conversations": [{"from": who, "value": text} for who, text in turns], "tools": "[]"}

alpaca = [
    {"instruction": "Who?", "input": "you", "output": "A lamp.", "system": "Be.", "history": None},
    {"instruction": "谁？", "input": "", "output": "灯。", "system": "", "history": [["a", "b"]]},
    {"instruction": "", "input": "", "output": None, "system": None, "history": []},
] * 700  # more than a batch
sharegpt = [
    talk(("human", "Who?"), ("gpt", "A lamp.")),
    talk(("system", "Be."), ("human", "Who?"), ("function_call", "{}"), ("observation", "1"),
         ("gpt", "A lamp.")),
    talk(("gpt", "not their turn"), ("human", "Who?")),
    talk(),
] * 400
ranked = [{"instruction": "Who?", "input": "", "chosen": "A lamp.", "rejected": "No."}] * 3
pictured = [{"instruction": "What?", "input": "", "output": "It.", "images": ["a.png"]},
            {"instruction": "What?", "input": "", "output": "It.", "images": []}]
told = [{"instruction": "Who?", "input": "", "output": "A lamp.", "kto_tag": True},
        {"instruction": "Who?", "input": "", "output": "No.", "kto_tag": False}]
media = {"images": None, "videos": None, "audios": None}
cases = [
    (alpaca, {"system": "system", "history": "history"}),
    (sharegpt, {"formatting": "sharegpt", "tools": "tools"}),
    (ranked, {"ranking": True, "chosen": "chosen", "rejected": "rejected"}),
    (pictured, {"images": "images"}),
    (told, {"kto_tag": "kto_tag"}),
]
data_args = SimpleNamespace(
    streaming=False, preprocessing_num_workers=None, overwrite_cache=True, media_dir="."
)
training_args = SimpleNamespace(local_process_index=0)

def attributes(options):
    found = DatasetAttr("file", "rows")
    for key, value in options.items():
        setattr(found, key, value)
    return found

usual_map, usual_make = Dataset.map, arrow_writer.TypedSequence.__arrow_array__
seen = []
def counted_map(self, *arguments, **options):
    seen.append("batch" if options["batched"] else "row")
    return usual_map(self, *arguments, **options)
def counted_make(self, type=None):
    seen.append("column")
    return usual_make(self, type)
Dataset.map = counted_map
arrow_writer.TypedSequence.__arrow_array__ = counted_make

def all_of_them():
    seen.clear()
    made = [loader.align_dataset(Dataset.from_list(rows), attributes(options), data_args,
                                 training_args) for rows, options in cases]
    return [(one.features, one.data.schema.types, one.to_list()) for one in made]

def failure():
    try:
        rows = Dataset.from_list([{"instruction": 1}])
        loader.align_dataset(rows, attributes({}), data_args, training_args)
    except Exception as error:
        return type(error), str(error)

theirs, failed = all_of_them(), failure()
assert "batch" not in seen and failed is not None
columns = seen.count("column")
install(CONVERT_IN_BATCHES)
assert all_of_them() == theirs and failure() == failed
assert "row" not in seen and seen.count("column") == columns
install(REMEMBER_TYPE), install(INFER_TYPE_ONCE)
tokenizing.hasten()
assert gc.get_freeze_count() > 100_000
assert all_of_them() == theirs and failure() == failed
print(columns, seen.count("column"))
"""


def test_rows_converted_together_are_those_converted_one_by_one(
    training_python: Path,
) -> None:
    argv = [training_python, "-c", CONVERTING]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    # And each column is made once, not a second time to see its type.
    before, now = map(int, done.stdout.split()[-2:])
    assert before == 2 * now


def test_files_of_this_machine_are_read_without_the_network_s_readers(
    tmp_path: Path, training_python: Path
) -> None:
    for place, loaded in (("here", "False"), ("anywhere", "True")):
        home = tmp_path / place
        home.mkdir()
        argv = [training_python, "-c", READING, home, place]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.split()[-1] == loaded


def test_quick_ids_are_the_usual_ids(
    tmp_path: Path, training_python: Path, base_model: Path
) -> None:
    qwen = tmp_path / "qwen"
    subprocess.run([training_python, STANDINS / "tiny_r1.py", qwen], check=True)
    for model in (base_model, qwen):
        argv = [training_python, "-c", TEXTS, model]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]


def test_a_quantised_layer_still_gets_its_own_kind_of_adapter(training_python: Path) -> None:
    argv = [training_python, "-c", QUANTISED]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-2:] == [
        "peft.tuners.lora.layer peft.tuners.lora.bnb",
        "Linear4bit False",
    ]


def trained(job: Job, model: Path, data: Path, env: dict[str, str], **config: Any) -> Job:
    """Train to a good end."""
    job.make(model, data, env=env, **SHORT, **config)
    job.call("start")
    job.wait_for_end("succeeded")
    return job


def test_a_job_loads_less_and_trains_the_same(
    tmp_path: Path, job: Job, training_python: Path, tiny_model: Path, data: Path
) -> None:
    env = {"HF_HOME": str(tmp_path / "hub")}
    trained(job, tiny_model, data, env, standin=STANDINS / "names_modules.py")
    log = job.folder.log_file.read_text(errors="replace")
    loaded = set(re.findall(r"(?m)^module: (\S+)$", log))
    assert {"torch", "peft", "llamafactory.train.sft.workflow"} <= loaded
    left_out = {"bitsandbytes", "sklearn", "nltk", "llamafactory.train.dpo.trainer"}
    assert not left_out & loaded

    output = tmp_path / "theirs"
    config = yaml.safe_load(job.folder.config_file.read_text()) | {"output_dir": str(output)}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    argv = [training_python.with_name("llamafactory-cli"), "train", file]
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(argv, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sha256_of(output / "adapter_model.safetensors") == job.adapter()


def test_rows_are_found_again_and_changed_rows_never_missed(
    tmp_path: Path, training_python: Path, tiny_model: Path, data: Path
) -> None:
    env = {"HF_HOME": str(tmp_path / "hub")}
    rows = read_json(data / "rows.json")
    assert len(rows[0]["output"]) > 1

    def run(name: str, content: Any) -> Job:
        folder = tmp_path / f"data of {name}"
        folder.mkdir(exist_ok=True)
        (folder / "rows.json").write_text(json.dumps(content))
        # The time of change says nothing: an archive unpacked, a file synchronised.
        os.utime(folder / "rows.json", (1_000_000, 1_000_000))
        (folder / "dataset_info.json").write_text((data / "dataset_info.json").read_text())
        made = Job(training_python, tmp_path / "runs" / f"{name}-{len(content[0]['output'])}")
        made.folder.path.parent.mkdir(exist_ok=True)
        return trained(made, tiny_model, folder, env, overwrite_cache=True)

    def prepared() -> set[Path]:
        return set((tmp_path / "hub" / "datasets").rglob("cache-*.arrow"))

    first = run("one", rows)
    there = prepared()
    assert there
    assert [event["to"] for event in first.events("changed")] == [False]

    # Elsewhere, in another run: nothing is prepared anew.
    assert run("two", rows).losses() == first.losses()
    assert prepared() == there

    # In the same place, of the same size and time: other rows are other rows.
    changed = [row | {"output": row["output"][::-1]} for row in rows]
    changed[0]["output"] += " "
    assert run("one", changed).losses() != first.losses()
    assert prepared() > there
