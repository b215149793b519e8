"""Chat with a run's model in the terminal: `python -m tunesmith.job.evaluation.chat --run RUN`.

Template and thinking mode are those of the training. Answers are streamed to stdout; everything
else, including LLaMA-Factory's log, goes to stderr, so that with --prompt stdout contains only the
answer.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tunesmith.core.documents import Arguments, Config, Message
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import read_json
from tunesmith.core.printable import printable
from tunesmith.job.inference import engine
from tunesmith.job.inference.engine import LoadedModel, Question, Sampling
from tunesmith.job.run import config as run_config
from tunesmith.job.run import integrity
from tunesmith.job.run.folder import MERGED

_SAMPLING_KEYS = ("temperature", "top_p", "top_k", "repetition_penalty")
_HELP = "/clear starts a new conversation, /exit or Ctrl-D quits, Ctrl-C stops an answer"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = _parser().parse_args(argv)
    try:
        loaded, sampling = _prepare(options)
        if options.prompt is not None:
            question = Question.of(options.prompt, options.system)
            engine.stream(loaded, question, sampling, _write)
            _write("\n")
        else:
            _converse(loaded, sampling, options.system)
    except TunesmithError as error:
        print(error.render(), file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m tunesmith.job.evaluation.chat", description=_HELP)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="run folder")
    source.add_argument("--model", type=Path, help="model folder, with --template")
    parser.add_argument("--what", choices=("base", "adapter", "merged"), default="adapter")
    parser.add_argument("--template", help="LLaMA-Factory template of --model")
    thinking = parser.add_mutually_exclusive_group()
    thinking.add_argument("--thinking", dest="thinking", action="store_true", default=None)
    thinking.add_argument("--no-thinking", dest="thinking", action="store_false")
    parser.add_argument("--prompt", help="answer this prompt and exit")
    parser.add_argument("--system", help="system message")
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    parser.add_argument("--greedy", action="store_true", help="greedy decoding")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--seed", type=int, default=42)
    return parser


def model_arguments(options: argparse.Namespace) -> Arguments:
    """Return LLaMA-Factory's inference arguments for the model selected by the options.

    Raises UsageError if it does not exist.

    A run's thinking mode is the recorded one: --thinking would give the model a prompt it was not
    trained on, so it is only for --model.
    """
    if options.model is not None:
        if not (options.model / "config.json").is_file():
            raise UsageError(f"{options.model}: not a model folder (no config.json)")
        if not options.template:
            raise UsageError("--model needs --template, LLaMA-Factory's name of its template")
        thinking = {} if options.thinking is None else {"enable_thinking": options.thinking}
        config = {"model_name_or_path": str(options.model), "template": options.template}
        return engine.arguments(config | thinking)
    if options.template or options.thinking is not None:
        raise UsageError("--template and --thinking are only for --model: a run records its own")
    config = run_config.read_config(options.run)
    if options.what == "base":
        return engine.base_arguments(config)
    if options.what == "merged":
        merged = options.run / MERGED
        if not merged.is_dir():
            raise UsageError(
                f"{merged}: no merged model",
                hint=f"`inv merge --run {options.run.name}` creates it",
            )
        return engine.arguments(config, model=merged)
    output = Path(config["output_dir"])
    if not any(output.glob("*.safetensors")):
        raise UsageError(
            f"{output}: no trained weights yet", hint="`inv runs` shows how far the run is"
        )
    return engine.tuned_arguments(config, output)


def choose_sampling(options: argparse.Namespace, args: Config) -> Sampling:
    """Return the sampling options: flags, then run config, then generation_config.json.

    DeepSeek-R1 ships temperature 0.6 and top_p 0.95 there; a model without one uses LLaMA-Factory's
    defaults, 0.95 and 0.7 (hparams/generating_args.py).
    """
    if options.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens {options.max_new_tokens}: expected at least 1")
    plain = Sampling(max_new_tokens=options.max_new_tokens, seed=options.seed)
    if options.greedy:
        if options.temperature is not None or options.top_p is not None:
            raise UsageError(
                "--greedy always takes the most likely token: drop --temperature and --top-p"
            )
        return plain
    values: Arguments = {"temperature": 0.95, "top_p": 0.7}
    shipped = Path(args["model_name_or_path"]) / "generation_config.json"
    if shipped.is_file():
        stored = read_json(shipped)
        values |= {key: stored[key] for key in _SAMPLING_KEYS if stored.get(key) is not None}
    if options.run is not None:
        config = run_config.read_config(options.run)
        values |= {key: config[key] for key in _SAMPLING_KEYS if key in config}
    flags = {"temperature": options.temperature, "top_p": options.top_p}
    values |= {key: value for key, value in flags.items() if value is not None}
    if values["temperature"] < 0 or not 0 < values["top_p"] <= 1:
        raise UsageError(
            f"temperature {values['temperature']}, top_p {values['top_p']}: "
            "temperature >= 0 and 0 < top_p <= 1 expected"
        )
    if values["temperature"] == 0:
        return plain
    return replace(plain, do_sample=True, **values)


def _prepare(options: argparse.Namespace) -> tuple[LoadedModel, Sampling]:
    # Before importing the libraries, which read these once.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")
    # LLaMA-Factory logs to the sys.stdout of its first import.
    with contextlib.redirect_stdout(sys.stderr):
        args = model_arguments(options)
        if options.run is not None:
            integrity.check_here(options.run, options.what)
        sampling = choose_sampling(options, args)
        return engine.load(engine.codec(args)), sampling


def _write(text: str) -> None:
    # A model's answers are untrusted, too.
    sys.stdout.write(printable(text))
    sys.stdout.flush()


def _converse(loaded: LoadedModel, sampling: Sampling, system: str | None) -> None:
    """Chat until /exit or the end of input, keeping the conversation."""
    print(_HELP, file=sys.stderr)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - line editing for input()
    history: list[Message] = []
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if text == "/exit":
            return
        if text == "/clear":
            history = []
        elif text:
            history = _turn(loaded, sampling, system, history, text)


def _turn(
    loaded: LoadedModel,
    sampling: Sampling,
    system: str | None,
    history: list[Message],
    text: str,
) -> list[Message]:
    """Answer `text` and return the conversation with both; Ctrl-C drops the turn."""
    turns = [*history, {"role": "user", "content": text}]
    try:
        answer = engine.stream(loaded, Question(tuple(turns), system), sampling, _write)
    except KeyboardInterrupt:
        _write("\n")
        print("(stopped; this turn is dropped)", file=sys.stderr)
        return history
    _write("\n")
    return [*turns, {"role": "assistant", "content": answer.text}]


if __name__ == "__main__":
    sys.exit(main())
