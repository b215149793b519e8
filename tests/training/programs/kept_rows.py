"""What LLaMA-Factory keeps of each registered data set: kept_rows.py FOLDER.

Writes to FOLDER/found.json: for each key the rows kept, or why LLaMA-Factory stopped; and what
`python -m tunesmith.job.data.tables` says of each file that is no JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

from llamafactory.data.loader import _get_merged_dataset

from tunesmith.job.data.tables import lines

_TABLES = (".csv", ".parquet", ".arrow", ".txt")


def main(folder: Path) -> None:
    """Ask LLaMA-Factory about all of them, in one process."""
    model = SimpleNamespace(
        cache_dir=str(folder / "cache"), hf_hub_token=None, trust_remote_code=False
    )
    training = SimpleNamespace(seed=1, local_process_index=0, dataloader_num_workers=0)
    data = SimpleNamespace(
        dataset_dir=str(folder),
        media_dir=str(folder),
        max_samples=None,
        streaming=False,
        preprocessing_num_workers=None,
        overwrite_cache=True,
        mix_strategy="concat",
    )
    found: dict[str, tuple[int, str | None]] = {}
    tables: dict[str, list[str]] = {}
    registry = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
    for key, entry in registry.items():
        try:
            rows = _get_merged_dataset([key], model, data, training, "sft")
            # SupervisedDatasetProcessor.preprocess_dataset drops the others.
            kept = sum(len(r["_prompt"]) % 2 == 1 and len(r["_response"]) == 1 for r in rows)
            found[key] = kept, None
        except Exception as error:  # noqa: BLE001  whatever it is, the training would end by it
            found[key] = 0, type(error).__name__
        path = folder / entry["file_name"]
        if path.suffix in _TABLES:
            tables[str(path)] = list(lines([str(path)]))
    (folder / "found.json").write_text(json.dumps([found, tables]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
