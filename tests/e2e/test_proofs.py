"""Six planted faults, on the demo model and on a stand-in of DeepSeek-R1-Distill-Qwen's shape.

Each is planted as a wrong merge would leave it, with a manifest that agrees: what finds it is the
proof, not the hashes (they are tried apart). Adapters have random weights: what is proven here
does not depend on how one came about. One process a model, because each starts for seconds.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.e2e

STANDINS = Path(__file__).resolve().parent.parent / "standins"
FAULTS = {
    # fault -> the checks one of which must fail
    "scaled by zero": {"recomputed"},
    "one module missed": {"recomputed"},
    "another base": {"untouched", "recomputed"},
    "chat template altered": {"parity"},
    "eos changed": {"parity"},
    "one bit of a target": {"recomputed"},
    "one bit of a norm": {"untouched"},
}

SCRIPT = """
import contextlib, http.server, io, json, os, shutil, sys, threading
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from tunesmith.core.errors import TunesmithError, UsageError
from dataclasses import replace
from tunesmith.job.run import config as run_config
from tunesmith.job.run.folder import RunFolder
from tunesmith.job.evaluation import chat, phase as evaluation_phase
from tunesmith.job.export import export, gguf_writer
from tunesmith.job.inference import engine
from tunesmith.job.merge import manifest, phase as merge_phase
from tunesmith.job.prompts import parity
from tunesmith.job.proof import phase as proof_phase
from tunesmith.job.merge.adapter import check_fits
from tunesmith.job.proof.weights import file_check, weight_checks

run, kind = Path(sys.argv[1]), sys.argv[2]
request = RunFolder(run).request()
config = run_config.read_config(run)
base, merged = Path(config["model_name_or_path"]), run / "merged"
found, events = {}, []
def emit(event, **values):
    events.append({"event": event, **values})
if kind == "tiny":
    import tiny_r1
    tiny_r1.build(base)

