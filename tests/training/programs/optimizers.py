"""Trains a tiny model for three steps with each setting: optimizers.py MODEL DATA FOLDER SETTINGS.

SETTINGS is JSON: by name, keys laid over a full training. Prints for each name whether the
weights were changed. In a process of its own: GaLore and others patch what they meet.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from llamafactory.train.tuner import run_exp
from safetensors.torch import load_file

BASE = {
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "full",
    "dataset": "rows",
    "template": "smollm",
    "cutoff_len": 64,
    "max_samples": 6,
    "max_steps": 3,
    "per_device_train_batch_size": 1,
    "learning_rate": 1.0e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}


def main(model: Path, data: Path, folder: Path, settings: dict[str, dict[str, object]]) -> None:
    """Train once for each of the settings; raises where one does not work."""
    before = load_file(model / "model.safetensors")
    changed = {}
    for name, own in settings.items():
        output = folder / name
        places = {"model_name_or_path": str(model), "dataset_dir": str(data)}
        run_exp({**BASE, **places, "output_dir": str(output), **own})
        after = load_file(output / "model.safetensors")
        changed[name] = any(not after[key].equal(before[key]) for key in after)
    print(json.dumps(changed))


if __name__ == "__main__":
    model_folder, data_folder, output_folder = map(Path, sys.argv[1:4])
    main(model_folder, data_folder, output_folder, json.loads(sys.argv[4]))
