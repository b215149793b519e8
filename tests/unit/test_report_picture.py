"""The picture: a PNG anyone can read, an SVG that follows the page's theme."""

from __future__ import annotations

import re
import warnings
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib as mpl
import pytest
from matplotlib import font_manager
from matplotlib.image import imread

from support import lacking
from tests.unit.run_folder import events
from tunesmith.job.run.codec import decode
from tunesmith.job.run.events import Event
from tunesmith.report import picture
from tunesmith.report.curve import read_curve
from tunesmith.report.picture import NARROW, as_rate, as_svg, draw, write_png

pytestmark = pytest.mark.unit

CURVE = read_curve([decode(Event, line) for line in events()])


def test_png_has_the_size_and_is_not_blank(tmp_path: Path) -> None:
    write_png(CURVE, tmp_path / "training_loss.png", title="run $1 \\frac of 2$")
    pixels = imread(tmp_path / "training_loss.png")

    assert pixels.shape[:2] == (600, 900)
    assert (pixels[..., :3] < 0.9).any(axis=2).mean() > 0.01
    assert [path.name for path in tmp_path.iterdir()] == ["training_loss.png"]


def test_figure_shows_every_series() -> None:
    upper, lower = draw(CURVE, title="a run").axes
    names = upper.get_legend_handles_labels()[1]

    assert names == ["training, each log", "training, smoothed", "validation", "checkpoint"]
    assert upper.get_title(loc="left") == "a run"
    assert any(text.get_text() == "resumed at step 60" for text in upper.texts)
    assert len(lower.get_lines()[0].get_xdata()) == 104


def test_losses_that_are_no_numbers_are_marked() -> None:
    log = {"event": "log", "total_steps": 3}
    points = [log | {"step": 1, "loss": 2.0}, log | {"step": 2, "loss": None}]

    assert (
        "loss not a number"
        in draw(read_curve([decode(Event, line) for line in points]))
        .axes[0]
        .get_legend_handles_labels()[1]
    )


def test_a_run_without_a_log_still_has_a_picture() -> None:
    upper = draw(read_curve([])).axes[0]

    assert [text.get_text() for text in upper.texts] == ["No loss was logged."]


def test_svg_is_one_element_in_the_colours_of_the_page() -> None:
    svg = as_svg(CURVE)
    tree = ET.fromstring(svg)

    assert tree.tag.endswith("svg")
    assert tree.get("width") is None
    assert "currentColor" in svg
    assert "var(--train, #2f6690)" in svg
    assert "#1f2430" not in svg  # the ink of the light theme must not stay in it
    assert not re.search(r"fill: ?(#ffffff|white)", svg)  # transparent
    assert "<style" not in svg  # it would hold for the whole page
    assert "validation" in [text.text for text in tree.iter() if text.tag.endswith("text")]


def test_two_svgs_in_one_page_share_no_id_and_no_reference_is_broken() -> None:
    pictures = [as_svg(CURVE), as_svg(CURVE, size=NARROW)]
    ids = [re.findall(r'\bid="([^"]+)"', svg) for svg in pictures]

    for svg, own in zip(pictures, ids, strict=True):
        assert len(own) == len(set(own))
        used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg))
        assert {a or b for a, b in used} <= set(own)
    assert not set(ids[0]) & set(ids[1])


def test_the_same_curve_gives_the_same_svg() -> None:
    assert as_svg(CURVE) == as_svg(CURVE)


def test_nothing_global_changes_and_nothing_warns() -> None:
    before = dict(mpl.rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        as_svg(CURVE)

    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize(("rate", "text"), [(1e-4, "1e-4"), (2.5e-5, "2.5e-5"), (1.0, "1e0")])
def test_rates_read_as_people_write_them(rate: float, text: str) -> None:
    assert as_rate(rate) == text


def test_a_chinese_font_installed_since_matplotlib_looked_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not any("CJK" in Path(file).name for file in font_manager.findSystemFonts()):
        lacking("no Chinese font on this machine", "apt-get install fonts-noto-cjk")
    manager = font_manager.fontManager
    western = [font for font in manager.ttflist if "CJK" not in font.name]
    monkeypatch.setattr(manager, "ttflist", western)
    manager._findfont_cached.cache_clear()
    picture._installed_chinese.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing glyph is one
        write_png(CURVE, tmp_path / "training_loss.png", title="损失", language="zh")
