"""The verbs on data: check, register, split, preview."""

from __future__ import annotations

from tunesmith.cli.command import Session, command
from tunesmith.cli.options import CONFIG, DATASET_DIR, MIRROR, OVERRIDES, TRAIN_CONFIG

# What a data set that is none of questions and answers can be trained with.
_STAGES = {"pt": "pt", "rm": "rm or dpo", "kto": "kto"}


@command(
    "data.check",
    example="inv data.check --config configs/train/deepseek_r1_1_5b_lora_sft.yaml --gpu RTX4090",
    help={
        "dataset": "keys of dataset_info.json, comma-separated (default: all)",
        "dataset-dir": DATASET_DIR,
        "file": "check this file or folder instead, registered or not",
        "config": "check the data of this LLaMA-Factory YAML with its template and tokenizer",
        "gpu": "with --config: estimate time for this GPU, e.g. RTX4090 (configs/gpus.yml)",
        "price": "with --gpu: its hourly price, e.g. 1.98/h",
        "picture": "with --config: where to write the histogram (PNG)",
        "mirror": MIRROR,
        "overrides": f"with --config: {OVERRIDES}",
    },
)
def check(
    session: Session,
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
    from tunesmith.cli import data_check

    words = tuple(overrides or ())
    options = data_check.DataCheckOptions(
        dataset, dataset_dir, file, config, words, gpu, price, picture, mirror
    )
    data_check.check(session.project, options)


@command(
    "data.register",
    example="inv data.register my_rows.jsonl my_data",
    help={
        "file": "a JSON, JSONL, CSV or Parquet file, or a folder of one type",
        "key": "name for configs to use",
        "dataset-dir": DATASET_DIR,
        "replace": "point an existing key to this file",
    },
)
def register(
    session: Session, file: str, key: str, dataset_dir: str = "data", replace: bool = False
) -> None:
    """Check a data file and add it to dataset_info.json."""
    from tunesmith.cli.console import say
    from tunesmith.dataset import registry
    from tunesmith.plan.build import tables_here

    project = session.project
    folder, path, tables = project.find(dataset_dir), project.find(file), tables_here(project)
    if session.dry:
        found = registry.check_unregistered(path, tables=tables)
        say(f"would register {key}: {path} ({found.rows} rows, {found.error_count} errors)")
        return
    entry, found = registry.register(folder, key, path, replace=replace, tables=tables)
    stage = "" if entry.stage() == "sft" else f" for stage {_STAGES[entry.stage()]}"
    warnings = f"; {found.warning_count} warnings:" if found.warning_count else ""
    say(
        f"{folder / registry.REGISTRY}: {key} -> {entry.file_name} ({entry.formatting}, "
        f"{found.rows} rows{stage}){warnings}"
    )
    for line in found.lines():
        say(f"  {line}")


@command(
    "data.convert",
    example="inv data.convert export.csv",
    help={
        "file": "CSV or TSV table, or an export of ChatGPT, OpenAI, Label Studio or TRL",
        "replace": "overwrite an earlier conversion",
    },
)
def convert(session: Session, file: str, replace: bool = False) -> None:
    """Convert another tool's file to JSON Lines beside it."""
    from tunesmith.cli.console import say
    from tunesmith.core.formats import count
    from tunesmith.dataset import convert as converting

    path = session.project.find(file)
    conversion = converting.convert(path)
    say(f"{path}: {conversion.kind}, {count(len(conversion.rows))} rows")
    for what, number in conversion.changes:
        say(f"  {what} ({count(number)})")
    if session.dry:
        return
    made = converting.write(path, conversion, replace=replace)
    say(f"wrote {made}; next: inv data.check --file {made}")


@command(
    "data.split",
    example="inv data.split philosophy_conch --share 0.1",
    help={
        "dataset": "key of the data set to split",
        "dataset-dir": DATASET_DIR,
        "share": "part to hold out, e.g. 0.1",
        "seed": "another seed gives another split",
        "replace": "overwrite an earlier split",
    },
)
def split(
    session: Session,
    dataset: str,
    dataset_dir: str = "data",
    share: str = "0.1",
    seed: int = 42,
    replace: bool = False,
) -> None:
    """Hold out validation rows; similar rows stay together."""
    from tunesmith.cli.console import say
    from tunesmith.core.errors import UsageError
    from tunesmith.dataset import split as splitting
    from tunesmith.plan.build import tables_here

    project = session.project
    folder = project.find(dataset_dir)
    try:
        held_out = float(share)
    except ValueError:
        raise UsageError(
            f"--share {share!r} is not a number", hint="`--share 0.1`, for a tenth"
        ) from None
    made = splitting.split(
        folder,
        dataset,
        held_out,
        seed,
        replace_files=replace,
        tables=tables_here(project),
        dry=session.dry,
    )
    verb = "would write" if session.dry else "wrote" if made.changed else "unchanged"
    for part in (made.train, made.validation):
        say(f"{verb}: {part.entry.key} -> {part.file} ({part.rows} rows)")
    if made.joined:
        say(f"{made.joined} rows stay with a row they resemble")
    say("in the config, in place of val_size:")
    say(f"  dataset: {made.train.entry.key}")
    say(f"  eval_dataset: {made.validation.entry.key}")


@command(
    "data.preview",
    example="inv data.preview --config configs/train/deepseek_r1_1_5b_lora_sft.yaml --rows 1",
    help={
        "config": CONFIG,
        "rows": "number of rows",
        "first": "number of the first row",
        "mirror": MIRROR,
        "overrides": OVERRIDES,
    },
)
def preview(
    session: Session,
    config: str = TRAIN_CONFIG,
    rows: int = 3,
    first: int = 1,
    mirror: str = "default",
    overrides: list[str] | None = None,
) -> None:
    """Show rows as the model sees them, trained tokens marked."""
    from tunesmith.cli import data_preview

    words = tuple(overrides or ())
    data_preview.preview(session.project, config, words, rows=rows, first=first, mirror=mirror)
