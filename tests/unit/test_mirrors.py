"""configs/mirrors/: every shipped mirror loads, and nothing but safe addresses is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tunesmith.core.errors import UsageError
from tunesmith.core.mirrors import known_mirrors, load_mirror

pytestmark = pytest.mark.unit

GOOD: dict[str, Any] = {
    "hf_endpoints": ["https://hub.example/"],
    "pypi_indexes": ["https://pypi.example/simple"],
    "conda_channels": ["https://conda.example/conda-forge"],
    "miniforge_urls": ["https://miniforge.example"],
    "apt": [],
    "docker_registries": [],
}


def test_every_shipped_mirror_loads(root: Path) -> None:
    folder = root / "configs/mirrors"
    assert {"default", "cn"} <= set(known_mirrors(folder))
    mirrors = {name: load_mirror(name, folder) for name in known_mirrors(folder)}
    assert mirrors["default"].hf_endpoints == ("https://huggingface.co",)
    assert mirrors["cn"].hf_endpoints[0] == "https://hf-mirror.com"
    assert "https://mirrors.tuna.tsinghua.edu.cn/pypi/web/simple" in mirrors["cn"].pypi_indexes


def _load(tmp_path: Path, **changes: Any) -> Any:
    (tmp_path / "own.yml").write_text(yaml.dump(GOOD | changes))
    return load_mirror("own", tmp_path)


def test_a_mirror_of_ones_own(tmp_path: Path) -> None:
    mirror = _load(tmp_path, ca_bundle="/etc/ca.pem", http_proxy="http://proxy.example:3128")
    assert mirror.hf_endpoints == ("https://hub.example",), "the last slash is cut"
    assert mirror.ca_bundle == Path("/etc/ca.pem")
    assert mirror.http_proxy == "http://proxy.example:3128"


def test_plain_http_is_for_this_machine_only(tmp_path: Path) -> None:
    mirror = _load(tmp_path, hf_endpoints=["http://127.0.0.1:8080"])
    assert mirror.hf_endpoints == ("http://127.0.0.1:8080",)
    for url in ("http://hub.example", "http://127.0.0.1.evil.example", "http://localhost.example"):
        with pytest.raises(UsageError, match="not an https address"):
            _load(tmp_path, hf_endpoints=[url])


@pytest.mark.parametrize("name", ["nowhere", "../own", "", "own.yml"])
def test_an_unknown_name_lists_the_known(tmp_path: Path, name: str) -> None:
    (tmp_path / "own.yml").write_text(yaml.dump(GOOD))
    with pytest.raises(UsageError, match=r"unknown mirror .*known in .* are: own"):
        load_mirror(name, tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("hf_endpoint", ["https://x.example"], "unknown key `hf_endpoint`"),
        ("hf_endpoints", "https://x.example", "`hf_endpoints`: expected a list"),
        ("hf_endpoints", [], "`hf_endpoints` is empty"),
        ("hf_endpoints", [1], "`hf_endpoints`: expected a list"),
        ("pypi_indexes", ["ftp://x.example"], "not an https address"),
        ("pypi_indexes", ["https://"], "not an https address"),
        ("pypi_indexes", ["https://[x"], "not an https address"),
        ("pypi_indexes", ["https://x.example/?key=1"], "more than an address"),
        ("ca_bundle", "ca.pem", "`ca_bundle`: expected an absolute path"),
        ("http_proxy", "proxy:3128", "`http_proxy`: expected http://host:port"),
        ("http_proxy", 3, "`http_proxy`"),
    ],
)
def test_a_bad_value_is_refused_by_key(tmp_path: Path, key: str, value: Any, named: str) -> None:
    with pytest.raises(UsageError) as caught:
        _load(tmp_path, **{key: value})
    assert named in caught.value.message
    assert str(tmp_path / "own.yml") in caught.value.message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("http_proxy", "http://me:canary@proxy.example:3128"),
        ("hf_endpoints", ["https://me:canary@hub.example"]),
    ],
)
def test_a_secret_is_refused_and_not_repeated(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(UsageError, match="user name or password") as caught:
        _load(tmp_path, **{key: value})
    assert "canary" not in caught.value.render()


def test_a_mirror_may_be_given_by_its_file(tmp_path: Path, root: Path) -> None:
    (tmp_path / "office.yml").write_text(yaml.dump(GOOD))
    mirror = load_mirror(str(tmp_path / "office.yml"), root / "configs/mirrors")
    assert (mirror.name, mirror.hf_endpoints) == ("office", ("https://hub.example",))
    with pytest.raises(UsageError, match="unknown mirror") as caught:
        load_mirror(str(tmp_path / "nowhere.yml"), root / "configs/mirrors")
    assert caught.value.hint.endswith("ending in .yml")
