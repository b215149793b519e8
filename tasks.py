"""The user's verbs, for Invoke: parse, call one function, print.

Imports are inside the tasks: `inv --list` must not wait for what it does not show.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from invoke import Collection, Context

sys.path.insert(0, str(Path(__file__).absolute().parent / "src"))

from tunesmith.cli.command import BARE_WORDS, MISUSE_IS_TWO, door
from tunesmith.core import isolated
from tunesmith.core.patching import install

# Programs are called by name: none is looked for in the folder that somebody stands in.
os.environ["PATH"] = isolated.programs(os.environ.get("PATH", os.defpath))

ROOT = Path(__file__).absolute().parent
ON = "where: local (default) or a host"
HOSTS = "host, or several as in gpu1,gpu2"
RUN = "run id (default: the newest run)"
LOCAL_PORT = "port of this machine (default: a free one)"
FLAVOUR = "cu128 (default) or cu126"
MIRROR = "mirror profile: default, cn (configs/mirrors/) or a file of your own"


@door(
    help={
        "config": "a LLaMA-Factory YAML",
        "on": ON,
        "prompts": "YAML with prompts to answer before and after",
        "run": "run id (default: time and config)",
        "revision": "revision of the base model",
        "mirror": f"{MIRROR}; a host uses the one it was provisioned with",
        "evaluate": "measure before and after (default)",
        "attach": "show progress (default); --no-attach returns at once",
        "preset": "fast: the same steps, computed with less waiting; none (default: the config's)",
        "queue": "wait while the host works on another run, instead of refusing",
        "then": "what follows a success: merge,report,pull,poweroff",
        "price": "of an hour, as in 1.98/h: shows what the run has cost",
        "max-hours": "stop with a checkpoint after so many hours of work",
        "max-cost": "stop with a checkpoint at this cost; needs --price",
        "from-laptop": "folder of the base model here, to upload instead of a download there",
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
    mirror: str = "",
    evaluate: bool = True,
    attach: bool = True,
    preset: str = "",
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
    from tunesmith.plan import build

    asked = build.Asked(
        Path(config),
        tuple(overrides or ()),
        Path(prompts) if prompts else None,
        evaluate,
        run or None,
        revision or None,
        mirror or None,
        queue,
        build.words_of(then),
        build.number_of("price", price.removesuffix("/h")),
        build.number_of("max-hours", max_hours),
        build.number_of("max-cost", max_cost),
        preset or None,
    )
    choices = training.Choices(dry=c.config.run.dry, attach=attach, from_laptop=from_laptop)
    training.train(ROOT, on, asked, choices)


@door(
    help={
        "run": f"{RUN}; on a host all that a restart has cut off",
        "on": ON,
        "mirror": f"{MIRROR}, to bring back what a rebuild has taken",
        "max-hours": "let it work so long in all, instead of the limit it has",
    }
)
def resume(
    c: Context, run: str = "", on: str = "local", mirror: str = "", max_hours: str = ""
) -> None:
    """Continue a stopped or failed run."""
    from tunesmith.cli import training
    from tunesmith.plan import build

    hours = build.number_of("max-hours", max_hours)
    training.resume(
        ROOT, on, run or None, mirror=mirror or None, max_hours=hours, dry=c.config.run.dry
    )


@door(help={"run": RUN, "on": ON})
def attach(_c: Context, run: str = "", on: str = "local") -> None:
    """Follow a run; Ctrl-C leaves it running."""
    from tunesmith.cli import training

    training.attach(ROOT, on, run or None)


@door(help={"run": RUN, "on": ON})
def stop(_c: Context, run: str = "", on: str = "local") -> None:
    """Stop a run after a checkpoint."""
    from tunesmith.cli import training

    training.stop(ROOT, on, run or None)


@door(
    help={
        "run": RUN,
        "on": "host",
        "what": "of adapter,merged,report,log,predict,export (default: all of it); others stay",
        "merge-here": "bring the adapter, not the merged model: merge it here",
        "mirror": f"{MIRROR}, for the base model of --merge-here",
    }
)
def pull(
    c: Context,
    on: str,
    run: str = "",
    what: str = "",
    merge_here: bool = False,
    mirror: str = "",
) -> None:
    """Bring a run from a host, complete or not at all."""
    from tunesmith.cli import pulling

    dry = c.config.run.dry
    pulling.pull(ROOT, on, run or None, what, merge_here=merge_here, mirror=mirror, dry=dry)


@door(name="rm", help={"run": "run id", "on": ON})
def remove(c: Context, run: str, on: str = "local") -> None:
    """Delete a run and all it made."""
    from tunesmith.cli import listing

    listing.remove(ROOT, on, run, dry=c.config.run.dry)


@door(help={"json": "one JSON list on stdout", "on": f"{ON}, several (gpu1,gpu2), or all"})
def runs(_c: Context, json: bool = False, on: str = "local") -> None:
    """List runs with state, step and result."""
    from tunesmith.cli import listing

    listing.list_runs(ROOT, on, as_json=json)


@door(help={"run": RUN, "on": ON, "follow": "go on until the run ends"})
def logs(_c: Context, run: str = "", on: str = "local", follow: bool = False) -> None:
    """Print the log of a run."""
    from tunesmith.cli import listing

    listing.logs(ROOT, on, run or None, follow=follow)


@door(
    help={
        "run": RUN,
        "on": ON,
        "accept-mismatch": "merge although it would be asked otherwise than it was trained",
        "overrides": "export keys, as in infer_dtype=float32",
    }
)
def merge(
    c: Context,
    run: str = "",
    on: str = "local",
    accept_mismatch: bool = False,
    overrides: list[str] | None = None,
) -> None:
    """Merge a run's adapter and prove the result."""
    from tunesmith.cli import results

    words = tuple(overrides or ())
    results.merge(ROOT, on, run or None, words, accept=accept_mismatch, dry=c.config.run.dry)


