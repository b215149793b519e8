"""Evaluation, chat, merge and proof with a real model, and faults the proof must find.

An adapter with random weights stands in for a trained one: what is proven here does not
depend on how it came about. Processes are few because each starts for seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.e2e

TARGETS = ["q_proj", "v_proj"]
PROMPTS = [
    {"prompt": "Who are you?", "expect": "(?s).", "reference": None, "system": None},
    {"prompt": "你好", "expect": "^never this$", "reference": "你好！", "system": "Be brief."},
]
COMMON = """
import json, sys
from pathlib import Path
import torch
from tunesmith.job.run.folder import RunFolder
run = Path(sys.argv[1])
request = RunFolder(run).request()
found, events = {}, []
def emit(event, **values):
    events.append({"event": event, **values})
def done():
    (run / (sys.argv[2] + ".json")).write_text(json.dumps(found, ensure_ascii=False))
"""

# The measuring half: evaluate twice, and what an independent reckoning says.
MEASURE = (
    COMMON
    + """
import dataclasses
import yaml
from peft import LoraConfig, get_peft_model
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from tunesmith.job.evaluation import phase as evaluation_phase
from tunesmith.job.inference import engine, validation_rows
from tunesmith.job.merge import phase as merge_phase
from tunesmith.job.run import config as run_config
from tunesmith.job.run.failures import JobError

config = run_config.read_config(run)
base = config["model_name_or_path"]
plain = AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float32).eval()

def reckon(model, rows):
    total = count = 0
    with torch.inference_mode():
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
            kept = labels != -100
            logits = model(input_ids=ids).logits[0, :-1][kept]
            total += float(torch.nn.functional.cross_entropy(logits, labels[kept], reduction="sum"))
            count += int(kept.sum())
    return total / count, count

# LLaMA-Factory's own way to its validation rows, argument checks and all.
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer
args = get_train_args(config)
module = load_tokenizer(args[0])
template = get_template_and_fix_tokenizer(module["tokenizer"], args[1])
rows = list(get_dataset(template, *args[:3], stage="sft", **module)["eval_dataset"])
found["reckoned_before"] = reckon(plain, rows)
found["row_texts"] = [module["tokenizer"].decode(row["input_ids"]) for row in rows]

torch.manual_seed(0)
adapted = get_peft_model(plain, LoraConfig(
    task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=config["lora_target"].split(",")))
with torch.no_grad():
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.normal_(std=0.02)
adapted.eval().save_pretrained(config["output_dir"])
found["reckoned_after"] = reckon(adapted, rows)

found["before"] = evaluation_phase.run(run, request, emit, phase="before")
found["after"] = evaluation_phase.run(run, request, emit, phase="after")
found["events"] = events

found["full"] = engine.tuned_arguments(config | {"finetuning_type": "full"}, run / "output")
found["lora"] = engine.tuned_arguments(config, run / "output")

# Greedy answers, one token at a time without cache or padding.
codec = engine.codec(engine.base_arguments(config))
loaded = engine.load(codec)
asked = [engine.Question.of(p.prompt, p.system) for p in request.prompts]
def by_hand(question, count):
    ids = codec.encode(question)
    new = []
    with torch.inference_mode():
        while len(new) < count and not (new and new[-1] in codec.stop_ids()):
            new.append(int(loaded.model(torch.tensor([ids + new])).logits[0, -1].argmax()))
    return codec.tokenizer.decode(new, skip_special_tokens=True)
# What makes transformers >= 4.50 sample in spite of do_sample=False.
loaded.model.generation_config.update(
    do_sample=True, temperature=5.0, transformers_version="4.52.4")
sampling = engine.Sampling(max_new_tokens=12)
found["greedy"] = [a.text for a in engine.generate(loaded, asked, sampling)]
found["by_hand"] = [by_hand(question, 12) for question in asked]
pieces = []
answer = engine.stream(loaded, asked[1], sampling, pieces.append)
found["streamed"] = ["".join(pieces), answer.text]
wild = [dataclasses.replace(sampling, do_sample=True, temperature=1.5, seed=s) for s in (1, 1, 2)]
found["sampled"] = [engine.generate(loaded, asked[:1], one)[0].text for one in wild]

