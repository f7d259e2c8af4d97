"""An ablation in one picture for a page that holds no script: three curves, and three scores with their intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stage.report.ablation import Ablation, ScoreTable
from stage.report.curves import Line, common_updates, smoothed_rows
from stage.report.statistics import estimate
from stage.report.variants import Variant

CURVES = (  # title, unit, column of metrics.csv
    ("Validation while training", "strict", "validation/strict"),
    ("Entropy of the policy", "nats a token", "policy/entropy"),
    ("KL to the reference", "nats a token", "policy/kl"),
)
# After Okabe and Ito, and four more that are told apart in print.
COLORS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#b5568b",
    "#a87400",
    "#5a6b7b",
    "#6a3d9a",
    "#8c2d04",
    "#1b7837",
    "#333a45",
)


def ablation_picture(found: Ablation, lines: Sequence[Sequence[Line]], titles: Sequence[str]) -> Figure:
    """Curves above, scores below.

    Args:
        lines: those of each column of `CURVES`.
        titles: of the score tables to show, beginning with these words; at most three.

    Raises ValueError for a title that no table has.
    """
    figure = Figure(figsize=(12.5, 6.6), layout="constrained")
    above, below = figure.subplots(2, 3, height_ratios=(1, 1.05))
    for axes, (title, unit, _), drawn in zip(above, CURVES, lines, strict=True):
        _curves(axes, drawn)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_ylabel(unit, fontsize=8)
        axes.set_xlabel("update", fontsize=8)
    for number, (axes, title) in enumerate(zip(below, titles, strict=False)):
        table = next((table for table in found.tables if table.title.startswith(title)), None)
        if table is None:
            raise ValueError(
                f"no score begins with {title!r}; there are {'; '.join(t.title for t in found.tables)}"
            )
        _scores(axes, table, found.variants, labelled=number == 0)
    for axes in (*above, *below):
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _curves(axes: Axes, lines: Sequence[Line]) -> None:
    for line in lines:
        color = COLORS[line.place % len(COLORS)]
        for curve in line.broken:
            axes.plot(curve.x, curve.y, color=color, linewidth=1, linestyle=":")
        if line.seeds:
            x, y = common_updates(line.seeds)
            axes.plot(x, smoothed_rows(x, y).mean(axis=0), color=color, linewidth=1.6)
    axes.grid(axis="y", linewidth=0.5, color="#e3e5e9")


def _scores(axes: Axes, table: ScoreTable, variants: Sequence[Variant], labelled: bool) -> None:
    """A dot a seed, the mean with its interval, and a grey line where the base stands."""
    rows = {row.label: row for row in table.rows}
    for place, variant in enumerate(variants):
        row, color, y = rows.get(variant.label), COLORS[place % len(COLORS)], -place
        if row is None:
            continue
        axes.plot(row.values, np.full(len(row.values), y + 0.18), ".", color=color, alpha=0.55, markersize=4)
        found = estimate(row.values)
        if found.low is not None and found.high is not None:
            axes.plot([found.low, found.high], [y, y], color=color, linewidth=2)
        axes.plot(found.mean, y, "o", color=color, markersize=6)
    based = [row.cell.mean - row.to_base.mean for row in table.rows if row.to_base is not None]
    if based:
        x = float(np.mean(based))
        axes.axvline(x, color="#888888", linewidth=1, linestyle="--", zorder=0)
        axes.annotate(
            "base",
            (x, 0.01),
            xytext=(3, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            fontsize=8,
            color="#666666",
        )
    axes.set_yticks([-place for place in range(len(variants))])
    axes.set_yticklabels([variant.label for variant in variants] if labelled else [""] * len(variants))
    axes.set_ylim(-len(variants) + 0.4, 0.6)
    axes.set_title(table.title.partition(", RMS")[0], fontsize=10, loc="left")
    axes.grid(axis="x", linewidth=0.5, color="#e3e5e9")
