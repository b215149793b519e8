"""The verbs of a clone, for `inv`: collected from the command table."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parent / "src"))

from tunesmith.cli import table
from tunesmith.core import isolated

# Programs are called by name: none is looked for in the folder that somebody stands in.
os.environ["PATH"] = isolated.programs(os.environ.get("PATH", os.defpath))
table.patch_invoke()
ns = table.namespace()
