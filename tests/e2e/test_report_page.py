"""The page as a browser shows it: wide, dark and on a telephone."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from tests.unit.run_folder import answers, build_run
from tunesmith.report.compare import write_comparison
from tunesmith.report.page import write_report

pytestmark = pytest.mark.e2e

# The same page in a frame of a telephone's width: a headless window is never narrower than
# 500 px. The measuring script stands in the outer page; the report's own policy forbids any.
MEASURE = """<!doctype html><body><iframe style="border:0;width:{width}px;height:900px"
srcdoc="{page}"></iframe><script>
document.querySelector('iframe').onload = event => {{
  const page = event.target.contentDocument, root = page.documentElement;
  const shown = selector => [...page.querySelectorAll(selector)].filter(
    item => item.getClientRects().length && getComputedStyle(item).visibility !== 'hidden');
  const wide = shown('body *').filter(
    item => !item.closest('svg, thead') && item.getBoundingClientRect().right > {width} + 0.5);
  document.body.dataset.found = JSON.stringify({{
    scroll: root.scrollWidth, client: root.clientWidth,
    svg: shown('figure svg').map(item => Math.round(item.getBoundingClientRect().width)),
    points: shown('figure svg use').length,
    rows: shown('.answers tbody tr').length,
    headings: shown('.answers thead').map(item => item.getBoundingClientRect().width),
    beyond: wide.map(item => item.tagName + ': ' + item.textContent.trim().slice(0, 40)),
  }});
}};
</script></body>"""


@pytest.fixture(scope="session")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        reason = "chromium is not installed: `apt-get install -y chromium fonts-noto-cjk`"
        if os.environ.get("TUNESMITH_REQUIRE_ALL") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(build_run(tmp_path_factory.mktemp("runs")))


def browse(chromium: str, tmp_path: Path, page: Path, *flags: str) -> str:
    """Load a page in a fresh headless browser and return what it printed."""
    argv = [
        chromium,
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *(
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            f"--user-data-dir={tmp_path / 'profile'}",
        ),
        *flags,
        page.as_uri(),
    ]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def measure(chromium: str, tmp_path: Path, page: Path, width: int) -> dict[str, Any]:
    outer = tmp_path / "outer.html"
    source = html.escape(page.read_text(encoding="utf-8"), quote=True)
    outer.write_text(MEASURE.format(width=width, page=source), encoding="utf-8")
    dom = browse(chromium, tmp_path, outer, "--window-size=1300,900", "--dump-dom")
    match = re.search(r'<body data-found="([^"]*)"', dom)
    assert match, "the page did not load"
    found: dict[str, Any] = json.loads(html.unescape(match[1]))
    return found


def test_dom_holds_curve_and_table(chromium: str, tmp_path: Path, page: Path) -> None:
    dom = browse(chromium, tmp_path, page, "--dump-dom")

    assert dom.count("<svg") == 2  # wide and narrow; one of them is shown
    for row in answers(tuned=True):
        assert row["prompt"] in dom
        assert html.escape(row["answer"], quote=False) in dom


@pytest.mark.parametrize("width", [390, 1100])
def test_curve_and_table_are_shown_and_fit(
    chromium: str, tmp_path: Path, page: Path, width: int
) -> None:
    found = measure(chromium, tmp_path, page, width)

    assert found["beyond"] == []
    assert found["scroll"] <= found["client"] == width
    assert len(found["svg"]) == 1
    assert found["svg"][0] > width * 0.8
    assert found["points"] > 100
    assert found["rows"] == len(answers(tuned=True))


def test_a_narrow_table_turns_into_cards(chromium: str, tmp_path: Path, page: Path) -> None:
    wide, narrow = (measure(chromium, tmp_path, page, width) for width in (1100, 390))

    assert min(wide["headings"]) > 500
    assert max(narrow["headings"]) <= 1  # read aloud, not shown


def test_long_words_do_not_widen_the_page(chromium: str, tmp_path: Path) -> None:
    run = build_run(tmp_path)
    rows = [row | {"answer": "x" * 3000, "prompt": "y" * 300} for row in answers(tuned=True)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "after.jsonl").write_text(text, encoding="utf-8")

    assert measure(chromium, tmp_path, write_report(run), 390)["beyond"] == []


@pytest.mark.parametrize("dark", [False, True])
def test_screenshot_is_not_blank_in_either_theme(
    chromium: str, tmp_path: Path, page: Path, dark: bool
) -> None:
    picture = tmp_path / "page.png"
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    browse(chromium, tmp_path, page, "--window-size=1100,1400", scheme, f"--screenshot={picture}")
    grey = imread(picture)[..., :3].mean(axis=2)
    paper = float(grey[2, 2])

    assert grey.shape == (1400, 1100)
    assert (paper < 0.2) if dark else (paper > 0.9)
    # Ink in the heading, in the verdict row, in the curve: no part of the page is empty.
    for top, bottom in ((40, 200), (250, 420), (500, 1000)):
        assert (abs(grey[top:bottom] - paper) > 0.3).mean() > 0.002


@pytest.mark.parametrize("width", [390, 1100])
def test_a_comparison_fits_too(chromium: str, tmp_path: Path, width: int) -> None:
    runs = [build_run(tmp_path / name) for name in ("a", "b", "c")]
    found = measure(chromium, tmp_path, write_comparison(runs, tmp_path / "page.html"), width)

    assert found["beyond"] == []
    assert found["scroll"] <= found["client"] == width
    assert len(found["svg"]) == 1
