"""datasets: columns are made once, and files of this machine are read without more ado."""

from __future__ import annotations

from typing import Any

from tunesmith.core.patching import Patch, PrivateName

_VERSIONS = "datasets==3.6.*"


def _remember_type(make: Any) -> Any:
    def arrow_array(self: Any, type: Any = None) -> Any:
        made = make(self, type)
        self.made_type = made.type
        return made

    return arrow_array


REMEMBER_TYPE = Patch(
    target="datasets.arrow_writer:TypedSequence.__arrow_array__",
    caller="",
    versions=_VERSIONS,
    # pyarrow calls it by protocol.
    why="the type of a column is asked of the column that was made (INFER_TYPE_ONCE)",
    removal="INFER_TYPE_ONCE can go",
    make=_remember_type,
)


def _infer_once(usual: Any) -> Any:
    from datasets.arrow_writer import generate_from_arrow_type

    def get_inferred_type(self: Any) -> Any:
        made = getattr(self, "made_type", None)
        if self._inferred_type is None and made is not None:
            self._inferred_type = generate_from_arrow_type(made)
        return usual(self)

    return get_inferred_type


INFER_TYPE_ONCE = Patch(
    target="datasets.arrow_writer:TypedSequence.get_inferred_type",
    caller="datasets.arrow_writer:ArrowWriter.write_batch",
    versions=_VERSIONS,
    why="each column of a batch is made a second time to see its type",
    removal="TypedSequence keeps the type of what it has made",
    make=_infer_once,
)


def _read_as_file(kind: str) -> Patch:
    return Patch(
        target=f"datasets.packaged_modules.{kind}.{kind}:_patched_for_streaming",
        caller="datasets.streaming:extend_module_for_streaming",
        versions=_VERSIONS,
        why="each kind of file is made ready to be read over the network, with scipy's readers: "
        "a sixth of the time that preparing a thousand rows takes. This is the library's own mark "
        "of a module that is ready",
        removal="local files are read without it",
        make=lambda _mark: True,
        absent=True,
    )


READ_AS_FILES = tuple(_read_as_file(kind) for kind in ("arrow", "csv", "json", "parquet", "text"))

PATCHES = (REMEMBER_TYPE, INFER_TYPE_ONCE, *READ_AS_FILES)
PRIVATE: tuple[PrivateName, ...] = ()
