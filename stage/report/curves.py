"""Curves as SVG that lies inside a page: no file, no script, and the colours and fonts of the page around it."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from stage.report.read import Curve
from stage.report.statistics import estimate

# Drawn in these stand-ins, which become variables of the page's style sheet, so that a curve follows light and dark.
INK, GRID = "#010203", "#040506"
COLORS = tuple(f"#0102{number:02x}" for number in range(0x10, 0x1A))
VARIABLES = {INK: "var(--muted)", GRID: "var(--line)"} | {
    color: f"var(--series-{number})" for number, color in enumerate(COLORS)
}
SIZE = (4.1, 2.45)  # inches; the page scales it to the width of a column
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "stage",  # the same curve gives the same bytes
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "ytick.major.size": 0,
    "xtick.major.size": 0,
}


@dataclass(frozen=True)
class Panel:
    """One picture: `title`, the `unit` of its axis, and `columns` of metrics.csv with their names in the legend."""

    title: str
    unit: str
    columns: Mapping[str, str]


# What a reader of a run asks first. A panel is shown when at least one of its columns was logged.
PANELS = (
    Panel("Validation", "mean over images", {"validation/strict": "strict", "validation/reward": "reward"}),
    Panel("Reward", "task reward", {"reward/mean": "mean", "reward/strict": "strict"}),
    Panel("KL to the reference", "nats a token", {"policy/kl": "KL"}),
    Panel("Entropy", "nats a token", {"policy/entropy": "policy", "reference/entropy": "reference"}),
    Panel("Groups that teach", "share", {"reward/informative_groups": "informative groups"}),
    Panel("Gradient", "norm before clipping", {"policy/gradient_norm": "norm"}),
)


@dataclass(frozen=True)
class Line:
    """A line of a comparison: its place among the groups, which is its colour, and one curve a seed.

    `broken` are those of runs that ended too early to count.
    """

    place: int
    seeds: Sequence[Curve]
    broken: Sequence[Curve] = ()


def run_panel(panel: Panel, curves: Mapping[str, Curve]) -> str | None:
    """The panel of one run as SVG, None when none of its metrics was logged."""
    present = [(name, label) for name, label in panel.columns.items() if name in curves]
    if not present:
        return None
    figure, axes = _axes(panel.unit)
    for color, (name, label) in zip(COLORS, present, strict=False):
        curve = curves[name]
        smooth = _smoothed(curve)
        if smooth is None:
            axes.plot(curve.x, curve.y, color=color, label=label, linewidth=1.8, marker="o", markersize=3.5)
        else:
            axes.plot(curve.x, curve.y, color=color, alpha=0.3, linewidth=0.9)
            axes.plot(curve.x, smooth, color=color, label=label, linewidth=1.8)
    return _finish(figure, axes, legend=len(present) > 1, title=panel.title)


def comparison_panel(title: str, unit: str, lines: Sequence[Line]) -> str:
    """The mean over seeds of each line, with a band from the lowest to the highest seed and the seeds drawn thin.

    Line n has colour n of the page, whose own legend names it once for all panels.

    The mean is taken at the updates that every seed has.
    """
    figure, axes = _axes(unit)
    for line in lines:
        color = COLORS[line.place % len(COLORS)]
        x, y = common_updates(line.seeds)
        rows = smoothed_rows(x, y)
        if len(rows) > 1:
            axes.fill_between(x, rows.min(axis=0), rows.max(axis=0), color=color, alpha=0.15, linewidth=0)
            for row in rows:
                axes.plot(x, row, color=color, alpha=0.4, linewidth=0.8)
        axes.plot(x, rows.mean(axis=0), color=color, linewidth=2)
    return _finish(figure, axes, legend=False, title=title)


def interval_panel(title: str, unit: str, lines: Sequence[Line]) -> str:
    """The mean over seeds of each line with a band of its 95 % Student interval, for many lines in one panel.

    Single seeds of `Line.broken`, which count in no mean, are dotted. Colours and smoothing are those of
    `comparison_panel`.
    """
    figure, axes = _axes(unit)
    for line in lines:
        color = COLORS[line.place % len(COLORS)]
        for curve in line.broken:
            even = _smoothed(curve)
            axes.plot(curve.x, curve.y if even is None else even, color=color, linewidth=1.2, linestyle=":")
        if not line.seeds:
            continue
        x, y = common_updates(line.seeds)
        found = [estimate(column) for column in smoothed_rows(x, y).T]
        bounds = [(p.low, p.high) for p in found if p.low is not None and p.high is not None]
        if bounds and len(bounds) == len(found):
            axes.fill_between(x, *np.array(bounds).T, color=color, alpha=0.1, linewidth=0)
        axes.plot(x, [point.mean for point in found], color=color, linewidth=1.8)
    return _finish(figure, axes, legend=False, title=title)


def smoothed_rows(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Each row of `y`, `[rows, n]`, as a centred moving average, where it is long enough to need one."""
    smooth = [_smoothed(Curve(x, row)) for row in y]
    return np.array([row if even is None else even for row, even in zip(y, smooth, strict=True)])


def common_updates(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Updates that all curves have, `[n]`, and the curves' values there, `[len(curves), n]`."""
    shared = sorted(set.intersection(*(set(curve.x.tolist()) for curve in curves)))
    rows = [dict(zip(curve.x.tolist(), curve.y.tolist(), strict=True)) for curve in curves]
    return np.array(shared), np.array([[row[x] for x in shared] for row in rows])


def _smoothed(curve: Curve) -> np.ndarray | None:
    """A centred moving average over a tenth of the curve; None for a curve too short to need one."""
    width = len(curve.y) // 10
    if width < 2:
        return None
    kernel = np.ones(2 * (width // 2) + 1)
    return np.convolve(curve.y, kernel, "same") / np.convolve(np.ones(len(curve.y)), kernel, "same")


def _axes(unit: str) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
        axes.grid(axis="y", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel("update")
        axes.set_ylabel(unit)
        axes.margins(x=0.02)
        axes.locator_params(axis="y", nbins=5)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        return figure, axes


def _finish(figure: Figure, axes: Axes, *, legend: bool, title: str) -> str:
    with matplotlib.rc_context(STYLE):
        if legend:
            axes.legend(frameon=False, loc="best", fontsize=10, handlelength=1.4)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    return _embed(file.getvalue(), title)


def _embed(document: str, title: str) -> str:
    """The bare `<svg>` element of a stand-alone SVG document, in the variables of the page."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    for stand_in, variable in VARIABLES.items():
        svg = svg.replace(stand_in, variable)
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1).strip()
