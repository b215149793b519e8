"""Where things lie: the repository, and .tunesmith/ beside it."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tunesmith.basemodel.catalogue import BaseModel, load_models
from tunesmith.core.errors import UsageError
from tunesmith.core.files import private_folder, read_json
from tunesmith.core.mirrors import Mirror, load_mirror
from tunesmith.core.names import ENVIRONMENT_MARKER
from tunesmith.job.run import foreign, listing
from tunesmith.job.run.stored import DamagedError
from tunesmith.stack.definition import Stack, load_stack
from tunesmith.stack.environment import Environment


@dataclass(frozen=True)
class Project:
    """A clone of the repository and the folder that holds what is made in it.

    `root` has tasks.py and configs/; `home` (TUNESMITH_HOME, default root/.tunesmith)
    has environments, base models and runs.
    """

    root: Path
    home: Path

    @classmethod
    def at(cls, root: Path) -> Project:
        """Return the project of a repository root."""
        home = os.environ.get("TUNESMITH_HOME")
        return cls(root, Path(home).expanduser().resolve() if home else root / ".tunesmith")

    def folder(self, *names: str) -> Path:
        """Return a folder below `home`, made where it is not there.

        `home` is its owner's alone, whatever it was before: data, weights and keys lie in it, and
        many people may have an account on a lab's machine.
        """
        return private_folder(private_folder(self.home).joinpath(*names))

    @functools.cached_property
    def stack(self) -> Stack:
        """configs/stack.yml."""
        return load_stack(self.root / "configs" / "stack.yml")

    @functools.cached_property
    def base_models(self) -> Mapping[str, BaseModel]:
        """configs/models.yml: the known base models by name."""
        return load_models(self.root / "configs" / "models.yml")

    @property
    def mirrors(self) -> Path:
        """The folder of mirror profiles."""
        return self.root / "configs" / "mirrors"

    def mirror(self, name: str) -> Mirror:
        """Return a mirror profile, by name or by the path of a file of one's own.

        Raises UsageError as `load_mirror` does.
        """
        return load_mirror(name, self.mirrors)

    @property
    def runs(self) -> Path:
        """The folder of run folders."""
        return self.home / "runs"

    @property
    def models(self) -> Path:
        """Base models that did not come through the hub's cache, and what was verified."""
        return self.home / "models"

    @property
    def inventory(self) -> Path:
        """The hosts this clone knows (TUNESMITH_INVENTORY, default ansible/inventory/)."""
        own = os.environ.get("TUNESMITH_INVENTORY")
        return Path(own).expanduser() if own else self.root / "ansible" / "inventory"

    @property
    def hf_home(self) -> Path:
        """Cache of huggingface_hub: the user's HF_HOME, or our own."""
        own = os.environ.get("HF_HOME")
        return Path(own).expanduser().absolute() if own else self.home / "huggingface"

    def environment(self, flavour: str | None = None) -> Environment:
        """Return the local training environment of a flavour, installed or not.

        In the image it is the one that TUNESMITH_ENVIRONMENT names, of the flavour it was
        made from. Raises UsageError when another flavour is asked for there.
        """
        if own := os.environ.get("TUNESMITH_ENVIRONMENT"):
            made = str(read_json(Path(own) / ENVIRONMENT_MARKER)["flavour"])
            if flavour not in (None, made):
                raise UsageError(f"flavour {flavour!r} is not in this image, which has {made}")
            return Environment(Path(own), self.stack.flavour(made))
        chosen = self.stack.flavour(flavour)
        return Environment(self.home / "envs" / chosen.name, chosen)

    def find(self, path: str | Path) -> Path:
        """Return `path` made absolute: as given, else below the repository root."""
        given = Path(path).expanduser()
        if given.is_absolute() or given.exists():
            return given.absolute()
        return self.root / given

    def run_folder(self, run_id: str | None) -> Path:
        """Return the folder of a run, by default the newest one's.

        Raises UsageError when there is none of this name, or when it is no run id.
        """
        run = listing.find(self.runs, run_id)
        with contextlib.suppress(DamagedError):  # whoever reads the file says so
            foreign.ensure(run)
        return run.path
