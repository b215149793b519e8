"""The user's verbs, for Invoke: parse, call one function, print.

Imports are inside the tasks: `inv --list` must not wait for what it does not show.
"""

from __future__ import annotations

import sys
from pathlib import Path

from invoke import Collection, Context

sys.path.insert(0, str(Path(__file__).parent / "src"))

from tunesmith.words import accept_words, door

ROOT = Path(__file__).parent
ON = "where: local (default)"
RUN = "run id (default: the newest run)"
MIRROR = "mirror profile: default or cn (configs/mirrors/)"


@door(
    help={
        "config": "a LLaMA-Factory YAML",
        "on": ON,
        "prompts": "YAML with prompts to answer before and after",
        "run": "run id (default: time and config)",
        "revision": "revision of the base model",
        "mirror": MIRROR,
        "evaluate": "measure before and after (default)",
        "attach": "show progress (default); --no-attach returns at once",
        "overrides": "key=value words, as LLaMA-Factory takes them",
    }
)
def train(
    c: Context,
    config: str = "configs/train/smollm2_135m_lora_sft.yaml",
    on: str = "local",
    prompts: str = "",
    run: str = "",
    revision: str = "",
    mirror: str = "default",
    evaluate: bool = True,
    attach: bool = True,
    overrides: list[str] | None = None,
) -> None:
    """Train one config, measured before and after.

    Progress is shown until the end; Ctrl-C leaves the run alone and returns.
    """
    from tunesmith import cli, runs

    asked = runs.Asked(
        Path(config),
        tuple(overrides or ()),
        Path(prompts) if prompts else None,
        evaluate,
        run or None,
        revision or None,
    )
    cli.train(ROOT, on, asked, mirror=mirror, dry=c.config.run.dry, attach=attach)


@door(help={"run": RUN, "on": ON})
def resume(c: Context, run: str = "", on: str = "local") -> None:
    """Continue a stopped or failed run."""
    from tunesmith import cli

    cli.resume(ROOT, on, run or None, dry=c.config.run.dry)


@door(help={"run": RUN, "on": ON})
def attach(_c: Context, run: str = "", on: str = "local") -> None:
    """Follow a run; Ctrl-C leaves it running."""
    from tunesmith import cli

    cli.attach(ROOT, on, run or None)


@door(help={"run": RUN, "on": ON})
def stop(_c: Context, run: str = "", on: str = "local") -> None:
    """Stop a run after a checkpoint."""
    from tunesmith import cli

    cli.stop(ROOT, on, run or None)


@door(help={"json": "one JSON list on stdout", "on": ON})
def runs(_c: Context, json: bool = False, on: str = "local") -> None:
    """List runs with state, step and result."""
    from tunesmith import cli

    cli.list_runs(ROOT, on, as_json=json)


@door(help={"run": RUN, "on": ON, "follow": "go on until the run ends"})
def logs(_c: Context, run: str = "", on: str = "local", follow: bool = False) -> None:
    """Print the log of a run."""
    from tunesmith import cli

    cli.logs(ROOT, on, run or None, follow=follow)


@door(help={"run": RUN, "on": ON, "overrides": "export keys, as in infer_dtype=float32"})
def merge(c: Context, run: str = "", on: str = "local", overrides: list[str] | None = None) -> None:
    """Merge a run's adapter and prove the result."""
    from tunesmith import cli

    cli.merge(ROOT, on, run or None, tuple(overrides or ()), dry=c.config.run.dry)


@door(
    help={
        "config": "a LLaMA-Factory YAML with do_predict",
        "run": "predict with this run's adapter (default: the base model)",
        "on": ON,
        "mirror": MIRROR,
        "overrides": "key=value words, as LLaMA-Factory takes them",
    }
)
def predict(
    c: Context,
    config: str = "configs/predict/smollm2_135m_lora_sft.yaml",
    run: str = "",
    on: str = "local",
    mirror: str = "default",
    overrides: list[str] | None = None,
) -> None:
    """Answer a data set and score the answers."""
    from tunesmith import cli

    words = tuple(overrides or ())
    cli.predict(ROOT, on, Path(config), run or None, words, mirror=mirror, dry=c.config.run.dry)