# The ids asked with are the ids trained on, also where a thinking mode puts a block between.
for template, thinking in (("smollm", None), ("deepseekr1", False), ("deepseekr1", True)):
    varied = config | {"template": template, "enable_thinking": thinking}
    if thinking is None:
        del varied["enable_thinking"]
    its = engine.codec(engine.base_arguments(varied))
    held = validation_rows.load_held_out(varied, its, 6)
    same = []
    for item, row in zip(held.items, held.rows):
        trained = [i for i, label in zip(row["input_ids"], row["labels"]) if label == -100]
        same.append(its.encode(item.question) == trained)
    prompt = its.tokenizer.decode(its.encode(asked[0]))
    found[f"prompt {template} {thinking}"] = [same, prompt]

# Where there is no fitting text there must be a reason.
def reason(**change):
    held = validation_rows.load_held_out(config | change, codec, 6)
    return [len(held.rows), len(held.items), held.no_loss, held.no_answers]
found["packed"] = reason(packing=True, val_size=0.5)
found["nothing"] = reason(val_size=0)
found["dpo"] = reason(stage="dpo")
split = validation_rows._Split.load(config, codec)
shuffled = list(reversed(split.rows()))
found["wrong_order"] = [len(split.items(codec, shuffled, 6)[0]), split.items(codec, shuffled, 6)[1]]
short = split.rows()[:-1]
found["wrong_count"] = [len(split.items(codec, short, 5)[0]), split.items(codec, short, 5)[1]]

broken = AutoTokenizer.from_pretrained(base)
broken.backend_tokenizer.normalizer = normalizers.Replace("\\n", "")
validation_rows.check_round_trip(broken, ["one line"])
try:
    validation_rows.check_round_trip(broken, ["two\\nlines"])
except JobError as error:
    found["round_trip"] = [error.failure, error.message]

(run / "merged").mkdir()
(run / "merged" / "old").write_text("of an earlier merge")
(run / "proof.json").write_text("{}")
found["merge"] = merge_phase.run(run, request, emit)
done()
"""
)

# The proving half: a fresh process, as the worker starts one.
PROVE = (
    COMMON
    + """
import shutil
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.job.run import config as run_config
from tunesmith.job.inference import engine
from tunesmith.job.merge import phase as merge_phase
from tunesmith.job.proof import phase as proof_phase
from tunesmith.job.merge.adapter import check_fits
from tunesmith.job.proof.behaviour import tokenizer_check
from tunesmith.job.proof.weights import file_check, weight_checks
from safetensors import safe_open
from safetensors.torch import load_file, save_file

config = run_config.read_config(run)
base, output, merged = Path(config["model_name_or_path"]), run / "output", run / "merged"
facts = check_fits(base, output)
found["summary"] = proof_phase.run(run, request, emit)
found["proof"] = json.loads((run / "proof.json").read_text())

weights = merged / "model.safetensors"
right = weights.read_bytes()
length = int.from_bytes(right[:8], "little")
header = json.loads(right[8 : 8 + length])
target, norm = "model.layers.7.self_attn.q_proj.weight", "model.layers.7.input_layernorm.weight"

def overwrite(name, tensor):
    start, end = header[name]["data_offsets"]
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    assert len(data) == end - start
    with weights.open("r+b") as stream:
        stream.seek(8 + length + start)
        stream.write(data)

def verdict(tag, model=base, adapter=facts):
    failed = [c for c in weight_checks(model, merged, adapter, "bfloat16") if c.passed is False]
    found[tag] = [c.name for c in failed] + [c.detail for c in failed[:1]]
    weights.write_bytes(right)

old = load_file(base / "model.safetensors")
new = load_file(weights)
verdict("right")

changed = new[norm].clone(); changed[3] = -changed[3]
overwrite(norm, changed)
verdict("one element outside the targets")

changed = new[target].clone(); changed[5, 9] *= 1.02
overwrite(target, changed)
verdict("one element of a target by two percent")

overwrite(target, old[target])
verdict("one module unmerged")

for name in facts.targets.values():
    overwrite(name, old[name])
try:
    merge_phase.check_complete(merged, base, facts, "bfloat16")
except TunesmithError as error:
    found["merge of nothing"] = error.message
verdict("scaled to zero in the merge")

# An adapter that does nothing, and its faithful merge.
zero = run / "zero adapter"
shutil.copytree(output, zero)
tensors = load_file(zero / "adapter_model.safetensors")
save_file({n: t * (0 if "lora_B" in n else 1) for n, t in tensors.items()},
          zero / "adapter_model.safetensors")
for name in facts.targets.values():
    overwrite(name, old[name])
