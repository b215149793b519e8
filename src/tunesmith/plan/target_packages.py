"""The packages of a target's training environment, and how it gets one more."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Iterator

from tunesmith.plan.target import Target
from tunesmith.project import Project


class TargetPackages(Collection[str]):
    """Names of packages, as PyPI normalises them: of the lock, and of the extras there.

    A target is asked for its extras only when a package is wanted that the lock has not. Without
    a target it is the environment of this machine.
    """

    def __init__(self, project: Project, target: Target | None = None) -> None:
        self._stack = project.stack
        self._project = project
        self._target = target

    @functools.cached_property
    def _lock(self) -> frozenset[str]:
        return self._stack.flavour().packages

    @functools.cached_property
    def _extras(self) -> frozenset[str]:
        there = self._target.extras() if self._target else self._project.environment().extras
        known = [self._stack.extras[name] for name in there if name in self._stack.extras]
        return frozenset(itertools.chain.from_iterable(extra.packages for extra in known))

    def __contains__(self, package: object) -> bool:
        return package in self._lock or package in self._extras

    def __iter__(self) -> Iterator[str]:
        return iter(self._lock | self._extras)

    def __len__(self) -> int:
        return len(self._lock | self._extras)

    def remedy(self, package: str) -> str:
        """Return what brings a package, as a hint begins; "" where nothing does."""
        for extra in self._stack.extras.values():
            if package in extra.provides:
                if self._target:
                    return self._target.adding(extra.name)
                return f"run `inv stack.install --with {extra.name}`"
        return ""
