"""configs/mirrors/NAME.yml as frozen values. Standard library and PyYAML, Python 3.10.

A mirror defines where bytes come from, never what is installed: pins and hashes apply to all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import yaml

from tunesmith.core.errors import UsageError

_NAME = re.compile(r"^[a-z0-9][a-z0-9_-]*$")
_LISTS = (
    "hf_endpoints",
    "pypi_indexes",
    "conda_channels",
    "miniforge_urls",
    "apt",
    "docker_registries",
)
_NEVER_EMPTY = ("hf_endpoints", "pypi_indexes", "conda_channels", "miniforge_urls")


@dataclass(frozen=True)
class Mirror:
    """Addresses without trailing slash, each list in the order of attempts.

    `ca_bundle` is a PEM file that replaces the system's certificate authorities;
    `http_proxy` is used for http and https.
    """

    name: str
    hf_endpoints: tuple[str, ...]
    pypi_indexes: tuple[str, ...]
    conda_channels: tuple[str, ...]
    miniforge_urls: tuple[str, ...]
    apt: tuple[str, ...]
    docker_registries: tuple[str, ...]
    ca_bundle: Path | None = None
    http_proxy: str | None = None


def known_mirrors(folder: Path) -> tuple[str, ...]:
    """Return the names `--mirror` accepts."""
    return tuple(sorted(path.stem for path in folder.glob("*.yml")))


def mirror_file(name: str, folder: Path) -> Path:
    """Return the file that describes a mirror. Raises UsageError when there is none."""
    path = Path(name).expanduser().absolute() if name.endswith(".yml") else folder / f"{name}.yml"
    if not path.is_file() or not (name.endswith(".yml") or _NAME.match(name)):
        names = ", ".join(known_mirrors(folder)) or "none"
        raise UsageError(
            f"unknown mirror {name!r}; known in {folder} are: {names}",
            hint="use one of these, or the path of your own file, ending in .yml",
        )
    return path


def load_mirror(name: str, folder: Path) -> Mirror:
    """Return the mirror `folder`/`name`.yml, or of a file whose path ends in .yml.

    Raises UsageError for an unknown name (the message lists the known ones), an unknown key, an
    address that is not https (plain http is only for 127.0.0.1), or an address with a secret.
    """
    path = mirror_file(name, folder)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UsageError(f"{path}: expected keys, found {type(raw).__name__}")
    for key in raw:
        if key not in (*_LISTS, "ca_bundle", "http_proxy"):
            keys = ", ".join((*_LISTS, "ca_bundle", "http_proxy"))
            raise UsageError(f"{path}: unknown key `{key}`; known are: {keys}")
    lists = {key: _urls(path, key, raw.get(key)) for key in _LISTS}
    return Mirror(
        name=path.stem,
        **lists,
        ca_bundle=_bundle(path, raw.get("ca_bundle")),
        http_proxy=_proxy(path, raw.get("http_proxy")),
    )


def _urls(path: Path, key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UsageError(f"{path}: `{key}`: expected a list of URLs, found {value!r}")
    if key in _NEVER_EMPTY and not value:
        raise UsageError(f"{path}: `{key}` is empty", hint="list at least one URL")
    return tuple(_https(path, key, item) for item in value)


def _https(path: Path, key: str, url: str) -> str:
    parts = _split(url)
    if "@" in parts.netloc:
        # The message must not repeat the secret.
        raise UsageError(f"{path}: `{key}`: {_bare(url)} contains a user name or password")
    local = parts.scheme == "http" and parts.hostname == "127.0.0.1"
    if (parts.scheme != "https" and not local) or not parts.hostname:
        raise UsageError(f"{path}: `{key}`: {url!r} is not an https address")
    if parts.query or parts.fragment:
        raise UsageError(f"{path}: `{key}`: {url!r} contains more than an address")
    return url.rstrip("/")


def _bundle(path: Path, value: Any) -> Path | None:
    if value is None:
        return None
    if not isinstance(value, str) or not Path(value).is_absolute():
        raise UsageError(f"{path}: `ca_bundle`: expected an absolute path, found {value!r}")
    return Path(value)


def _proxy(path: Path, value: Any) -> str | None:
    if value is None:
        return None
    parts = _split(value)
    if "@" in parts.netloc:
        raise UsageError(
            f"{path}: `http_proxy`: {_bare(value)} contains a user name or password",
            hint="set HTTPS_PROXY in your own environment instead; secrets do not belong in "
            "a config file",
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"{path}: `http_proxy`: expected http://host:port, found {value!r}")
    return str(value).rstrip("/")


def _split(url: Any) -> SplitResult:
    try:
        return urlsplit(url if isinstance(url, str) else "")
    except ValueError:
        return urlsplit("")


def _bare(url: str) -> str:
    parts = _split(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
