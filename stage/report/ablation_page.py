"""The answer of an ablation as a page, as markdown and as numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from stage.benchmarks.images import write_atomic
from stage.report.ablation import Ablation, ScoreRow, ablate, numbers
from stage.report.curves import COLORS, Line, interval_panel
from stage.report.gallery import data_uri
from stage.report.overview import published
from stage.report.page import HTML, MARKDOWN, render
from stage.report.picture import CURVES, ablation_picture
from stage.report.tables import Cell, markdown
from stage.report.variants import Variant

NUMBERS = "report.json"
PANELS = (  # title, unit, column of metrics.csv
    ("Validation", "strict, mean over images", "validation/strict"),
    ("Reward", "task reward", "reward/mean"),
    ("Entropy of the policy", "nats a token", "policy/entropy"),
    ("KL to the reference", "nats a token", "policy/kl"),
    ("Groups that teach", "share", "reward/informative_groups"),
    ("Groups with an entropy reward", "share", "reward/entropy_active_groups"),
    ("Similarity of tokens to opponents", "cosine", "weights/similarity_mean"),
    ("Gradient", "norm before clipping", "policy/gradient_norm"),
)


def write_ablation(
    sources: Sequence[str],
    output: Path,
    baseline: str | None,
    picture: Path | None = None,
    scores: Sequence[str] = (),
) -> Path:
    """Write report.html, report.md and report.json about the runs of `sources` into `output`; return the page's path.

    Args:
        sources: as in `stage.report.sources`.
        baseline: label of the variant that the others are compared with; None takes plain GRPO.
        picture: file of the whole in one picture; None writes none.
        scores: beginnings of the titles of at most three tables for the picture; none takes the first three.
    """
    found = ablate(sources, baseline)
    if picture is not None:
        drawn = [curve_lines(found.variants, column) for _, _, column in CURVES]
        titles = scores or [table.title for table in found.tables if table.main]
        figure = ablation_picture(found, drawn, titles[:3])
        picture.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(picture, dpi=120)
    page = render(
        "ablation.html.j2",
        title=title(found.variants),
        found=found,
        panels=[
            {"title": name, "svg": Markup(interval_panel(name, unit, lines))}
            for name, unit, column in PANELS
            if (lines := curve_lines(found.variants, column))
        ],
        grids=_grids(found.variants),
        published=published(found.variants),
        colors=len(COLORS),
        p_value=p_value,
    )
    write_atomic(output / MARKDOWN, _markdown(found).encode())
    write_atomic(output / NUMBERS, (json.dumps(numbers(found), indent=1) + "\n").encode())
    write_atomic(output / HTML, page.encode())
    return output / HTML


def curve_lines(variants: Sequence[Variant], column: str) -> list[Line]:
    """A line for each variant in which at least one run logged the column; broken runs are lines of their own."""
    lines = [
        Line(
            place,
            [run.curves[column] for run in variant.runs.values() if column in run.curves],
            [run.curves[column] for run, _ in variant.broken.values() if column in run.curves],
        )
        for place, variant in enumerate(variants)
    ]
    return [line for line in lines if line.seeds or line.broken]


def title(variants: Sequence[Variant]) -> str:
    runs = sum(len(variant.seeds) for variant in variants)
    return f"Ablation: {len(variants)} variants, {runs} runs"


def p_value(value: float | None) -> str:
    """Three digits, and never a zero."""
    if value is None:
        return ""
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _grids(variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """The last picture of each variant for the first seed that most have, and what the first of them began with."""
    runs = [next(iter(variant.runs.values())) for variant in variants if variant.runs]
    with_grids = [
        (v.label, run) for v, run in zip([v for v in variants if v.runs], runs, strict=True) if run.grids
    ]
    if not with_grids:
        return []
    first = with_grids[0][1]
    shown = [("before training", first.grids[min(first.grids)])] if 0 in first.grids else []
    shown += [(f"{label}, update {max(run.grids)}", run.grids[max(run.grids)]) for label, run in with_grids]
    found = [{"label": label, "source": data_uri(path)} for label, path in shown]
    return [item for item in found if item["source"] is not None]


def _markdown(found: Ablation) -> str:
    lines = [f"# {title(found.variants)}", ""]
    if found.findings:
        lines += ["## To know first", ""]
        lines += [f"- **{finding.kind}**: {finding.text}" for finding in found.findings] + [""]
    lines += ["## Overview", "", markdown(found.overview[0], found.overview[1:]), ""]
    lines += [_OVERVIEW_NOTE, ""]
    for table in found.tables:
        lines += [f"## {table.title}", "", markdown(_HEADINGS, [_text_row(row) for row in table.rows]), ""]
    for printed in published(found.variants):
        lines += [f"## {printed['title']}: beside {printed['source']}", ""]
        lines += [markdown(printed["table"][0], printed["table"][1:]), ""]
    lines += [_NOTE, "", "## Runs", ""]
    for variant in found.variants:
        named = [f"{seed}: {run.name}" for seed, run in variant.runs.items()]
        named += [f"{seed}: {run.name} ({reason})" for seed, (run, reason) in variant.broken.items()]
        lines.append(f"- {variant.label}: {', '.join(named)}")
    return "\n".join([*lines, ""])


_OVERVIEW_NOTE = (
    "Means over seeds with half the 95 % Student interval. Entropy, KL and reward are means of the last tenth of the "
    "updates. The paper's numbers are of another model and another benchmark: they say which sign and size to expect."
)
_HEADINGS = ["", "seeds", "score", "over base", "difference", "to", "p", "p, Holm"]
_NOTE = (
    "Means over seeds with 95 % Student intervals. A difference is paired by seed; p is that of Student's paired test, "
    "two-sided, and Holm's correction is for the comparisons of one table. A run that is not whole counts in no mean."
)


def _text_row(row: ScoreRow) -> list[str]:
    shown = [_text(item) for item in (row.cell, row.to_base, row.difference)]
    adjusted = p_value(row.adjusted)
    certain = f"**{adjusted}**" if row.certain else adjusted
    return [row.label, str(len(row.seeds)), *shown, row.over or "", p_value(row.p), certain]


def _text(item: Cell | None) -> str:
    if item is None:
        return ""
    return f"{item.text} ({item.interval})" if item.interval else item.text
