"""LLaMA-Factory's OpenAI-compatible API of a run: `python -m tunesmith.job.services.api RECORD`.

Only on loopback (in a container on the given address), never without a key, and not for pages of
another origin: LLaMA-Factory 0.9.3 itself would listen on all addresses and accept everyone
(api/app.py). The model is prompted as in `inv chat`.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tunesmith.core.documents import Arguments
from tunesmith.core.errors import UsageError
from tunesmith.job.evaluation import chat
from tunesmith.job.run import config as run_config
from tunesmith.job.run import integrity
from tunesmith.job.services import manager
from tunesmith.job.services.access import before_asgi
from tunesmith.job.services.records import ServiceRecord


def arguments(run: Path, what: str) -> Arguments:
    """Return LLaMA-Factory's arguments for a run's model, with the sampling of `inv chat`.

    `what` is base, adapter or merged. Raises UsageError if it does not exist.
    """
    options = argparse.Namespace(
        run=run,
        what=what,
        model=None,
        template=None,
        thinking=None,
        max_new_tokens=1024,
        seed=42,
        greedy=False,
        temperature=None,
        top_p=None,
    )
    _check_base(run, what)
    args = chat.model_arguments(options)
    integrity.check_here(run, what)
    sampling = chat.choose_sampling(options, args)
    return args | {
        "do_sample": sampling.do_sample,
        "max_new_tokens": sampling.max_new_tokens,
        "repetition_penalty": sampling.repetition_penalty,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
    }


def _check_base(run: Path, what: str) -> None:
    """Raise UsageError if the base model is missing or has another path, as in a container that
    mounts its folder elsewhere than during training."""
    config = run_config.read_config(run)
    adapter = what == "adapter" and config.get("finetuning_type", "lora") == "lora"
    model = Path(str(config["model_name_or_path"]))
    if (adapter or what == "base") and model.is_absolute() and not model.is_dir():
        raise UsageError(
            f"{model}: the base model of run {run.name} is missing; mount its folder under this "
            "path, or serve the merged model, which does not need it: `--what merged`"
        )


def serve(record_file: Path) -> None:
    """Load the model, then serve until the process ends.

    Raises UsageError without a key or without the model.
    """
    record = ServiceRecord.read(record_file)
    gate = manager.gate(record_file, browser=False)
    os.environ["API_MODEL_NAME"] = record.serves["run"]
    args = arguments(Path(record.settings["run"]), record.serves["what"])

    import uvicorn  # type: ignore[import-not-found]  # part of the training environment
    from llamafactory.api.app import create_app
    from llamafactory.chat import ChatModel

    model = ChatModel(args)
    # Set only while the app is created, which reads it: processes started before (torch's compile
    # workers) or after must not have the key in their environment.
    os.environ["API_KEY"] = gate.key
    app = create_app(model)
    del os.environ["API_KEY"]
    uvicorn.run(before_asgi(app, gate), host=record.listen, port=record.port)


if __name__ == "__main__":
    sys.exit(manager.serve_record(serve))
