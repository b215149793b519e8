"""The process that talks to a hub: the only module that imports huggingface_hub.

It is a separate process because huggingface_hub reads endpoint, token, Xet and timeouts from the
environment at import (an HF_ENDPOINT set later is ignored), and because a hanging transfer can be
ended only from outside. `tunesmith.basemodel.endpoint` starts it with an environment for one
endpoint.

Protocol, one JSON object per line: stdin gets the request; stdout answers {"listing"}; stdin gets
{"files"}; stdout reports {"file"} for each and {"done"}; and so on until stdin ends. Or {"error"},
exit code 1.
"""

from __future__ import annotations

import errno
import json
import re
import sys

import requests
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tunesmith.basemodel.endpoint import OFFICIAL
from tunesmith.basemodel.hub_patches import JUDGED_METADATA, SMALL_CHUNKS, HeaderError
from tunesmith.core.documents import JsonObject
from tunesmith.core.patching import install

# Only complete chunks survive a broken connection; huggingface_hub's 10 MiB never succeed on a
# connection that breaks more often.
_CHUNK = 1 << 18

_COMMIT = re.compile(r"^[0-9a-f]{40}$")


def main() -> int:
    """Serve one request; return the exit code."""
    request = json.loads(sys.stdin.readline())
    try:
        _serve(request)
    except (requests.RequestException, OSError, ValueError, HeaderError) as error:
        # huggingface_hub's own errors all belong to these classes.
        _say({"error": _explain(error, request["name"], bool(request["token"]))})
        return 1
    return 0


def _serve(request: JsonObject) -> None:
    install(SMALL_CHUNKS, _CHUNK)
    endpoint, name = request["endpoint"], request["name"]
    # False, not None: with None it would look for a token.
    token = request["token"] or False
    info = HfApi(endpoint=endpoint, token=token).model_info(
        name,
        revision=request["revision"],
        files_metadata=True,
        timeout=request["timeout"],
    )
    commit = info.sha
    if commit is None or not _COMMIT.match(commit):
        raise HeaderError(f"names no commit, but {commit!r}")
    files = [
        {
            "name": file.rfilename,
            "size": file.lfs.size if file.lfs else file.size,
            "sha256": file.lfs.sha256 if file.lfs else None,
            "blob_id": file.blob_id,
        }
        for file in info.siblings or ()
    ]
    _say({"listing": {"commit": commit, "files": files}})
    install(JUDGED_METADATA, commit)
    for line in sys.stdin:
        for file in json.loads(line)["files"]:
            hf_hub_download(
                name,
                file,
                revision=commit,
                endpoint=endpoint,
                token=token,
                cache_dir=request["cache"],
            )
            _say({"file": file})
        _say({"done": True})


def _explain(error: Exception, name: str, token: bool) -> JsonObject:
    """Return {kind, text, retry, after}: what happened, in plain words, and what helps."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        # huggingface_hub reports "check your connection" for all of these; the cause knows better.
        error = error.__cause__
    response = getattr(error, "response", None)
    status = response.status_code if response is not None else None
    if status is not None:
        after = response.headers.get("Retry-After", "") if response is not None else ""
        return _of_status(error, status, after, name, token)
    kind, text, retry = _of_transport(error)
    return {"kind": kind, "text": text, "retry": retry, "after": None}


def _of_status(error: Exception, status: int, after: str, name: str, token: bool) -> JsonObject:
    retry = False
    if isinstance(error, GatedRepoError):
        kind = "gated"
        text = (
            f"the model is gated ({status}): accept its licence on {OFFICIAL}/{name}, then set "
            "HF_TOKEN to a token of that account"
            if not token
            else f"the model is gated ({status}), and the account of HF_TOKEN has no access yet: "
            f"accept its licence on {OFFICIAL}/{name}"
        )
    elif status == 401 and token:
        kind, text = "token", "the token is not accepted for this model (401): renew HF_TOKEN"
    elif status == 401:
        kind = "token"
        text = (
            "a token is asked for (401): the model is private or gated, or there is none of this "
            "name; set HF_TOKEN if you have access"
        )
    elif isinstance(error, RevisionNotFoundError):
        kind, text = "no_model", "the model has no such revision (404)"
    elif isinstance(error, RepositoryNotFoundError):
        kind, text = "no_model", "there is no model of this name (404)"
    elif isinstance(error, EntryNotFoundError):
        kind, text = "broken", f"a file it lists is not there ({status})"
    elif status == 404:
        kind, text = "no_model", "there is no model or revision of this name (404)"
    elif status == 403:
        kind, text = "forbidden", "access is refused (403): no permission, or a blocked region"
    elif status == 429:
        kind, text, retry = "busy", "it is asked too often (429)", True
    elif status >= 500:
        kind, text, retry = "busy", f"it has trouble of its own ({status})", True
    elif status == 416:
        kind, text, retry = "cut", "it cannot continue a partial file (416)", True
    else:
        kind, text = "broken", f"it answers with status {status}"
    seconds = float(after) if after.isdigit() else None
    return {"kind": kind, "text": text, "retry": retry, "after": seconds}


def _of_transport(error: Exception) -> tuple[str, str, bool]:
    if isinstance(error, HeaderError):
        return "broken", f"it {error}", False
    if isinstance(error, requests.exceptions.SSLError):
        text = "its certificate is not trusted (a company's proxy? then set `ca_bundle`)"
        return "unreachable", text, False
    if isinstance(error, requests.exceptions.ProxyError):
        return "unreachable", "the proxy does not let us through", False
    if isinstance(error, requests.exceptions.JSONDecodeError):
        return "broken", "it answers, but not as a hub does (a login page?)", False
    if isinstance(error, requests.exceptions.Timeout):
        return "cut", "it did not answer in time", True
    if isinstance(error, requests.exceptions.RequestException):
        return "cut", "the connection was cut", True
    if isinstance(error, FileMetadataError):
        return (
            "broken",
            "it sends no commit, ETag or size: not a hub, or a mirror that is ill",
            False,
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "disk", "the disk is full", False
    if isinstance(error, OSError) and "Consistency check" in str(error):
        return "cut", "it sent a file of the wrong size", True
    first_line = (str(error).strip().splitlines() or [""])[0]
    return "broken", f"{type(error).__name__}: {first_line}", False


def _say(event: JsonObject) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
