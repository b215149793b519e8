"""Export a proven merged model: `python -m tunesmith.job.export.export --run RUN --format F`.

gguf        RUN/export/NAME.gguf, optionally quantised, read back and compared with the model
ollama      a Modelfile for `ollama create`, with a GGUF if Ollama needs one
vllm-check  whether vLLM would serve it with the training prompt; --server asks a running one

Checks that are not possible here are reported. The exit code is 0 if all performed checks pass.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tunesmith.core import formats
from tunesmith.core.documents import Config, JsonObject
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import locked, read_json, write_json, write_text
from tunesmith.job.export import gguf_writer
from tunesmith.job.inference import engine
from tunesmith.job.inference.engine import Codec
from tunesmith.job.merge import manifest
from tunesmith.job.merge.phase import check_room, parameter_count
from tunesmith.job.prompts import parity, templates
from tunesmith.job.proof.behaviour import UNROUNDED, distance, logits, plain_model
from tunesmith.job.run import config as run_config
from tunesmith.job.run import integrity, seals
from tunesmith.job.run.folder import MERGED
from tunesmith.job.run.remedies import part

FORMATS = ("gguf", "ollama", "vllm-check")
# The architectures that Ollama's import of safetensors supports (ollama, convert/convert.go).
_OLLAMA = (
    *("LlamaForCausalLM", "MixtralForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM"),
    *("Gemma3ForCausalLM", "Phi3ForCausalLM", "Qwen2ForCausalLM", "CohereForCausalLM"),
)
_CONVERTER = "convert_hf_to_gguf.py"  # llama.cpp's, for models that we cannot write
_QUANTIZER = "llama-quantize"
_FOLDER = "export"
_BROKEN = 1.0  # nat: mean divergence beyond which a quantised model is broken
_SECONDS = 30  # timeout of a server's answer


@dataclass(frozen=True)
class GgufExport:
    """A GGUF that was written and read back."""

    quantisation: str
    written_by: str  # gguf, or a program of llama.cpp
    figures: gguf_writer.Figures | None  # None: not written by us
    logits: Mapping[str, float] | None  # distance from the merged model's; None: not compared
    file: str  # path below the run's folder
    bytes: int
    sha256: str
    seconds: float


@dataclass(frozen=True)
class OllamaExport:
    """A Modelfile beside the merged model."""

    file: str  # path below the run's folder
    faults: list[str]


@dataclass(frozen=True)
class VllmCheck:
    """The result of the checks for vLLM."""

    lines: list[str]


Export = GgufExport | OllamaExport | VllmCheck


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = _parser().parse_args(argv)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "warning")
    try:
        # LLaMA-Factory logs to the sys.stdout of its first import.
        with contextlib.redirect_stdout(sys.stderr):
            lines = run(options.run, options.format, options.quantise, options.server)
    except TunesmithError as error:
        print(error.render(), file=sys.stderr)
        return error.exit_code
    print("\n".join(lines))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m tunesmith.job.export.export")
    parser.add_argument("--run", type=Path, required=True, help="run folder")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--quantise", default="", help="q8_0, q4_0, ... (default: not quantised)")
    parser.add_argument("--server", default="", help="address of a running vLLM, for vllm-check")
    return parser


def run(run_dir: Path, kind: str, quantise: str = "", server: str = "") -> list[str]:
    """Export RUN/merged; return the lines to print. The result is added to RUN/export.json.

    Raises UsageError if there is no proven merged model or the format does not support it,
    TunesmithError if the written files differ from the model.
    """
    merged = run_dir / MERGED
    proof = read_json(run_dir / "proof.json") if (run_dir / "proof.json").is_file() else {}
    if not merged.is_dir() or not proof.get("passed"):
        raise UsageError(
            f"{merged}: no proven merged model", hint=f"`inv merge --run {run_dir.name}` creates it"
        )
    # A sealed model is compared with its seals below, and read only once.
    older = not any(part(name) == MERGED for name in seals.read(run_dir))
    changed = manifest.faults(merged, manifest.listing(merged)) if older else []
    if changed:
        raise UsageError(
            f"{merged}: not the model that was proven ({changed[0]})",
            hint=f"`inv merge --run {run_dir.name}` merges again",
        )
    if server and kind != "vllm-check":
        raise UsageError("--server is for --format vllm-check")
    if quantise and kind == "vllm-check":
        raise UsageError("--quantise is for gguf and ollama: vLLM serves the merged folder")
    config = run_config.read_config(run_dir)
    integrity.check_here(run_dir, integrity.EXPORT)
    codec = engine.codec(engine.arguments(config))
    facts: Export
    if kind == "gguf":
        facts, lines = _gguf(run_dir, merged, codec, config, quantise)
    elif kind == "ollama":
        facts, lines = _ollama(run_dir, merged, codec, config, quantise)
    else:
        facts, lines = _vllm(config, codec, merged, server)
    record_file = run_dir / "export.json"
    name = f"{kind} {facts.quantisation}" if isinstance(facts, GgufExport) else kind
    with locked(record_file), seals.rewriting(run_dir, "export", record_file.name):
        record = read_json(record_file) if record_file.is_file() else {}
        write_json(record_file, {**record, name: asdict(facts)})
    wrong = [line for line in lines if line.startswith("failed")]
    if wrong:
        raise TunesmithError(f"{kind}: {wrong[0]}", lines)
    return lines


def _gguf(
    run_dir: Path, merged: Path, codec: Codec, config: Config, quantise: str
) -> tuple[GgufExport, list[str]]:
    """Write, read back, compare logits."""
    chosen = quantise.lower() or gguf_writer.default_quantisation(merged)
    out = run_dir / _FOLDER / f"{run_dir.name}-{chosen}.gguf"
    began = time.monotonic()
    size = 4 * parameter_count(merged)
    out.parent.mkdir(parents=True, exist_ok=True)
    check_room(out.parent, disk=size, memory=size // 4 + 1_000_000_000)
    written = (f"{_FOLDER}/{out.name}", f"{_FOLDER}/{templates.MODELFILE}")
    seals.forget(run_dir, written)
    by = _write(merged, out, chosen)
    figures = gguf_writer.check(merged, out) if by == "gguf" else None
    reason = gguf_writer.why_not(merged)
    if reason:
        apart = None
        checked = f"logits not compared: transformers cannot read a GGUF of {reason}"
    else:
        apart = _compare_logits(merged, out, codec, chosen)
        checked = "logits against the merged model: " + ", ".join(
            f"{key} {value:.2g}" for key, value in apart.items()
        )
    source = f"./{out.name}"
    probes = parity.probes_of(config, codec)[0]
    thought = parity.trained_thought(codec, probes) if probes else ""
    write_text(
        out.parent / templates.MODELFILE, templates.modelfile(codec, merged, thought, source)
    )
    sealed = seals.seal(run_dir, _FOLDER, written)[written[0]]
    facts = GgufExport(
        quantisation=chosen,
        written_by=by,
        figures=figures,
        logits=apart,
        file=written[0],
        bytes=sealed["size"],
        sha256=sealed["sha256"],
        seconds=round(time.monotonic() - began, 1),
    )
    return facts, [
        f"gguf:   {out} ({formats.size(facts.bytes)}, {chosen}, by {by})",
        f"check:  {checked}",
        f"ollama: cd {out.parent} && ollama create {run_dir.name} -f Modelfile",
        f"sha256: {facts.sha256}",
    ]


def _write(merged: Path, out: Path, chosen: str) -> str:
    """Write the GGUF with a program that can; return its name. Raises UsageError if none can."""
    reason = gguf_writer.why_not(merged)
    if not reason and chosen in gguf_writer.QUANTISATIONS:
        gguf_writer.write(merged, out, chosen)
        return "gguf"
    if not reason:
        quantizer = shutil.which(_QUANTIZER)
        if quantizer is None:
            raise UsageError(
                f"--quantise {chosen}: needs {_QUANTIZER} of llama.cpp on PATH",
                hint=f"without it: {', '.join(gguf_writer.QUANTISATIONS)}",
            )
        unquantised = out.with_name(f".{out.name}.whole")
        try:
            gguf_writer.write(merged, unquantised, gguf_writer.default_quantisation(merged))
            _call([quantizer, str(unquantised), str(out), chosen.upper()])
        finally:
            unquantised.unlink(missing_ok=True)
        return _QUANTIZER
    converter = shutil.which(_CONVERTER)
    if converter is None:
        raise UsageError(
            f"{reason}: not written as GGUF by tunesmith",
            hint=f"put {_CONVERTER} of llama.cpp, executable and with its requirements, on PATH",
        )
    if chosen not in ("f32", "f16", "bf16", "q8_0"):
        raise UsageError(f"--quantise {chosen}: {_CONVERTER} writes f32, f16, bf16 and q8_0")
    _call([converter, str(merged), "--outfile", str(out), "--outtype", chosen])
    return _CONVERTER


def _call(command: list[str]) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        lines = (ended.stderr or ended.stdout).strip().splitlines()[-8:]
        raise TunesmithError(f"{Path(command[0]).name} ended with {ended.returncode}", lines)


def _compare_logits(merged: Path, file: Path, codec: Codec, chosen: str) -> dict[str, float]:
    """Return the distance of the GGUF's logits from the merged model's, both in float32.

    transformers reads the GGUF with its own code, which verifies names, order and vocabulary
    independently. Raises TunesmithError for differences beyond float32 arithmetic, or beyond
    _BROKEN nat if the GGUF is quantised.
    """
    import torch
    from transformers import AutoModelForCausalLM

    check_room(file.parent, disk=0, memory=5 * parameter_count(merged) + 1_000_000_000)
    sequences = [parity.trained(codec, probe)[0] for probe in parity.fixed_probes(codec)]
    model = plain_model(merged, "cpu", remote=False)
    right = logits(model, sequences)
    del model
    model = AutoModelForCausalLM.from_pretrained(
        str(file.parent),
        gguf_file=file.name,
        torch_dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
    )
    apart = distance(right, logits(model.eval(), sequences))
    exact = chosen == gguf_writer.default_quantisation(merged) or chosen == "f32"
    limits = vars(UNROUNDED) if exact else {"kl": _BROKEN}
    beyond = [key for key, limit in limits.items() if not vars(apart)[key] <= limit]
    if beyond:
        raise TunesmithError(
            f"{file}: its logits are not the merged model's: {beyond[0]} "
            f"{vars(apart)[beyond[0]]:.3g}, at most {limits[beyond[0]]:.3g}"
        )
    return apart.record()


def _ollama(
    run_dir: Path, merged: Path, codec: Codec, config: Config, quantise: str
) -> tuple[Export, list[str]]:
    """Return the Modelfile to use: the merged folder's own, or one with a GGUF."""
    architecture = read_json(merged / "config.json")["architectures"][0]
    digest = gguf_writer.split_digest(merged)
    why = "it does not quantise imports" if quantise else ""
    if architecture not in _OLLAMA:
        why = f"it does not import {architecture}"
    elif digest not in gguf_writer.PRE_TOKENIZERS:
        # It would use its default and split numbers differently than in training.
        why = "its import does not support how this tokenizer splits text"
    if why:
        facts, lines = _gguf(run_dir, merged, codec, config, quantise)
        return facts, [f"Ollama gets a GGUF: {why}", *lines]
    verdict = parity.check(config, codec, merged)
    faults = [fault for fault in verdict.faults() if "modelfile" in fault.lower()]
    return OllamaExport(f"{MERGED}/{templates.MODELFILE}", faults), [
        *(f"failed: {fault}" for fault in faults),
        f"Modelfile: {merged / templates.MODELFILE} (renders the trained prompt, FROM the folder)",
        f"ollama:    cd {merged} && ollama create {run_dir.name} -f Modelfile",
    ]


