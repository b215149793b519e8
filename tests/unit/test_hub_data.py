"""Data sets that are fetched where they are trained: had, or refused with what to do instead."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tunesmith.core.errors import UsageError
from tunesmith.core.mirrors import Mirror
from tunesmith.dataset.entry import Entry
from tunesmith.plan import hub_data
from tunesmith.plan.build import check_data
from tunesmith.project import Project

pytestmark = pytest.mark.unit


def entry(**other: str) -> Entry:
    return Entry("d", other=other)


@pytest.fixture
def mirror(root: Path, tmp_path: Path) -> Mirror:
    return replace(Project(root, tmp_path).mirror("default"), http_proxy=None)


@pytest.mark.parametrize(
    ("other", "says", "hint"),
    [
        (
            {"script_url": "x.py"},
            "is script_url x.py: a script that loads rows is code",
            "inv data",
        ),
        ({"cloud_file_name": "s3://b/x.json"}, "no s3fs", "inv data.register"),
        ({"om_hub_url": "o/s"}, "no openmind", "inv data.register"),
        ({"ms_hub_url": "o/s"}, "modelscope needs addict", "`inv stack.install --with modelscope`"),
    ],
)
def test_what_the_environment_cannot_fetch_is_refused(
    other: dict[str, str], says: str, hint: str
) -> None:
    with pytest.raises(UsageError) as refused:
        hub_data.check([entry(**other)], ("modelscope",))
    assert says in refused.value.message
    assert hint in refused.value.hint


def test_what_it_can_fetch_is_taken() -> None:
    hub_data.check([entry(hf_hub_url="o/s")], ())
    hub_data.check([entry(ms_hub_url="o/s")], ("modelscope", "addict"))
    # LLaMA-Factory takes the first of the two, unless USE_MODELSCOPE_HUB says otherwise.
    hub_data.check([entry(hf_hub_url="o/s", ms_hub_url="o/s")], ())
    with pytest.raises(UsageError) as refused:
        hub_data.check([entry(ms_hub_url="o/s")], (), "gpu1")
    assert refused.value.hint == "`inv provision --on gpu1 --with modelscope`"


def test_the_endpoint_that_answers_is_taken(mirror: Mirror) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # taken, and nobody listens
        there, gone = (f"http://127.0.0.1:{s.getsockname()[1]}" for s in (server, closed))
        two = replace(mirror, hf_endpoints=(gone, there))
        found = hub_data.environment([entry(hf_hub_url="o/s")], two)
        assert found == {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": there}
        with pytest.raises(
            UsageError, match=r"no hub can be reached: .*no connection to"
        ) as refused:
            hub_data.environment([entry(hf_hub_url="o/s")], replace(mirror, hf_endpoints=(gone,)))
        assert "--mirror cn" in refused.value.hint


def test_without_such_a_set_nothing_is_fetched_behind_our_back(mirror: Mirror) -> None:
    assert hub_data.environment([], mirror) == {"HF_HUB_OFFLINE": "1"}


def test_names_of_a_hub_need_no_registry(tmp_path: Path) -> None:
    registry: dict[str, Any] = {"h": {"hf_hub_url": "o/s"}, "f": {"file_name": "f.json"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(registry))
    values = {"dataset": "f,h", "dataset_dir": str(tmp_path)}
    assert [one.key for one in hub_data.remote_entries(values)] == ["h"]
    for folder in ("ONLINE", "REMOTE:owner/repo"):
        named = {"dataset": "owner/set", "dataset_dir": folder}
        assert [one.key for one in hub_data.remote_entries(named)] == ["owner/set"]
        (report,) = check_data(named)
        assert report.rows is None
