"""huggingface_hub: small chunks survive broken connections; headers used as names are checked."""

from __future__ import annotations

import re
from typing import Any

from tunesmith.core.patching import Patch, PrivateName

_VERSIONS = "huggingface-hub==0.36.*"
_ETAG = re.compile(r"^[0-9A-Za-z-]{1,128}$")


class HeaderError(Exception):
    """The endpoint's answer must not be used."""


SMALL_CHUNKS = Patch(
    target="huggingface_hub.constants:DOWNLOAD_CHUNK_SIZE",
    caller="huggingface_hub.file_download:http_get",
    versions=_VERSIONS,
    why="only complete chunks survive a broken connection, and its own of 10 MiB never succeed if "
    "it breaks more often",
    removal="the chunk size is an argument of hf_hub_download",
    make=lambda _size, chunk: chunk,
)


def _judged(ask: Any, commit: str) -> Any:
    def get_hf_file_metadata(*args: Any, **kwargs: Any) -> Any:
        metadata = ask(*args, **kwargs)
        if metadata.etag is None or not _ETAG.match(metadata.etag):
            raise HeaderError(f"sends the ETag {metadata.etag!r}, which is no file name")
        if metadata.commit_hash != commit:
            raise HeaderError(f"sends commit {metadata.commit_hash!r} when asked for {commit}")
        return metadata

    return get_hf_file_metadata


JUDGED_METADATA = Patch(
    target="huggingface_hub.file_download:get_hf_file_metadata",
    caller="huggingface_hub.file_download:_get_metadata_or_catch_error",
    versions=_VERSIONS,
    why="file names in the cache are made from the headers ETag and X-Repo-Commit, whatever a "
    "mirror writes into them",
    removal="huggingface_hub refuses an ETag or a commit that is not a plain name",
    make=_judged,
)

PATCHES = (SMALL_CHUNKS, JUDGED_METADATA)
PRIVATE: tuple[PrivateName, ...] = ()
