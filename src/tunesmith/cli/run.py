"""The verbs on runs: make one, follow and end it, and take its results further."""

from __future__ import annotations

from pathlib import Path

from tunesmith.cli.command import Session, command
from tunesmith.cli.options import (
    CONFIG,
    HOST,
    LANGUAGES,
    MIRROR,
    MIRROR_OF_RUN,
    MODELS,
    ON,
    ON_RUNS,
    OVERRIDES,
    PREDICT_CONFIG,
    RUN,
    TRAIN_CONFIG,
)


@command(
    example="inv train --on gpu1 --config configs/train/deepseek_r1_1_5b_lora_sft.yaml "
    "learning_rate=1e-4",
    help={
        "config": CONFIG,
        "on": ON,
        "prompts": "YAML with prompts to answer before and after",
        "run": "id of the new run (default: made of time and config)",
        "revision": "revision of the base model",
        "mirror": MIRROR_OF_RUN,
        "evaluate": "measure before and after (default)",
        "attach": "follow the run (default); --no-attach returns at once",
        "preset": "fast: the same steps, computed with less waiting; none: as the config says",
        "gpus": "how many GPUs, e.g. 2, or which, e.g. 0,3 (default: all)",
        "keep-batch": "several GPUs share the rows of a step that the config gives to one",
        "queue": "wait while the host works on another run, instead of refusing",
        "then": "after success: merge, report, pull, poweroff; comma-separated",
        "price": "hourly price, e.g. 1.98/h; shows the running cost",
        "max-hours": "stop with a checkpoint after this many hours of work",
        "max-cost": "stop with a checkpoint at this cost; needs --price",
        "from-laptop": "upload the base model from this folder instead of a download there",
        "overrides": OVERRIDES,
    },
)
def train(
    session: Session,
    config: str = TRAIN_CONFIG,
    on: str = "local",
    prompts: str = "",
    run: str = "",
    revision: str = "",
    mirror: str = "",
    evaluate: bool = True,
    attach: bool = True,
    preset: str = "",
    gpus: str = "",
    keep_batch: bool = False,
    queue: bool = False,
    then: str = "",
    price: str = "",
    max_hours: str = "",
    max_cost: str = "",
    from_laptop: str = "",
    overrides: list[str] | None = None,
) -> None:
    """Train one config, measured before and after.

    Progress is shown until the end; Ctrl-C leaves the run alone and returns.
    """
    from tunesmith.cli import training

    options = training.options_of(
        config=config,
        overrides=overrides,
        prompts=prompts,
        evaluate=evaluate,
        run=run,
        revision=revision,
        mirror=mirror,
        queue=queue,
        then=then,
        price=price,
        max_hours=max_hours,
        max_cost=max_cost,
        preset=preset,
        gpus=gpus,
        keep_batch=keep_batch,
    )
    choices = training.Choices(dry=session.dry, attach=attach, from_laptop=from_laptop)
    training.train(session.root, on, options, choices)


@command(
    example="inv check --config configs/train/deepseek_r1_1_5b_lora_sft.yaml learning_rate=1e-4",
    help={"config": CONFIG, "overrides": OVERRIDES},
)
def check(session: Session, config: str = TRAIN_CONFIG, overrides: list[str] | None = None) -> None:
    """Check a config and its data, with LLaMA-Factory's parser."""
    from tunesmith.cli import config_check

    config_check.check(session.project, Path(config), tuple(overrides or ()))


@command(
    example="inv resume --on gpu1 --run RUN_ID",
    help={
        "run": f"{RUN}; on a host: every run that a restart cut off",
        "on": ON,
        "mirror": f"{MIRROR}; to restore what a rebuild of the host removed",
        "max-hours": "let it work this many hours in all, instead of the limit it has",
    },
)
def resume(
    session: Session, run: str = "", on: str = "local", mirror: str = "", max_hours: str = ""
) -> None:
    """Continue a stopped or failed run."""
    from tunesmith.cli import training
    from tunesmith.plan.options import number_of

    hours = number_of("max-hours", max_hours)
    training.resume(
        session.root, on, run or None, mirror=mirror or None, max_hours=hours, dry=session.dry
    )


@command(example="inv attach --on gpu1", help={"run": RUN, "on": ON})
def attach(session: Session, run: str = "", on: str = "local") -> None:
    """Follow a run; Ctrl-C leaves it running."""
    from tunesmith.cli import training

    training.attach(session.root, on, run or None)


@command(example="inv stop --on gpu1", help={"run": RUN, "on": ON})
def stop(session: Session, run: str = "", on: str = "local") -> None:
    """Stop a run after a checkpoint."""
    from tunesmith.cli import training

    training.stop(session.root, on, run or None)


@command(
    example="inv runs --on all",
    help={"json": "one JSON list on stdout", "on": ON_RUNS},
)
def runs(session: Session, json: bool = False, on: str = "local") -> None:
    """List runs with state, step and result."""
    from tunesmith.cli import listing

    listing.list_runs(session.root, on, as_json=json)


