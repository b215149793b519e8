"""`merge` against LLaMA-Factory's export_model: the same files, byte by byte.

Small random models of the shapes that matter: an untied and a tied head, one file and several,
other dtypes, rank-stabilised LoRA, ranks and sizes that no block divides, and DoRA, which goes
through PEFT. One process, because it starts for seconds.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.e2e

STANDINS = Path(__file__).resolve().parent.parent / "standins"
CASES = (
    *("untied", "tied", "several files", "float32 base", "float16 base", "float32", "float16"),
    *("rslora", "odd sizes", "rank 64", "the demo model"),
)

SCRIPT = """
import dataclasses, json, shutil, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import tiny_r1
import torch
import yaml
from llamafactory.train import tuner
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen2Config
from tunesmith.core.files import sha256_of
from tunesmith.job.inference import engine
from tunesmith.job.merge import inputs, matmul, phase as merge_phase, skeleton, streaming
from tunesmith.job.run.schema import RunRequest
from tunesmith.job.merge.adapter import check_fits
from tunesmith.job.proof.weights import weight_checks

top, demo = Path(sys.argv[1]), Path(sys.argv[3])
found = {}
tiny_r1.build(top / "tiny")

def base_of(name, dtype=torch.bfloat16, shard="5GB", **changed):
    folder = top / name
    config = Qwen2Config.from_pretrained(top / "tiny")
    for key, value in changed.items():
        setattr(config, key, value)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    AutoTokenizer.from_pretrained(top / "tiny").save_pretrained(folder)
    return folder

def adapter_of(name, base, **config):
    torch.manual_seed(3)
    plain = AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float32)
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    given = {"r": 8, "lora_alpha": 16, "target_modules": every} | config
    adapted = get_peft_model(plain, LoraConfig(task_type="CAUSAL_LM", **given))
    with torch.no_grad():
        for key, weight in adapted.named_parameters():
            if "lora_B" in key:
                weight.normal_(std=0.02)
    adapted.save_pretrained(top / f"adapter of {name}")
    return top / f"adapter of {name}"

def config_of(base, adapter):
    return {"model_name_or_path": str(base), "output_dir": str(adapter), "stage": "pt",
            "finetuning_type": "lora", "template": "deepseekr1"}

def folders(name, base, adapter, dtype, shard=None):
    keys = inputs.export_keys({"infer_dtype": dtype}, base)
    config = config_of(base, adapter)
    theirs, ours = top / f"theirs {name}", top / f"ours {name}"
    ours.mkdir()
    save = PreTrainedModel.save_pretrained
    if shard:
        # export_size is a whole number of GB: files of a tiny model are cut here.
        def cut(self, *args, **given):
            return save(self, *args, **{**given, "max_shard_size": shard})
        PreTrainedModel.save_pretrained = cut
    args = {**engine.arguments(config), **keys, "export_legacy_format": False}
    given = {**args, "adapter_name_or_path": str(adapter), "export_dir": str(theirs)}
    tuner.export_model(given)
    shards = skeleton.without_weights(tuner, {**args, "export_dir": str(ours)})
    PreTrainedModel.save_pretrained = save
    facts = check_fits(base, adapter)
    assert streaming.why_not(facts, [adapter], keys, config, base) is None
    way = matmul.best()
    made = streaming.merge(base, facts, shards, ours, way, 3, [base / "config.json"], hashed=True)
    assert made.hashes == {path: sha256_of(path) for path in made.hashes}
    assert len(made.hashes) == len(shards) + 1
    once = top / f"once {name}"
    once.mkdir()
    # One process, and NumPy's own rounding.
    plain = dataclasses.replace(way, convert=None)
    streaming.merge(base, facts, shards, once, plain)
    for shard in shards:
        assert made.hashes[ours / shard.file] == sha256_of(once / shard.file)
    shutil.rmtree(once)
    proof = weight_checks(base, ours, facts, dtype)
    guess = streaming.guessed(base, inputs.SAFETENSORS_NAMES[dtype], 5)
    sums = {}
    for folder in (theirs, ours):
        sums[folder] = {file.name: sha256_of(file) for file in sorted(folder.iterdir())}
    apart = top / f"apart {name}"
    apart.mkdir()
    streaming.merge(base, facts, shards, apart, matmul.by_numpy())
    off = total = steps = 0
    for shard in shards:
        one, two = (load_file(folder / shard.file) for folder in (ours, apart))
        for key, value in one.items():
            total += value.numel()
            off += int((value != two[key]).sum())
            # A rounding error is as large as the sums that were rounded, not as their result.
            step = torch.finfo(value.dtype).eps * float(value.abs().max())
            apart_by = float((value.double() - two[key].double()).abs().max())
            steps = max(steps, apart_by / step if apart_by else 0)
    found[name] = {"theirs": sums[theirs], "ours": sums[ours], "way": way.name,
                   "converts": way.convert is not None,
                   "guess": guess == shards,
                   "proof": {check.name: check.passed for check in proof},
                   "numpy": [off, total, steps]}

