"""`python -m tunesmith.job.data.preview REQUEST RESULT`: rows as the model will see them.

REQUEST is {"config": train config with absolute paths, "rows": how many, "first": number of
the first, from 1}. RESULT holds, for each row, pieces of text in their order, and for each
piece whether its tokens are trained, by LLaMA-Factory 0.9.3's own labels.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tunesmith.core.documents import AlignedRow, Config
from tunesmith.core.errors import UsageError
from tunesmith.core.files import read_json, write_json
from tunesmith.job.data.rows import IGNORED, DataPipeline


@dataclass(frozen=True)
class Piece:
    """Text of neighbouring tokens that are all trained, or all not."""

    text: str
    trained: bool
    tokens: int


@dataclass(frozen=True)
class PreviewRow:
    """A row as the model sees it; counts are tokens."""

    dataset: str
    row: int  # from 1
    pieces: tuple[Piece, ...] = ()
    tokens: int = 0
    trained: int = 0
    cut: int = 0  # beyond cutoff_len, left out
    dropped: bool = False


def preview(config: Config, rows: int, first: int, scratch: str) -> list[PreviewRow]:
    """Return the rows from number `first` on, those that are dropped included."""
    import datasets

    datasets.disable_progress_bars()
    pipeline = DataPipeline.of(config, scratch)
    if pipeline.stage != "sft":
        raise UsageError(f"stage {pipeline.stage} has no questions and answers to show")
    names = str(config.get("dataset") or "").split(",")
    shown: list[PreviewRow] = []
    passed = 0
    for name, table in pipeline.rows([name.strip() for name in names]).items():
        for place in range(max(first - 1 - passed, 0), len(table)):
            if len(shown) == rows:
                return shown
            shown.append(_shown(pipeline, table[place], PreviewRow(name, place + 1)))
        passed += len(table)
    if not shown:
        raise UsageError(f"there is no row {first}; the data has {passed} rows")
    return shown


def _shown(pipeline: DataPipeline, row: AlignedRow, empty: PreviewRow) -> PreviewRow:
    if len(row["_prompt"]) % 2 != 1 or len(row["_response"]) != 1:
        return replace(empty, dropped=True)
    ids, labels, pairs = pipeline.encode(row)
    pieces = []
    for trained, group in itertools.groupby(
        zip(ids, labels, strict=True), lambda item: item[1] != IGNORED
    ):
        tokens = [token for token, _ in group]
        text = pipeline.codec.tokenizer.decode(
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        pieces.append(Piece(text, trained, len(tokens)))
    full = sum(len(source) + len(target) for source, target in pairs)
    full += 1 if pipeline.codec.template.efficient_eos else 0
    return replace(
        empty,
        pieces=tuple(pieces),
        tokens=len(ids),
        trained=sum(label != IGNORED for label in labels),
        cut=full - len(ids),
    )


def main(request: Path, result: Path) -> int:
    """Render the rows and write the result; a refusal goes there as {"error"}."""
    options = read_json(request)
    answer: dict[str, object]
    with tempfile.TemporaryDirectory(prefix="tunesmith-preview-") as scratch:
        try:
            rows, first = int(options["rows"]), int(options.get("first", 1))
            shown = preview(options["config"], rows, first, scratch)
            answer = {"rows": [asdict(row) for row in shown]}
        except UsageError as error:
            answer = {"error": error.line}
    write_json(result, answer)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