@door(
    help={
        "run": RUN,
        "on": ON,
        "format": "gguf, ollama or vllm-check",
        "quantise": "q8_0, q5_1, q4_0, ... (default: the weights as they are)",
        "server": "address of a running vLLM, for vllm-check",
    }
)
def export(
    c: Context,
    format: str,
    run: str = "",
    on: str = "local",
    quantise: str = "",
    server: str = "",
) -> None:
    """Take a merged model to Ollama, llama.cpp or vLLM."""
    from tunesmith.cli import results

    results.export(
        ROOT, on, run or None, format, quantise=quantise, server=server, dry=c.config.run.dry
    )


@door(
    help={
        "config": "a LLaMA-Factory YAML with do_predict",
        "run": "predict with this run's adapter (default: the base model)",
        "on": ON,
        "mirror": f"{MIRROR}; a host uses the one it was provisioned with",
        "overrides": "key=value words, as LLaMA-Factory takes them",
    }
)
def predict(
    c: Context,
    config: str = "configs/predict/smollm2_135m_lora_sft.yaml",
    run: str = "",
    on: str = "local",
    mirror: str = "",
    overrides: list[str] | None = None,
) -> None:
    """Answer a data set and score the answers."""
    from tunesmith.cli import results

    words = tuple(overrides or ())
    results.predict(ROOT, on, Path(config), run or None, words, mirror=mirror, dry=c.config.run.dry)


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
    from tunesmith.cli import results

    results.chat(
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


@door(
    help={
        "run": RUN,
        "on": ON,
        "language": "en or zh",
        "compare": "set the runs named as words after it side by side",
        "compared": "a run to compare, as the words are",
    }
)
def report(
    _c: Context,
    run: str = "",
    on: str = "local",
    language: str = "en",
    compare: bool = False,
    compared: list[str] | None = None,
) -> None:
    """Write a run's report, or compare several runs."""
    from tunesmith.cli import results

    if compare or compared:
        results.compare(ROOT, on, [*([run] if run else []), *(compared or [])], language=language)
        return
    results.report(ROOT, on, run or None, language=language)


@door(
    help={
        "on": HOSTS,
        "mirror": MIRROR,
        "flavour": "cu128 or cu126 (default: what GPU and driver ask for)",
        "toolkit": "also give an nvcc of the flavour's CUDA",
        "token": "read a Hugging Face token from stdin",
        "check": "change nothing, tell what would change",
        "diff": "show changed lines of files",
        "full": "run the playbook though the host is in state",
    }
)
def provision(
    c: Context,
    on: str,
    mirror: str = "default",
    flavour: str = "",
    toolkit: bool = False,
    token: bool = False,
    check: bool = False,
    diff: bool = False,
    full: bool = False,
) -> None:
    """Make hosts that answer SSH training machines."""
    from tunesmith.cli import provision as cli_provision

    cli_provision.provision(
        ROOT,
        on,
        mirror=mirror,
        flavour=flavour or None,
        toolkit=toolkit,
        token=token,
        check=check,
        diff=diff,
        full=full,
        dry=c.config.run.dry,
    )


@door(
    help={
        "on": ON,
        "port": LOCAL_PORT,
        "open": "show it in the browser (default); --no-open only prints the address",
        "stop": "end the Board, and a training started in it",
    }
)
def webui(
    c: Context, on: str = "local", port: int = 0, open: bool = True, stop: bool = False
) -> None:
    """Open LLaMA Board, through a tunnel if on a host."""
    from tunesmith.cli import service as cli_service

    cli_service.webui(ROOT, on, port=port, browser=open, stop=stop, dry=c.config.run.dry)


@door(
    help={
        "run": RUN,
        "what": "base, adapter (default) or merged",
        "on": ON,
        "port": LOCAL_PORT,
        "show-key": "tell the key of an API that runs already",
        "stop": "end the API",
    }
)
def api(
    c: Context,
    run: str = "",
    what: str = "adapter",
    on: str = "local",
    port: int = 0,
    show_key: bool = False,
    stop: bool = False,
) -> None:
    """Serve a run's model as OpenAI's API does, with a key."""
    from tunesmith.cli import service as cli_service

    cli_service.api(
        ROOT,
        on,
        run or None,
        what=what,
        port=port,
        show_key=show_key,
        stop=stop,
        dry=c.config.run.dry,
    )


@door(
    help={
        "run": "only this run (default: all)",
        "on": ON,
        "port": LOCAL_PORT,
        "mirror": MIRROR,
        "open": "show it in the browser (default); --no-open only prints the address",
        "stop": "end TensorBoard",
    }
)
def tensorboard(
    c: Context,
    run: str = "",
    on: str = "local",
    port: int = 0,
    mirror: str = "default",
    open: bool = True,
    stop: bool = False,
) -> None:
    """Show the curves of runs in TensorBoard."""
    from tunesmith.cli import service as cli_service

    cli_service.tensorboard(
        ROOT,
        on,
        run or None,
        port=port,
        mirror=mirror,
        browser=open,
        stop=stop,
        dry=c.config.run.dry,
    )


@door(help={"port": "port of the host", "on": "host", "local": LOCAL_PORT})
def tunnel(c: Context, port: str, on: str, local: int = 0) -> None:
    """Bring a port of a host to this machine."""
    from tunesmith.cli import service as cli_service

    cli_service.tunnel(ROOT, on, port, local=local, dry=c.config.run.dry)


@door(help={"mirror": MIRROR})
def demo(c: Context, mirror: str = "default") -> None:
    """Do the whole path with a small model, no GPU."""
    from tunesmith.cli import demo

    demo.demo(ROOT, mirror=mirror, dry=c.config.run.dry)


@door(
    name="check",
    help={
        "dataset": "keys, comma-separated (default: all)",
        "dataset-dir": "folder of dataset_info.json",
        "file": "check this file or folder instead, registered or not",
        "config": "check the data of this LLaMA-Factory YAML, with its template and tokenizer",
        "gpu": "with --config: estimate for this GPU, as in RTX4090 (configs/gpus.yml)",
        "price": "with --gpu: its price an hour, as in 1.98/h",
        "picture": "with --config: where to put the histogram (PNG)",
        "mirror": MIRROR,
        "overrides": "with --config: key=value words, as LLaMA-Factory takes them",
    },
)
def data_check(
    _c: Context,
    dataset: str = "",
    dataset_dir: str = "",
    file: str = "",
    config: str = "",
    gpu: str = "",
    price: str = "",
    picture: str = "",
    mirror: str = "default",
    overrides: list[str] | None = None,
) -> None:
    """Check data sets row by row; change nothing."""
    from tunesmith.cli import data as cli_data

    words = tuple(overrides or ())
    cli_data.check(
        ROOT,
        cli_data.Asked(dataset, dataset_dir, file, config, words, gpu, price, picture, mirror),
    )


@door(
    name="register",
    help={
        "file": "a JSON, JSONL, CSV or Parquet file, or a folder of one type",
        "key": "name for configs to use",
        "dataset-dir": "folder of dataset_info.json",
        "replace": "let the key name another file from now on",
    },
)
def data_register(
    c: Context, file: str, key: str, dataset_dir: str = "data", replace: bool = False
) -> None:
    """Check a data file and add it to dataset_info.json."""
    from tunesmith.cli import data as cli_data

    cli_data.register(ROOT, file, key, dataset_dir, replace=replace, dry=c.config.run.dry)


@door(
    name="split",
    help={
        "dataset": "key of the data set to split",
        "dataset-dir": "folder of dataset_info.json",
        "share": "part to hold out, as in 0.1",
        "seed": "another number, another split",
        "replace": "overwrite an earlier split",
    },
)
def data_split(
    c: Context,
    dataset: str,
    dataset_dir: str = "data",
    share: str = "0.1",
    seed: int = 42,
    replace: bool = False,
) -> None:
    """Split off validation rows; alike ones stay together."""
    from tunesmith.cli import data as cli_data

    cli_data.split_data(
        ROOT, dataset, dataset_dir, share=share, seed=seed, replace=replace, dry=c.config.run.dry
    )


@door(
    name="preview",
    help={
        "config": "a LLaMA-Factory YAML",
        "rows": "how many rows",
        "first": "number of the first row",
        "mirror": MIRROR,
        "overrides": "key=value words, as LLaMA-Factory takes them",
    },
)
def data_preview(
    _c: Context,
    config: str = "configs/train/smollm2_135m_lora_sft.yaml",
    rows: int = 3,
    first: int = 1,
    mirror: str = "default",
    overrides: list[str] | None = None,
) -> None:
    """Show rows as the model sees them, trained parts marked."""
    from tunesmith.cli import data as cli_data

    words = tuple(overrides or ())
    cli_data.preview(ROOT, config, words, rows=rows, first=first, mirror=mirror)


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
    from tunesmith.cli import base_model

    base_model.fetch_model(
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
    from tunesmith.cli import base_model

    base_model.list_models(ROOT)


@door(name="show")
def stack_show(_c: Context) -> None:
    """Print the pins and variables in force."""
    from tunesmith.cli import stack

    stack.show_stack(ROOT)


@door(name="lock", help={"mirror": MIRROR})
def stack_lock(c: Context, mirror: str = "default") -> None:
    """Resolve stack.yml into hashed locks."""
    from tunesmith.cli import stack

    stack.lock_stack(ROOT, mirror=mirror, dry=c.config.run.dry)


@door(name="render")
def stack_render(c: Context) -> None:
    """Rewrite every file derived from the stack."""
    from tunesmith.cli import stack

    stack.render_stack(ROOT, dry=c.config.run.dry)


@door(name="check")
def stack_check(_c: Context) -> None:
    """Check locks and derived files for drift."""
    from tunesmith.cli import stack

    stack.check_stack(ROOT)


@door(name="install", help={"flavour": "cu128 (default) or cu126", "mirror": MIRROR})
def stack_install(c: Context, flavour: str = "", mirror: str = "default") -> None:
    """Install the training environment here."""
    from tunesmith.cli import stack

    stack.install_stack(ROOT, flavour or None, mirror=mirror, dry=c.config.run.dry)


@door(
    name="add",
    help={
        "name": "what to call it",
        "address": "the line of the rental console, in quotes, or an alias of ~/.ssh/config",
        "identity": "private key to log in with",
        "install-key": "log in with a password once and leave your public key there",
        "fingerprint": "host key the console shows (SHA256:...); another one is refused",
        "runner": "conda (default), or container for a host with Docker",
    },
)
def host_add(
    c: Context,
    name: str,
    address: str,
    identity: str = "",
    install_key: bool = False,
    fingerprint: str = "",
    runner: str = "",
) -> None:
    """Add a host: probe it, pin its key, log in."""
    from tunesmith.cli import host as cli_host

    cli_host.host_add(
        ROOT,
        name,
        address,
        identity=identity,
        install_key=install_key,
        expected=fingerprint,
        runner=runner,
        dry=c.config.run.dry,
    )


@door(name="list")
def host_list(_c: Context) -> None:
    """List the known hosts."""
    from tunesmith.cli import host as cli_host

    cli_host.host_list(ROOT)


@door(name="remove", help={"name": "host"})
def host_remove(c: Context, name: str) -> None:
    """Forget a host; the host itself is not touched."""
    from tunesmith.cli import host as cli_host

    cli_host.host_remove(ROOT, name, dry=c.config.run.dry)


@door(
    name="trust",
    help={
        "name": "host",
        "fingerprint": "host key the console shows (SHA256:...); another one is refused",
    },
)
def host_trust(c: Context, name: str, fingerprint: str = "") -> None:
    """Pin the key a rebuilt host has now."""
    from tunesmith.cli import host as cli_host

    cli_host.host_trust(ROOT, name, expected=fingerprint, dry=c.config.run.dry)


@door(name="autostart", help={"on": "host", "off": "do not, any more"})
def host_autostart(c: Context, on: str, off: bool = False) -> None:
    """Let a host resume its runs when it starts."""
    from tunesmith.cli import host as cli_host

    cli_host.host_autostart(ROOT, on, off=off, dry=c.config.run.dry)


@door(
    name="check",
    help={"on": "host", "mirror": MIRROR, "flavour": "cu128 or cu126", "json": "one JSON object"},
)
def host_check(
    _c: Context, on: str, mirror: str = "default", flavour: str = "", json: bool = False
) -> None:
    """Check a host before anything is paid for."""
    from tunesmith.cli import host_check as cli_host_check

    cli_host_check.host_check(ROOT, on, mirror=mirror, flavour=flavour or None, as_json=json)


@door(name="verify", help={"on": HOSTS})
def host_verify(_c: Context, on: str) -> None:
    """Test that a host is as provisioning leaves it."""
    from tunesmith.cli import provision as cli_provision

    cli_provision.host_verify(ROOT, on)


@door(name="reset", help={"on": HOSTS})
def host_reset(c: Context, on: str) -> None:
    """Remove what we installed; data and runs stay."""
    from tunesmith.cli import provision as cli_provision

    cli_provision.host_reset(ROOT, on, dry=c.config.run.dry)


@door(
    name="build",
    help={
        "flavour": "cu128 (default) or cu126",
        "mirror": MIRROR,
        "base": "base image with Python 3.10 (default: the stack's; BASE_IMAGE)",
        "toolkit": "with an nvcc of the flavour's CUDA",
    },
)
def image_build(
    c: Context, flavour: str = "", mirror: str = "default", base: str = "", toolkit: bool = False
) -> None:
    """Build the image of a flavour."""
    from tunesmith.cli import image as cli_image

    cli_image.image_build(
        ROOT,
        flavour or None,
        mirror=mirror,
        base=base or None,
        toolkit=toolkit,
        dry=c.config.run.dry,
    )


@door(name="verify", help={"flavour": FLAVOUR})
def image_verify(_c: Context, flavour: str = "") -> None:
    """Test that an image is as it should be."""
    from tunesmith.cli import image as cli_image

    cli_image.image_verify(ROOT, flavour or None)


@door(name="tags", help={"flavour": FLAVOUR})
def image_tags(_c: Context, flavour: str = "") -> None:
    """Print an image's tags, measured from it."""
    from tunesmith.cli import image as cli_image

    cli_image.image_tags(ROOT, flavour or None)


@door(name="sizes", help={"flavour": FLAVOUR})
def image_sizes(_c: Context, flavour: str = "") -> None:
    """Print the largest parts of an image."""
    from tunesmith.cli import image as cli_image

    cli_image.image_sizes(ROOT, flavour or None)


@door(name="sbom", help={"flavour": FLAVOUR, "output": "file (default: stdout)"})
def image_sbom(_c: Context, flavour: str = "", output: str = "") -> None:
    """Write what an image holds, as CycloneDX."""
    from tunesmith.cli import image as cli_image

    cli_image.image_sbom(ROOT, flavour or None, output)


@door(name="push", help={"to": "registry and repository", "flavour": FLAVOUR})
def image_push(c: Context, to: str, flavour: str = "") -> None:
    """Push an image to a registry."""
    from tunesmith.cli import image as cli_image

    cli_image.image_push(ROOT, flavour or None, to, dry=c.config.run.dry)


@door(name="ship", help={"on": "host with Docker", "flavour": FLAVOUR})
def image_ship(c: Context, on: str, flavour: str = "") -> None:
    """Bring an image to a host over SSH."""
    from tunesmith.cli import image as cli_image

    cli_image.image_ship(ROOT, on, flavour or None, dry=c.config.run.dry)


@door(name="prune", help={"everything": "also those that still have a name"})
def image_prune(c: Context, everything: bool = False) -> None:
    """Remove replaced images and the build cache."""
    from tunesmith.cli import image as cli_image

    cli_image.image_prune(ROOT, everything=everything, dry=c.config.run.dry)


install(BARE_WORDS)
install(MISUSE_IS_TWO)
ns = Collection()
for task in (
    *(train, resume, attach, stop, runs, logs, pull, remove),
    *(merge, export, predict, chat, report, demo, provision),
    *(webui, api, tensorboard, tunnel),
):
    ns.add_task(task)
for noun, tasks in {
    "host": (
        host_add,
        host_list,
        host_remove,
        host_trust,
        host_autostart,
        host_check,
        host_verify,
        host_reset,
    ),
    "data": (data_check, data_register, data_split, data_preview),
    "image": (
        image_build,
        image_verify,
        image_tags,
        image_sizes,
        image_sbom,
        image_push,
        image_ship,
        image_prune,
    ),
    "model": (model_fetch, model_list),
    "stack": (stack_show, stack_lock, stack_render, stack_check, stack_install),
}.items():
    ns.add_collection(Collection(noun, *tasks))