verdict("an adapter of zeros", adapter=check_fits(base, zero))

# What cannot be recomputed is not called proven.
import dataclasses
beyond = dataclasses.replace(facts, beyond_plain=("use_dora",))
for tag in ("beyond", "beyond and unmerged"):
    checks = weight_checks(base, merged, beyond, "bfloat16")
    found[tag] = {c.name: c.passed for c in checks}
    for name in facts.targets.values():
        overwrite(name, old[name])
weights.write_bytes(right)

# Another base of equal shapes.
other = run / "other base"
shutil.copytree(base, other)
save_file({n: t * (1.01 if n in (norm, target) else 1) for n, t in old.items()},
          other / "model.safetensors")
verdict("another base", model=other)

weights.write_bytes(right[:-1000])
found["truncated"] = [file_check(merged)[0].passed, file_check(merged)[0].detail]
weights.write_bytes(right)

asked = [(engine.Question.of("two\\nlines"), "")]
tokenizer = merged / "tokenizer.json"
text = tokenizer.read_text()
values = json.loads(text)
values["normalizer"] = {"type": "Replace", "pattern": {"String": "\\n"}, "content": ""}
found["tokenizer"] = [tokenizer_check(base, merged, asked).passed]
tokenizer.write_text(json.dumps(values))
found["tokenizer"].append(tokenizer_check(base, merged, asked).passed)
tokenizer.write_text(text)

# All tensors are right, and still it is another model.
file = merged / "config.json"
values = json.loads(file.read_text())
file.write_text(json.dumps(values | {"rope_theta": 20000.0}))
try:
    proof_phase.run(run, request, emit)
except TunesmithError as error:
    found["refused"] = [error.exit_code, error.message]
found["refused_proof"] = json.loads((run / "proof.json").read_text())
found["folders"] = sorted(p.name for p in run.iterdir() if p.name.startswith("merged"))
try:
    proof_phase.run(run, request, emit)
except UsageError as error:
    found["gone"] = error.message
