"""datasets: columns are created once, and local files are read directly."""

from __future__ import annotations

from typing import Any

from tunesmith.core.patching import Patch, PrivateName

_VERSIONS = "datasets==3.6.*"


def _remember_type(make: Any) -> Any:
    def arrow_array(self: Any, type: Any = None) -> Any:
        array = make(self, type)
        self.stored_type = array.type
        return array

    return arrow_array


REMEMBER_TYPE = Patch(
    target="datasets.arrow_writer:TypedSequence.__arrow_array__",
    caller="",
    versions=_VERSIONS,
    # pyarrow calls it through its protocol.
    why="the type of a column is taken from the created column (INFER_TYPE_ONCE)",
    removal="INFER_TYPE_ONCE can be removed",
    make=_remember_type,
)


def _infer_once(usual: Any) -> Any:
    from datasets.arrow_writer import generate_from_arrow_type

    def get_inferred_type(self: Any) -> Any:
        stored = getattr(self, "stored_type", None)
        if self._inferred_type is None and stored is not None:
            self._inferred_type = generate_from_arrow_type(stored)
        return usual(self)

    return get_inferred_type


INFER_TYPE_ONCE = Patch(
    target="datasets.arrow_writer:TypedSequence.get_inferred_type",
    caller="datasets.arrow_writer:ArrowWriter.write_batch",
    versions=_VERSIONS,
    why="each column of a batch is created a second time to infer its type",
    removal="TypedSequence stores the type of the created column",
    make=_infer_once,
)


def _read_as_file(kind: str) -> Patch:
    return Patch(
        target=f"datasets.packaged_modules.{kind}.{kind}:_patched_for_streaming",
        caller="datasets.streaming:extend_module_for_streaming",
        versions=_VERSIONS,
        why="each file type is prepared for reading over the network, with scipy's readers: a "
        "sixth of the time of preparing a thousand rows. This is the library's own mark of a "
        "prepared module",
        removal="local files are read without it",
        make=lambda _mark: True,
        absent=True,
    )


READ_AS_FILES = tuple(_read_as_file(kind) for kind in ("arrow", "csv", "json", "parquet", "text"))

PATCHES = (REMEMBER_TYPE, INFER_TYPE_ONCE, *READ_AS_FILES)
PRIVATE: tuple[PrivateName, ...] = ()
