"""Curves: which updates count, and an SVG that needs nothing from outside."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from stage.report.curves import (
    PANELS,
    Curve,
    Line,
    Panel,
    _smoothed,
    common_updates,
    comparison_panel,
    run_panel,
)

PANEL = Panel("Entropy", "nats", {"policy/entropy": "policy", "reference/entropy": "reference"})


def curve(*y: float, start: int = 1) -> Curve:
    return Curve(np.arange(start, start + len(y)), np.array(y))


def balanced(svg: str) -> bool:
    """Every element that is opened is closed, in order."""
    stack: list[str] = []

    class Check(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            stack.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert stack.pop() == tag

        def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            pass

    Check().feed(svg)
    return not stack


def test_a_panel_is_one_bare_svg_in_the_colours_of_the_page() -> None:
    svg = run_panel(PANEL, {"policy/entropy": curve(2, 1.5), "reference/entropy": curve(2, 1.9)})
    assert svg is not None and svg.startswith("<svg") and svg.endswith("</svg>") and balanced(svg)
    assert 'aria-label="Entropy"' in svg and "viewBox" in svg
    assert "http" not in svg and "xmlns" not in svg and "<metadata" not in svg
    assert "var(--series-0)" in svg and "var(--series-1)" in svg and "var(--muted)" in svg
    assert not re.search(r"#01020[0-9a-f]|#0102[01][0-9a-f]|#040506", svg)  # no stand-in is left
    assert ">policy<" in svg and ">reference<" in svg  # letters, not outlines


def test_a_panel_without_its_metrics_is_left_out() -> None:
    assert run_panel(PANEL, {"reward/mean": curve(1, 2)}) is None
    alone = run_panel(PANEL, {"policy/entropy": curve(2, 1.5)})
    assert alone is not None and ">reference<" not in alone


@pytest.mark.parametrize("length", [1, 2, 19, 200])
def test_curves_of_any_length(length: int) -> None:
    for panel in PANELS:
        drawn = run_panel(panel, {name: curve(*np.linspace(0, 1, length)) for name in panel.columns})
        assert drawn is not None and balanced(drawn)


def test_the_same_curve_gives_the_same_bytes() -> None:
    curves = {"policy/entropy": curve(2, 1.5, 1.2)}
    assert run_panel(PANEL, curves) == run_panel(PANEL, curves)


def test_smoothing_by_hand() -> None:
    # 20 points: windows of 3, two points at the ends.
    y = np.arange(20.0) ** 2
    smooth = _smoothed(Curve(np.arange(20), y))
    assert smooth is not None
    assert smooth[0] == pytest.approx((0 + 1) / 2, abs=1e-12)
    assert smooth[5] == pytest.approx((16 + 25 + 36) / 3, abs=1e-12)
    assert smooth[19] == pytest.approx((18**2 + 19**2) / 2, abs=1e-12)
    assert _smoothed(Curve(np.arange(19), y[:19])) is None


def test_the_mean_is_taken_where_every_seed_has_a_value() -> None:
    x, rows = common_updates([curve(1, 2, 3), curve(5, 6, start=2)])
    np.testing.assert_array_equal(x, [2, 3])
    np.testing.assert_array_equal(rows, [[2, 3], [5, 6]])


def test_a_line_keeps_its_colour_where_another_has_no_values() -> None:
    svg = comparison_panel("Reward", "r", [Line(1, [curve(1, 2), curve(2, 3)])])
    assert "var(--series-1)" in svg and "var(--series-0)" not in svg and balanced(svg)


def test_seeds_without_a_common_update_have_no_mean_and_no_error() -> None:
    assert balanced(comparison_panel("Reward", "r", [Line(0, [curve(1, 2), curve(3, 4, start=9)])]))