done()
"""
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, base_model: Path) -> Path:
    """A run folder whose path has a space, with 20 rows of data."""
    top = tmp_path_factory.mktemp("model side")
    rows = [
        {"instruction": f"Question {n}?\nIn two lines.", "input": "", "output": f"答案 {n * 37}。"}
        for n in range(20)
    ]
    rows[3]["output"] = ""
    (top / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    columns = {"prompt": "instruction", "query": "input", "response": "output"}
    info = {"rows": {"file_name": "rows.json", "columns": columns}}
    (top / "dataset_info.json").write_text(json.dumps(info))
    run = top / "run"
    run.mkdir()
    config = {
        "model_name_or_path": str(base_model),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_target": ",".join(TARGETS),
        "dataset": "rows",
        "dataset_dir": str(top),
        "template": "smollm",
        "cutoff_len": 128,
        "val_size": 6,
        "preprocessing_num_workers": 2,
        "overwrite_cache": True,
        "output_dir": str(run / "output"),
        "learning_rate": 1.0e-3,
        "report_to": "none",
        "seed": 7,
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    request = {
        "prompts": PROMPTS,
        "evaluate": {"max_new_tokens": 8, "held_out_answers": 4, "batch_size": 4},
        "merge": {"template": "smollm", "infer_dtype": "bfloat16", "export_size": 5},
    }
    (run / "run.json").write_text(json.dumps(request, ensure_ascii=False), encoding="utf-8")
    return run


def execute(
    python: Path, *arguments: str, typed: str = "", timeout: int = 600
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [str(python), *arguments],
        env=environment,
        input=typed,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def results(python: Path, script: str, run: Path, name: str) -> dict[str, Any]:
    ended = execute(python, "-c", script, str(run), name)
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-4000:]
    found: dict[str, Any] = json.loads((run / f"{name}.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def measured(training_python: Path, folder: Path) -> dict[str, Any]:
    return results(training_python, MEASURE, folder, "measured")


@pytest.fixture(scope="module")
def spoken(
    training_python: Path, folder: Path, measured: dict[str, Any]
) -> subprocess.CompletedProcess[str]:
    chat = (
        "-m",
        "tunesmith.job.evaluation.chat",
        "--run",
        str(folder),
        "--greedy",
        "--max-new-tokens",
        "8",
    )
    return execute(training_python, *chat, "--what", "adapter", "--prompt", PROMPTS[0]["prompt"])


@pytest.fixture(scope="module")
def conversed(
    training_python: Path, folder: Path, measured: dict[str, Any]
) -> subprocess.CompletedProcess[str]:
    """A conversation with the merged model; its input ends without /exit."""
    chat = ("-m", "tunesmith.job.evaluation.chat", "--run", str(folder), "--what", "merged")
    typed = "Who are you?\nWho are you?\n/clear\nWho are you?\n"
    return execute(training_python, *chat, "--greedy", "--max-new-tokens", "5", typed=typed)


@pytest.fixture(scope="module")
def proven(
    training_python: Path,
    folder: Path,
    measured: dict[str, Any],
    conversed: subprocess.CompletedProcess[str],
) -> dict[str, Any]:
    # After the conversation, because it ends with a refused model.
    return results(training_python, PROVE, folder, "proven")


def answers(run: Path, phase: str) -> list[dict[str, Any]]:
    lines = (run / f"{phase}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("phase", ["before", "after"])
def test_loss_is_the_mean_over_all_trained_tokens(measured: dict[str, Any], phase: str) -> None:
    loss, tokens = measured[f"reckoned_{phase}"]
    assert measured[phase]["tokens"] == tokens
    assert measured[phase]["loss"] == pytest.approx(loss, abs=1e-4)
    assert measured[phase]["rows"] == 6


def test_the_adapter_is_in_the_second_measurement(measured: dict[str, Any]) -> None:
    assert abs(measured["after"]["loss"] - measured["before"]["loss"]) > 0.01


def test_held_out_answers_stand_beside_their_own_rows(
    measured: dict[str, Any], folder: Path
) -> None:
    for phase in ("before", "after"):
        held = [record for record in answers(folder, phase) if record["set"] == "held_out"]
        assert len(held) == 4
        for record, text in zip(held, measured["row_texts"], strict=False):
            assert record["prompt"] in text
            assert record["reference"] in text
    assert len({text.split("Question ")[1].split("?")[0] for text in measured["row_texts"]}) == 6


def test_prompts_are_held_against_their_patterns(measured: dict[str, Any], folder: Path) -> None:
    asked = [record for record in answers(folder, "before") if record["set"] == "prompts"]
    assert [record["met"] for record in asked] == [True, False]
    assert measured["before"]["expected"] == {"met": 1, "of": 2}
    both = json.loads((folder / "evaluation.json").read_text())
    assert both["before"] == measured["before"]
    assert both["after"] == measured["after"]


def test_progress_reaches_its_total(measured: dict[str, Any]) -> None:
    progress = [event for event in measured["events"] if event["event"] == "progress"]
    for phase in ("before", "after"):
        for unit, total in (("rows", 6), ("answers", 6)):
            own = [e["done"] for e in progress if (e["phase"], e["unit"]) == (phase, unit)]
            assert own[-1] == total
            assert own == sorted(own)


def test_greedy_stays_greedy_whatever_the_model_ships(measured: dict[str, Any]) -> None:
    assert measured["greedy"] == measured["by_hand"]
    assert measured["streamed"] == [measured["by_hand"][1]] * 2


def test_sampling_follows_its_seed(measured: dict[str, Any]) -> None:
    first, again, other = measured["sampled"]
    assert first == again != other


@pytest.mark.parametrize("mode", ["smollm None", "deepseekr1 False"])
def test_the_model_is_asked_with_the_ids_it_was_trained_on(
    measured: dict[str, Any], mode: str
) -> None:
    same, _ = measured[f"prompt {mode}"]
    assert same == [True] * 6


def test_the_thinking_mode_decides_the_prompt(measured: dict[str, Any]) -> None:
    block = "<think>\n\n</think>\n\n"
    assert measured["prompt deepseekr1 False"][1].endswith(block)
    assert "<think>" not in measured["prompt deepseekr1 True"][1]


def test_no_pair_is_shown_where_it_might_be_wrong(measured: dict[str, Any]) -> None:
    rows, items, no_loss, reason = measured["packed"]
    assert rows > 0
    assert (items, no_loss) == (0, None)
    assert "packing" in reason
    assert measured["nothing"][:2] == [0, 0]
    assert "val_size" in measured["nothing"][2]
    assert "stage dpo" in measured["dpo"][2]
    assert measured["wrong_order"] == [
        0,
        "a text and its tokenized validation row differ; no pair is shown",
    ]
    assert measured["wrong_count"][0] == 0
    assert "counts differ" in measured["wrong_count"][1]


def test_a_tokenizer_that_loses_text_is_a_data_failure(measured: dict[str, Any]) -> None:
    failure, message = measured["round_trip"]
    assert failure == "data"
    assert "'two\\nlines'" in message


def test_merge_replaces_an_older_one_and_its_proof(measured: dict[str, Any], folder: Path) -> None:
    assert measured["merge"]["dtype"] == "bfloat16"
    assert measured["merge"]["targets"] == 30 * len(TARGETS)
    assert not (folder / "merged" / "old").exists()
    assert not list(folder.glob(".merged*"))


def test_chat_prints_the_answer_and_nothing_else(
    spoken: subprocess.CompletedProcess[str], folder: Path
) -> None:
    assert spoken.returncode == 0, spoken.stderr[-2000:]
    measured_answer = next(r for r in answers(folder, "after") if r["set"] == "prompts")["answer"]
    assert spoken.stdout == measured_answer + "\n"


def test_a_conversation_remembers_until_cleared(
    conversed: subprocess.CompletedProcess[str],
) -> None:
    assert conversed.returncode == 0, conversed.stderr[-2000:]
    first, second, after_clear = conversed.stdout.removesuffix("\n").split("\n")
    assert first == after_clear
    assert second != first


def test_full_tuning_answers_with_the_output_itself(
    measured: dict[str, Any], folder: Path, base_model: Path
) -> None:
    output = str(folder / "output")
    full, lora = measured["full"], measured["lora"]
    assert (full["model_name_or_path"], full.get("adapter_name_or_path")) == (output, None)
    assert (lora["model_name_or_path"], lora["adapter_name_or_path"]) == (str(base_model), output)
    assert full["trust_remote_code"] is False


def test_a_right_merge_is_proven(proven: dict[str, Any]) -> None:
    assert proven["summary"]["passed"] is True
    assert proven["proof"]["passed"] is True
    assert {check["name"]: check["passed"] for check in proven["proof"]["checks"]} == dict.fromkeys(
        [
            "files",
            "structure",
            "untouched",
            "recomputed",
            "effect",
            "tokenizer",
            "parity",
            "logits_unrounded",
            "logits",
            "answers",
        ],
        True,
    )
    assert len(proven["proof"]["files"]["model.safetensors"]["sha256"]) == 64
    assert proven["right"] == []


@pytest.mark.parametrize(
    ("fault", "checks", "detail"),
    [
        ("one element outside the targets", ["untouched"], "layers.7.input_layernorm"),
        ("one element of a target by two percent", ["recomputed"], "layers.7.self_attn.q_proj"),
        ("one module unmerged", ["recomputed"], "layers.7.self_attn.q_proj"),
        ("scaled to zero in the merge", ["recomputed", "effect"], "60 tensors"),
        ("an adapter of zeros", ["effect"], "the adapter does nothing"),
        ("another base", ["untouched", "recomputed"], "layers.7.input_layernorm"),
    ],
)
def test_planted_faults_are_found_in_the_weights(
    proven: dict[str, Any], fault: str, checks: list[str], detail: str
) -> None:
    assert proven[fault][:-1] == checks
    assert detail in proven[fault][-1]


def test_what_cannot_be_recomputed_is_skipped_and_must_still_have_changed(
    proven: dict[str, Any],
) -> None:
    right = {"structure": True, "untouched": True, "recomputed": None, "effect": True}
    assert proven["beyond"] == right
    assert proven["beyond and unmerged"] == right | {"effect": False}


def test_an_export_without_the_adapter_is_no_merge(proven: dict[str, Any]) -> None:
    assert "equals the base model in all 60 target tensors" in proven["merge of nothing"]


def test_damaged_files_of_the_merged_model_are_found(proven: dict[str, Any]) -> None:
    passed, detail = proven["truncated"]
    assert passed is False
    assert "model.safetensors" in detail
    assert proven["tokenizer"] == [True, False]


def test_right_weights_in_another_model_are_refused(proven: dict[str, Any]) -> None:
    code, message = proven["refused"]
    assert code == 1
    assert "merged model refused: files: config.json: " in message
    checks = proven["refused_proof"]["checks"]
    # The hash says that something was changed, the logits what it does.
    assert "logits_unrounded" in {c["name"] for c in checks if c["passed"] is False}
    assert proven["refused_proof"]["passed"] is False
    assert proven["folders"] == ["merged.refused"]
    assert "no merged model" in proven["gone"]
