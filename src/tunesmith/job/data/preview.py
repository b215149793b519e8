"""`python -m tunesmith.job.data.preview REQUEST RESULT`: rows as the model will see them.

REQUEST is {"config": train config with absolute paths, "rows": how many, "first": number of
the first, from 1}. RESULT holds, for each row, pieces of text in their order, and for each
piece whether its tokens are trained, by LLaMA-Factory 0.9.3's own labels.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.core.errors import UsageError
from tunesmith.core.files import read_json, write_json
from tunesmith.job.data.replay import IGNORED, Loaded


def preview(config: Mapping[str, Any], rows: int, first: int, scratch: str) -> list[dict[str, Any]]:
    """Return the rows from number `first` on, those that are dropped included."""
    import datasets

    datasets.disable_progress_bars()
    loaded = Loaded.of(config, scratch)
    if loaded.stage != "sft":
        raise UsageError(f"stage {loaded.stage} has no questions and answers to show")
    names = str(config.get("dataset") or "").split(",")
    shown: list[dict[str, Any]] = []
    passed = 0
    for name, table in loaded.rows([name.strip() for name in names]).items():
        for place in range(max(first - 1 - passed, 0), len(table)):
            if len(shown) == rows:
                return shown
            shown.append({"dataset": name, "row": place + 1, **_shown(loaded, table[place])})
        passed += len(table)
    if not shown:
        raise UsageError(f"there is no row {first}; the data has {passed} rows")
    return shown


def _shown(loaded: Loaded, row: Mapping[str, Any]) -> dict[str, Any]:
    if len(row["_prompt"]) % 2 != 1 or len(row["_response"]) != 1:
        return {"pieces": [], "tokens": 0, "trained": 0, "cut": 0, "dropped": True}
    ids, labels, pairs = loaded.encode(row)
    pieces = []
    for trained, group in itertools.groupby(
        zip(ids, labels, strict=True), lambda item: item[1] != IGNORED
    ):
        tokens = [token for token, _ in group]
        text = loaded.codec.tokenizer.decode(
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        pieces.append({"text": text, "trained": trained, "tokens": len(tokens)})
    full = sum(len(source) + len(target) for source, target in pairs)
    full += 1 if loaded.codec.template.efficient_eos else 0
    trained_tokens = sum(label != IGNORED for label in labels)
    return {
        "pieces": pieces,
        "tokens": len(ids),
        "trained": trained_tokens,
        "cut": full - len(ids),
        "dropped": False,
    }


def main(request: Path, result: Path) -> int:
    """Render the rows and write the result; a refusal goes there as {"error"}."""
    asked = read_json(request)
    found: dict[str, Any]
    with tempfile.TemporaryDirectory(prefix="tunesmith-preview-") as scratch:
        try:
            rows, first = int(asked["rows"]), int(asked.get("first", 1))
            found = {"rows": preview(asked["config"], rows, first, scratch)}
        except UsageError as error:
            found = {"error": error.message}
    write_json(result, found)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