@command(
    example="inv logs --on gpu1 --follow",
    help={"run": RUN, "on": ON, "follow": "keep printing until the run ends"},
)
def logs(session: Session, run: str = "", on: str = "local", follow: bool = False) -> None:
    """Print the log of a run."""
    from tunesmith.cli import listing

    listing.logs(session.root, on, run or None, follow=follow)


@command(
    example="inv pull --on gpu1 --merge-here",
    help={
        "run": RUN,
        "on": HOST,
        "what": "parts: adapter,merged,report,log,predict,export (default: all of them)",
        "merge-here": "download the adapter, not the merged model, and merge on this machine",
        "mirror": f"{MIRROR}; for the base model of --merge-here",
    },
)
def pull(
    session: Session,
    on: str,
    run: str = "",
    what: str = "",
    merge_here: bool = False,
    mirror: str = "",
) -> None:
    """Download a run from a host and verify every file."""
    from tunesmith.cli import pulling

    pulling.pull(
        session.root,
        on,
        run or None,
        what,
        merge_here=merge_here,
        mirror=mirror,
        dry=session.dry,
    )


@command("rm", example="inv rm RUN_ID --on gpu1", help={"run": "run id", "on": ON})
def remove(session: Session, run: str, on: str = "local") -> None:
    """Delete a run and everything it made."""
    from tunesmith.cli import listing

    listing.remove(session.root, on, run, dry=session.dry)


@command(
    example="inv merge --on gpu1 --run RUN_ID",
    help={
        "run": RUN,
        "on": ON,
        "accept-mismatch": "merge even if prompts would be formatted differently than in training",
        "overrides": "export keys, e.g. infer_dtype=float32",
    },
)
def merge(
    session: Session,
    run: str = "",
    on: str = "local",
    accept_mismatch: bool = False,
    overrides: list[str] | None = None,
) -> None:
    """Merge a run's adapter into its base model, and prove it."""
    from tunesmith.cli import results

    words = tuple(overrides or ())
    results.merge(session.root, on, run or None, words, accept=accept_mismatch, dry=session.dry)


@command(
    example="inv export --format gguf --quantise q8_0",
    choices={"format": ("gguf", "ollama", "vllm-check")},
    help={
        "run": RUN,
        "on": ON,
        "format": "gguf, ollama or vllm-check",
        "quantise": "q8_0, q5_1, q4_0, ... (default: the weights as they are)",
        "server": "address of a running vLLM, for vllm-check",
    },
)
def export(
    session: Session,
    format: str,
    run: str = "",
    on: str = "local",
    quantise: str = "",
    server: str = "",
) -> None:
    """Convert a merged model for Ollama, llama.cpp or vLLM."""
    from tunesmith.cli import results

    results.export(
        session.root, on, run or None, format, quantise=quantise, server=server, dry=session.dry
    )


@command(
    example=f"inv predict --config {PREDICT_CONFIG} --run RUN_ID",
    help={
        "config": "LLaMA-Factory YAML with do_predict; may be given as a bare word",
        "run": "predict with this run's adapter (default: the base model alone)",
        "on": ON,
        "mirror": MIRROR_OF_RUN,
        "overrides": OVERRIDES,
    },
)
def predict(
    session: Session,
    config: str = PREDICT_CONFIG,
    run: str = "",
    on: str = "local",
    mirror: str = "",
    overrides: list[str] | None = None,
) -> None:
    """Answer a data set and score the answers."""
    from tunesmith.cli import results

    words = tuple(overrides or ())
    results.predict(
        session.root, on, Path(config), run or None, words, mirror=mirror, dry=session.dry
    )


@command(
    example='inv chat --what merged --prompt "What is a conch?" --greedy',
    choices={"what": MODELS},
    help={
        "run": RUN,
        "what": "base, adapter (default) or merged",
        "prompt": "answer this one prompt and exit",
        "system": "system prompt",
        "greedy": "greedy decoding",
        "max-new-tokens": "maximum number of new tokens",
        "on": ON,
    },
)
def chat(
    session: Session,
    run: str = "",
    what: str = "adapter",
    prompt: str = "",
    system: str = "",
    greedy: bool = False,
    max_new_tokens: int = 0,
    on: str = "local",
) -> None:
    """Chat with a run's model in the terminal."""
    from tunesmith.cli import results

    results.chat(
        session.root,
        on,
        run or None,
        what=what,
        prompt=prompt,
        system=system,
        greedy=greedy,
        max_new_tokens=max_new_tokens,
        dry=session.dry,
    )


@command(
    example="inv report --compare RUN_1 RUN_2",
    choices={"language": LANGUAGES},
    help={
        "run": RUN,
        "on": ON,
        "language": "en or zh",
        "compare": "compare the runs that follow as words",
        "compared": "a run to compare; the words after --compare are these",
    },
)
def report(
    session: Session,
    run: str = "",
    on: str = "local",
    language: str = "en",
    compare: bool = False,
    compared: list[str] | None = None,
) -> None:
    """Write a run's report, or compare several runs."""
    from tunesmith.cli import results

    if compare or compared:
        names = [*([run] if run else []), *(compared or [])]
        results.compare(session.root, on, names, language=language)
        return
    results.report(session.root, on, run or None, language=language)