torch.manual_seed(3)
plain = AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float32)
adapted = get_peft_model(plain, LoraConfig(
    task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
with torch.no_grad():
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.normal_(std=0.02)
adapted.save_pretrained(config["output_dir"])
del plain, adapted

if kind == "tiny":
    # A thinking mode that 0.9.3 asks otherwise than it trains: the gate must hold the merge.
    thinking = config | {"dataset": "thoughts", "enable_thinking": None}
    (run / "config.yaml").write_text(yaml.safe_dump(thinking))
    try:
        merge_phase.run(run, request, emit)
    except TunesmithError as error:
        found["gate"] = [error.message, merged.exists(), (run / "parity.json").is_file()]
    accepted = replace(request, merge={**request.merge, "accept_mismatch": True})
    found["accepted merge"] = merge_phase.run(run, accepted, emit)["parity"]
    found["accepted proof"] = proof_phase.run(run, accepted, emit)["skipped"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    events.clear()
    # Templates of every kind: BOS in the prefix, in each question, nowhere; system text in the
    # first question; a default system text; other reasoning templates.
    found["templates"] = {}
    for name in ("atom", "gemma", "llama2", "llama3", "mistral", "qwen", "qwen3", "vicuna"):
        varied = {k: v for k, v in config.items() if k != "enable_thinking"} | {"template": name}
        its = engine.codec(engine.base_arguments(varied))
        part = run / f"part {name}"
        part.mkdir()
        for file in ("config.json", "generation_config.json"):
            shutil.copy(base / file, part / file)
        its.tokenizer.save_pretrained(part)
        (part / "Modelfile").write_text(its.template.get_ollama_modelfile(its.tokenizer))
        aligned = parity.align(varied, its, part)
        found["templates"][name] = parity.faults_of(aligned)

found["merge"] = merge_phase.run(run, request, emit)
found["parity"] = json.loads((run / "parity.json").read_text())
found["corrected"] = [e["what"] for e in events if e["event"] == "changed"]
found["summary"] = proof_phase.run(run, request, emit)
found["proof"] = json.loads((run / "proof.json").read_text())
found["manifest"] = json.loads((merged / "MANIFEST.json").read_text())
facts = check_fits(base, Path(config["output_dir"]))
codec = engine.codec(engine.arguments(config))

# Plain transformers and `inv chat`: the same greedy answers.
asked = ["Who are you?", "你好，你是谁？"]
tokenizer = AutoTokenizer.from_pretrained(merged)
model = AutoModelForCausalLM.from_pretrained(merged).eval()
found["transformers"] = []
for text in asked:
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(ids, do_sample=False, max_new_tokens=12,
                            attention_mask=torch.ones_like(ids))[0, ids.shape[1]:]
    found["transformers"].append(tokenizer.decode(answer, skip_special_tokens=True))
del model
found["chat"] = []
for text in asked:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = chat.main(["--run", str(run), "--what", "merged", "--greedy", "--prompt", text,
                          "--max-new-tokens", "12"])
    found["chat"].append(said.getvalue().removesuffix("\\n") if code == 0 else code)

# Exports of the proven model.
def exported(tag, *words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = export.main(["--run", str(run), *words])
    found[tag] = [code, out.getvalue(), err.getvalue()[-2000:]]
exported("ollama", "--format", "ollama")
if "gguf:" in found["ollama"][1]:
    found["gguf"] = found["ollama"]  # it made one: once is enough
else:
    exported("gguf", "--format", "gguf")
exported("q8_0", "--format", "gguf", "--quantise", "q8_0")
exported("q4_k_m", "--format", "gguf", "--quantise", "q4_k_m")
exported("vllm", "--format", "vllm-check")

# Stands in for a vLLM server: its /v1/models and /tokenize, ids from the folder it was given.
class StandIn(http.server.BaseHTTPRequestHandler):
    before = []
    def answer(self, value):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())
    def do_GET(self):
        self.answer({"data": [{"id": "merged"}]})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        ids = tokenizer.apply_chat_template(
            body["messages"], add_generation_prompt=body["add_generation_prompt"])
        self.answer({"tokens": self.before + ids})
    def log_message(self, *_):
        pass
server = http.server.HTTPServer(("127.0.0.1", 0), StandIn)
threading.Thread(target=server.serve_forever, daemon=True).start()
address = f"http://127.0.0.1:{server.server_port}"
exported("right server", "--format", "vllm-check", "--server", address)
StandIn.before = [1]
exported("wrong server", "--format", "vllm-check", "--server", address)
server.shutdown()
server.server_close()
exported("no server", "--format", "vllm-check", "--server", address)
found["exports"] = json.loads((run / "export.json").read_text())
right = next((run / "export").glob("*.gguf"))
whole = right.read_bytes()
damaged = bytearray(whole)
damaged[-3] ^= 1
right.write_bytes(damaged)
try:
    gguf_writer.check(merged, right)
    found["damaged gguf"] = "passed"
except TunesmithError as error:
    found["damaged gguf"] = error.message

# Six faults. Each file is put back afterwards.
weights = merged / "model.safetensors"
kept = {path: path.read_bytes() for path in merged.iterdir()}
old, new = load_file(base / "model.safetensors"), load_file(weights)
names = sorted(facts.targets.values())
target, norm = names[0], next(n for n in sorted(new) if n.endswith("input_layernorm.weight"))
head = kept[weights]
length = int.from_bytes(head[:8], "little")
header = json.loads(head[8 : 8 + length])

def flip(name):
    data = bytearray(head)
    data[8 + length + header[name]["data_offsets"][0]] ^= 1  # the lowest bit of the first element
    weights.write_bytes(data)

def plant(fault, model=base):
    if model == base:
        origin = {key: found["manifest"][key] for key in manifest.Origin.__dataclass_fields__}
        manifest.write(merged, manifest.Origin(**origin))
    if kind == "tiny" and model == base:
        try:
            proof_phase.run(run, request, emit)
            failed = []
        except TunesmithError as error:
            refused = json.loads((run / "proof.json").read_text())
            failed = [c["name"] for c in refused["checks"] if c["passed"] is False]
            failed += [error.message]
            (run / "merged.refused").rename(merged)
    else:
        checks = [file_check(merged)[0], *weight_checks(model, merged, facts, "bfloat16")]
        checks.append(proof_phase.parity_check(run, config, codec, merged))
        failed = [c.name for c in checks if c.passed is False]
        failed += [c.detail for c in checks if c.passed is False][:1]
    found[fault] = failed
    for path, content in kept.items():
        path.write_bytes(content)

plant("nothing")
save_file({n: old[n].to(t.dtype) if n in names else t for n, t in new.items()}, weights,
          metadata={"format": "pt"})
plant("scaled by zero")
save_file({n: old[n].to(t.dtype) if n == target else t for n, t in new.items()}, weights,
          metadata={"format": "pt"})
plant("one module missed")
other = run / "other base"
shutil.copytree(base, other)
save_file({n: t * 1.01 if n in (norm, target) else t for n, t in old.items()},
          other / "model.safetensors", metadata={"format": "pt"})
plant("another base", model=other)
template = merged / "chat_template.jinja"
template.write_text(template.read_text().replace("content", "content + ' '", 3))
plant("chat template altered")
file = merged / "generation_config.json"
values = json.loads(file.read_text())
file.write_text(json.dumps(values | {"eos_token_id": 3}))
plant("eos changed")
flip(target)
plant("one bit of a target")
flip(norm)
plant("one bit of a norm")
flip(norm)
found["by hash"] = [file_check(merged)[0].passed, file_check(merged)[0].detail]
weights.write_bytes(head)
(merged / "tokenizer_config.json").write_text(
    (merged / "tokenizer_config.json").read_text().replace(
        json.dumps(codec.tokenizer.eos_token, ensure_ascii=False),
        json.dumps(codec.tokenizer.convert_ids_to_tokens(5), ensure_ascii=False)))
(run / "proof.json").write_text(json.dumps(found["proof"]))
verdict = parity.check(config, codec, merged)
found["eos of the tokenizer"] = verdict.faults()
try:
    export.run(run, "gguf")
except UsageError as error:
    found["export of another"] = error.message

if kind == "tiny":
    # A base in float32: its weights are rounded when it is loaded, and once more when merged.
    wide, again = run / "wide", run / "again"
    shutil.copytree(base, wide)
    exact = {n: t.float() * (1 + 2 ** -10) for n, t in old.items()}
    save_file(exact, wide / "model.safetensors", metadata={"format": "pt"})
    again.mkdir()
    (again / "config.yaml").write_text(
        yaml.safe_dump(config | {"model_name_or_path": str(wide)}))
    merge_phase.run(again, request, emit)
    found["wide base"] = proof_phase.run(again, request, emit)["passed"]
(run / "found.json").write_text(json.dumps(found, ensure_ascii=False))
"""


def prepare(top: Path, base: Path, template: str, **extra: Any) -> Path:
    """Write a run folder as a finished training leaves it, and its data."""
    rows = [
        {"instruction": f"Question {n}?", "input": "", "output": f"答案 {n}。"} for n in range(9)
    ]
    thoughts = [row | {"output": f"<think>\nhm\n</think>\n\n{row['output']}"} for row in rows]
    columns = {"prompt": "instruction", "query": "input", "response": "output"}
    info = {}
    for name, data in (("rows", rows), ("thoughts", thoughts)):
        (top / f"{name}.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
        info[name] = {"file_name": f"{name}.json", "columns": columns}
    (top / "dataset_info.json").write_text(json.dumps(info))
    run = top / "run"
    run.mkdir()
    config = {
        "model_name_or_path": str(base),
        "stage": "sft",
        "finetuning_type": "lora",
        "dataset": "rows",
        "dataset_dir": str(top),
        "template": template,
        "output_dir": str(run / "output"),
        **extra,
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    prompts = [{"prompt": "Who are you?", "expect": None, "reference": None, "system": None}]
    request = {"prompts": prompts, "evaluate": {"max_new_tokens": 8}, "merge": {}}
    (run / "run.json").write_text(json.dumps(request), encoding="utf-8")
    return run


def proven(python: Path, run: Path, kind: str) -> dict[str, Any]:
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "LLAMAFACTORY_VERBOSITY": "WARN",
    }
    argv = [str(python), "-c", SCRIPT, str(run), kind, str(STANDINS)]
    ended = subprocess.run(
        argv, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-4000:]
    found: dict[str, Any] = json.loads((run / "found.json").read_text(encoding="utf-8"))
    shutil.rmtree(run)  # over a gigabyte, and pytest keeps the folders of three sessions
    return found


@pytest.fixture(scope="module")
def demo(
    training_python: Path, base_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    run = prepare(tmp_path_factory.mktemp("demo"), base_model, "smollm")
    return proven(training_python, run, "demo")


@pytest.fixture(scope="module")
def tiny(training_python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    top = tmp_path_factory.mktemp("tiny")
    run = prepare(top, top / "R1 shape", "deepseekr1", enable_thinking=False)
    return proven(training_python, run, "tiny")


@pytest.fixture(params=["demo", "tiny"])
def found(request: pytest.FixtureRequest) -> dict[str, Any]:
    value: dict[str, Any] = request.getfixturevalue(request.param)
    return value


def test_a_base_of_a_wider_dtype_is_proven(tiny: dict[str, Any]) -> None:
    assert tiny["wide base"] is True


def test_a_right_merge_passes_every_check(found: dict[str, Any]) -> None:
    assert found["summary"]["passed"] is True
    checks = {check["name"]: check["passed"] for check in found["proof"]["checks"]}
    assert len(checks) == 10
    assert set(checks.values()) == {True}
    assert found["nothing"] == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(found: dict[str, Any], fault: str) -> None:
    assert FAULTS[fault] & set(found[fault]), found[fault]
    assert "files" not in found[fault]


def test_any_bit_is_found_by_the_hashes(found: dict[str, Any]) -> None:
    passed, detail = found["by hash"]
    assert passed is False
    assert detail.startswith("model.safetensors: sha256")


def test_another_eos_of_the_tokenizer_is_found(found: dict[str, Any]) -> None:
    assert any(
        fault.startswith("tokenizer_config.json: eos_token")
        for fault in (found["eos of the tokenizer"])
    )


def test_plain_transformers_answers_as_chat_does(found: dict[str, Any]) -> None:
    # The token limit may cut inside a character; chat leaves its first bytes out.
    assert [text.rstrip("\ufffd") for text in found["transformers"]] == found["chat"]
    assert all(found["chat"])


def test_the_manifest_names_every_file_and_what_it_was_made_of(found: dict[str, Any]) -> None:
    manifest = found["manifest"]
    assert manifest["files"] == found["proof"]["files"]
    assert {"model.safetensors", "config.json", "Modelfile"} <= set(manifest["files"])
    assert manifest["lora"] == {"rank": 4, "alpha": 8.0, "scale": 2.0}
    assert len(manifest["adapters"][0]["sha256"]) == 64
    assert set(manifest["proof"].values()) == {True}


def test_exports_that_would_ask_otherwise_are_corrected(
    demo: dict[str, Any], tiny: dict[str, Any]
) -> None:
    # SmolLM2's own template adds a system text nobody trained with.
    assert demo["corrected"] == ["chat_template.jinja"]
    assert "named SmolLM" in demo["parity"]["before"][0]
    # DeepSeek's own opens a thought, LLaMA-Factory's Modelfile gives a second BOS and no thought.
    assert tiny["corrected"] == ["chat_template.jinja", "Modelfile"]
    assert tiny["parity"]["prompt"].endswith("<｜Assistant｜><think>\n\n</think>\n\n")
    assert tiny["parity"]["passed"] is True
    modelfile = next(c for c in tiny["parity"]["corrected"] if c["file"] == "Modelfile")
    assert "<｜begin▁of▁sentence｜>" in modelfile["was"]
    assert "<｜begin▁of▁sentence｜>" not in modelfile["now"]


def test_templates_of_every_kind_can_be_corrected(tiny: dict[str, Any]) -> None:
    assert len(tiny["templates"]) == 8
    assert {name: faults for name, faults in tiny["templates"].items() if faults} == {}


def test_a_prompt_that_cannot_be_corrected_stops_the_merge(tiny: dict[str, Any]) -> None:
    message, merged, recorded = tiny["gate"]
    assert "chat differs from training" in message
    assert "enable_thinking: null" in message
    assert "--accept-mismatch" in message
    assert (merged, recorded) == (False, True)


def test_a_mismatch_can_be_accepted_and_is_never_called_passed(tiny: dict[str, Any]) -> None:
    assert tiny["accepted merge"] is False
    assert tiny["accepted proof"] == ["parity"]


def test_a_gguf_holds_the_merged_model(found: dict[str, Any]) -> None:
    code, said, error = found["gguf"]
    assert code == 0, error
    assert "bf16, by gguf" in said
    exports = found["exports"]
    exact, coarse = exports.get("gguf bf16") or exports["ollama bf16"], exports["gguf q8_0"]
    assert exact["figures"]["max_difference"] == 0.0
    assert exact["logits"]["max"] < 0.02
    assert found["q8_0"][0] == 0, found["q8_0"][2]
    assert 0 < coarse["logits"]["kl"] < 0.05
    assert coarse["bytes"] < 0.7 * exact["bytes"]
    assert "is off by" in found["damaged gguf"]


def test_what_cannot_be_exported_is_said(found: dict[str, Any]) -> None:
    code, _, error = found["q4_k_m"]
    assert code == 2
    assert "needs llama-quantize" in error
    # Its seal is compared first, where there is one; then what was proven.
    other = found["export of another"]
    assert "not the model that was proven" in other or "changed since it was made" in other


def test_ollama_gets_what_it_can_read(demo: dict[str, Any], tiny: dict[str, Any]) -> None:
    code, said, error = tiny["ollama"]
    assert code == 0, error
    assert "FROM the folder" in said
    # Ollama would split SmolLM2's numbers in threes.
    code, said, error = demo["ollama"]
    assert code == 0, error
    assert "does not know how this tokenizer splits text" in said


def test_vllm_check_says_what_it_did_not_ask(found: dict[str, Any]) -> None:
    code, said, error = found["vllm"]
    assert code == 0, error
    assert "passed: the chat template gives the trained ids" in said
    assert "not checked: whether vLLM serves" in said
    assert "not checked: a running server" in said


def test_a_running_server_is_asked_for_its_ids(found: dict[str, Any]) -> None:
    code, said, error = found["right server"]
    assert code == 0, error
    assert "gives the trained ids on 5 prompts" in said
    code, _, error = found["wrong server"]
    assert code == 1
    assert "server differs from training in 'one question'" in error
    code, _, error = found["no server"]
    assert code == 1
    assert "no vLLM server answered" in error