@door(
    help={
        "run": RUN,
        "what": "base, adapter (default) or merged",
        "prompt": "answer this one prompt and end",
        "system": "system prompt",
        "greedy": "always the likeliest token",
        "max-new-tokens": "longest answer, in tokens",
        "on": ON,
    }
)
def chat(
    c: Context,
    run: str = "",
    what: str = "adapter",
    prompt: str = "",
    system: str = "",
    greedy: bool = False,
    max_new_tokens: int = 0,
    on: str = "local",
) -> None:
    """Talk to a run's model in the terminal."""
    from tunesmith import cli

    cli.chat(
        ROOT,
        on,
        run or None,
        what=what,
        prompt=prompt,
        system=system,
        greedy=greedy,
        max_new_tokens=max_new_tokens,
        dry=c.config.run.dry,
    )


@door(help={"run": RUN, "on": ON, "language": "en or zh"})
def report(_c: Context, run: str = "", on: str = "local", language: str = "en") -> None:
    """Write a run's report.html and training_loss.png."""
    from tunesmith import cli

    cli.report(ROOT, on, run or None, language=language)


@door(help={"mirror": MIRROR})
def demo(c: Context, mirror: str = "default") -> None:
    """Do the whole path with a small model, no GPU."""
    from tunesmith import cli

    cli.demo(ROOT, mirror=mirror, dry=c.config.run.dry)


@door(
    name="check",
    help={
        "dataset": "keys, comma-separated (default: all)",
        "dataset-dir": "folder of dataset_info.json",
        "file": "check this file instead, registered or not",
    },
)
def data_check(_c: Context, dataset: str = "", dataset_dir: str = "data", file: str = "") -> None:
    """Check data sets row by row; change nothing."""
    from tunesmith import cli

    cli.check_data(ROOT, dataset, dataset_dir, file)


@door(
    name="register",
    help={
        "file": "a JSON or JSONL file",
        "key": "name for configs to use",
        "dataset-dir": "folder of dataset_info.json",
        "replace": "let the key name another file from now on",
    },
)
def data_register(
    c: Context, file: str, key: str, dataset_dir: str = "data", replace: bool = False
) -> None:
    """Check a data file and add it to dataset_info.json."""
    from tunesmith import cli

    cli.register_data(ROOT, file, key, dataset_dir, replace=replace, dry=c.config.run.dry)


@door(
    name="fetch",
    help={
        "name": "repo id, or a folder to verify",
        "revision": "branch, tag or commit",
        "mirror": MIRROR,
        "from": "take it from this folder or archive",
        "allow-pickle": "also take .bin weights, which can run code when loaded",
    },
)
def model_fetch(
    c: Context,
    name: str,
    revision: str = "",
    mirror: str = "default",
    from_: str = "",
    allow_pickle: bool = False,
) -> None:
    """Fetch and verify a base model."""
    from tunesmith import cli

    cli.fetch_model(
        ROOT,
        name,
        revision=revision or None,
        mirror=mirror,
        from_path=from_ or None,
        allow_pickle=allow_pickle,
        dry=c.config.run.dry,
    )


@door(name="list")
def model_list(_c: Context) -> None:
    """List the known base models."""
    from tunesmith import cli

    cli.list_models(ROOT)


@door(name="show")
def stack_show(_c: Context) -> None:
    """Print the pins and variables in force."""
    from tunesmith import cli

    cli.show_stack(ROOT)


@door(name="lock", help={"mirror": MIRROR})
def stack_lock(c: Context, mirror: str = "default") -> None:
    """Resolve stack.yml into hashed locks."""
    from tunesmith import cli

    cli.lock_stack(ROOT, mirror=mirror, dry=c.config.run.dry)


@door(name="render")
def stack_render(c: Context) -> None:
    """Rewrite every file derived from the stack."""
    from tunesmith import cli

    cli.render_stack(ROOT, dry=c.config.run.dry)


@door(name="check")
def stack_check(_c: Context) -> None:
    """Check locks and derived files for drift."""
    from tunesmith import cli

    cli.check_stack(ROOT)


@door(name="install", help={"flavour": "cu128 (default) or cu126", "mirror": MIRROR})
def stack_install(c: Context, flavour: str = "", mirror: str = "default") -> None:
    """Install the training environment here."""
    from tunesmith import cli

    cli.install_stack(ROOT, flavour or None, mirror=mirror, dry=c.config.run.dry)


accept_words()
ns = Collection(train, resume, attach, stop, runs, logs, merge, predict, chat, report, demo)
for noun, tasks in {
    "data": (data_check, data_register),
    "model": (model_fetch, model_list),
    "stack": (stack_show, stack_lock, stack_render, stack_check, stack_install),
}.items():
    ns.add_collection(Collection(noun, *tasks))