tiny = top / "tiny"
adapter = adapter_of("tiny", tiny)
folders("untied", tiny, adapter, "bfloat16")
folders("float32", tiny, adapter, "float32")
folders("float16", tiny, adapter, "float16")
tied = base_of("tied base", tie_word_embeddings=True)
folders("tied", tied, adapter_of("tied", tied), "bfloat16")
cut = base_of("cut base", shard="200KB")
assert len(list(cut.glob("*.safetensors"))) > 2
folders("several files", cut, adapter_of("cut", cut), "bfloat16", shard="150KB")
single = base_of("single base", torch.float32)
folders("float32 base", single, adapter_of("single", single), "bfloat16")
half = base_of("half base", torch.float16)
folders("float16 base", half, adapter_of("half", half), "bfloat16")
folders("rslora", tiny, adapter_of("rslora", tiny, r=6, use_rslora=True), "bfloat16")
odd = base_of("odd base", intermediate_size=1537)
folders("odd sizes", odd, adapter_of("odd", odd, r=12, lora_alpha=7), "bfloat16")
folders("rank 64", tiny, adapter_of("rank 64", tiny, r=64), "bfloat16")
folders("the demo model", demo, adapter_of("demo", demo), "bfloat16")

# The phase itself: by blocks with LLaMA-Factory beside it, and by PEFT where that is needed.
def phase(name, adapter, **asked):
    run = top / f"run {name}"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(config_of(tiny, adapter)))
    events = []
    emit = lambda event, **values: events.append({"event": event, **values})
    summary = merge_phase.run(run, RunRequest(merge=asked), emit)
    files = {file.name: sha256_of(file) for file in sorted((run / "merged").iterdir())}
    found[f"phase {name}"] = {"events": events, "summary": summary, "files": files}

phase("plain", adapter)
dora = adapter_of("dora", tiny, use_dora=True)
phase("dora", dora)
keys = inputs.export_keys({}, tiny)
tuner.export_model({**engine.arguments(config_of(tiny, dora), adapters=[dora]), **keys,
                    "export_dir": str(top / "theirs dora"), "export_legacy_format": False})
found["dora"] = sha256_of(top / "theirs dora" / "model.safetensors")
(top / "found.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, training_python: Path, base_model: Path, root: Path
) -> dict[str, Any]:
    top = tmp_path_factory.mktemp("export")
    argv = [training_python, "-c", SCRIPT, top, STANDINS, base_model]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root / "src")}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    value: dict[str, Any] = json.loads((top / "found.json").read_text())
    shutil.rmtree(top)  # a gigabyte, and pytest keeps the folders of three sessions
    return value


@pytest.mark.parametrize("case", CASES)
def test_every_file_is_the_exports(found: dict[str, Any], case: str) -> None:
    theirs, ours = found[case]["theirs"], found[case]["ours"]
    assert ours == theirs
    assert {"config.json", "tokenizer.json", "Modelfile", "generation_config.json"} <= set(ours)
    assert any(name.endswith(".safetensors") for name in ours)


def test_the_library_rounds_where_it_multiplies(found: dict[str, Any]) -> None:
    for case in CASES:
        assert found[case]["converts"] is (found[case]["way"] == "mkl of torch"), case


def test_several_files_come_with_their_index(found: dict[str, Any]) -> None:
    names = set(found["several files"]["ours"])
    assert "model.safetensors.index.json" in names
    assert sum(name.endswith(".safetensors") for name in names) > 2


def test_every_merge_is_what_the_proof_recomputes(found: dict[str, Any]) -> None:
    for case in CASES:
        assert found[case]["proof"] == dict.fromkeys(
            ("structure", "untouched", "recomputed", "effect"), True
        ), case


def test_a_single_file_is_foreseen(found: dict[str, Any]) -> None:
    for case in CASES:
        assert found[case]["guess"] is (case != "several files"), case


def test_numpy_rounds_a_few_numbers_to_the_other_neighbour(found: dict[str, Any]) -> None:
    """How many sums end in another last bit depends on the processor; how far they lie does not.

    In 16 bits nearly all such bits are rounded away, in float32 none is.
    """
    for case in CASES:
        off, total, steps = found[case]["numpy"]
        assert steps <= 4, case
        assert case == "float32" or off <= total * 1e-3, case


def test_the_phase_writes_the_exports_weights(found: dict[str, Any]) -> None:
    plain = found["phase plain"]
    name = "model.safetensors"
    assert plain["files"][name] == found["untied"]["theirs"][name]
    assert plain["summary"]["arithmetic"] == found["untied"]["way"]
    assert not [e for e in plain["events"] if e.get("what") == "merge"]


def test_what_is_more_than_a_sum_goes_through_peft_and_is_said(found: dict[str, Any]) -> None:
    dora = found["phase dora"]
    said = [e for e in dora["events"] if e.get("what") == "merge"]
    assert [e["why"] for e in said] == ["use_dora"]
    assert dora["summary"]["arithmetic"] == "peft"
    assert dora["files"]["model.safetensors"] == found["dora"]