def _vllm(config: Config, codec: Codec, merged: Path, server: str) -> tuple[VllmCheck, list[str]]:
    """Check whether vLLM would use the training prompt."""
    verdict = parity.check(config, codec, merged)
    relevant = [
        fault
        for fault in verdict.faults()
        if fault.startswith(("chat_template", "generation_config", "tokenizer_config"))
    ]
    passed = (
        [f"not checked: {note}" for note in verdict.notes]
        if not verdict.probes
        else [
            f"passed: the chat template gives the trained ids on {verdict.probes} prompts",
            f"passed: answers end with {verdict.stop!r}",
        ]
    )
    lines = [f"failed: {fault}" for fault in relevant] or passed
    architecture = read_json(merged / "config.json")["architectures"][0]
    if importlib.util.find_spec("vllm") is None:
        lines.append(f"not checked: whether vLLM serves {architecture}: vLLM is not installed here")
    else:
        registry = importlib.import_module("vllm").ModelRegistry
        supported = architecture in registry.get_supported_archs()
        lines.append(f"{'passed' if supported else 'failed'}: vLLM supports {architecture}")
    if server:
        lines += _ask_server(config, codec, server.rstrip("/"))
    else:
        lines.append("not checked: a running server; --server http://HOST:PORT compares its ids")
    lines.append(f"serve:  vllm serve {merged} --generation-config {merged}")
    return VllmCheck(lines[:-1]), lines


def _ask_server(config: Config, codec: Codec, server: str) -> list[str]:
    """Compare the ids of a running vLLM (POST /tokenize) with the trained ones."""
    model = _fetch(f"{server}/v1/models", None)["data"][0]["id"]
    probes, _, _ = parity.probes_of(config, codec)
    lines = []
    for probe in probes:
        body = {"model": model, "messages": parity.spoken(probe), "add_generation_prompt": True}
        ids = _fetch(f"{server}/tokenize", body)["tokens"]
        expected = parity.reference(codec, probe)
        if ids != expected:
            lines.append(f"failed: {parity.differing(codec, 'server', probe, expected, ids)}")
    return lines or [f"passed: {server} ({model}) gives the trained ids on {len(probes)} prompts"]


def _fetch(url: str, body: Mapping[str, object] | None) -> JsonObject:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"--server {url}: expected an address that begins with http://")
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:  # noqa: S310
            value: JsonObject = json.load(answer)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise TunesmithError(f"{url}: no vLLM server answered ({error})") from None
    return value


if __name__ == "__main__":
    sys.exit(main())
