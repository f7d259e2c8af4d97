"""Several runs side by side.

Runs that differ in nothing but the seed are one group, with a mean and an interval over seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from stage.benchmarks.images import write_atomic
from stage.report.comparable import check_prompts, check_scorers, flat
from stage.report.curves import COLORS, Line, comparison_panel
from stage.report.groups import Group, group_runs
from stage.report.page import HTML, MARKDOWN, render
from stage.report.read import Run, read_run
from stage.report.statistics import spread_estimate
from stage.report.tables import Cell, cell, markdown

PANELS = (  # title, unit, column of metrics.csv
    ("Validation", "strict, mean over images", "validation/strict"),
    ("Reward", "task reward", "reward/mean"),
    ("KL to the reference", "nats a token", "policy/kl"),
    ("Entropy of the policy", "nats a token", "policy/entropy"),
    ("Groups that teach", "share", "reward/informative_groups"),
    ("Gradient", "norm before clipping", "policy/gradient_norm"),
)
TRAINING = "training"  # what a score is called that training itself measured


@dataclass(frozen=True)
class ComparisonRow:
    """A group in the table of one score: the mean over seeds, and its difference to the base and to the first group.

    A difference that cannot be paired, for want of runs with the same seed, is None.
    """

    label: str
    seeds: tuple[int, ...]
    score: Cell
    to_base: Cell | None
    to_first: Cell | None


@dataclass(frozen=True)
class ComparisonTable:
    """One score, for example strict on the held-out split; `note` says which runs it lacks."""

    title: str
    first: str
    rows: tuple[ComparisonRow, ...]
    note: str


def write_comparison(folders: Sequence[Path], output: Path) -> Path:
    """Write report.html and report.md about the runs in `folders` into `output`; return the page's path.

    Raises ValueError for runs that cannot be compared: a seed twice in a group, evaluations with other prompts or
    seeds.
    """
    groups = group_runs([read_run(folder) for folder in folders])
    tables = comparison_tables(groups)
    panels = [
        {"title": title, "svg": Markup(comparison_panel(title, unit, lines))}
        for title, unit, column in PANELS
        if (lines := _lines(groups, column))
    ]
    page = render(
        "compare.html.j2",
        title=_title(groups),
        groups=groups,
        tables=tables,
        panels=panels,
        colors=len(COLORS),
    )
    write_atomic(output / MARKDOWN, _markdown(groups, tables).encode())
    write_atomic(output / HTML, page.encode())
    return output / HTML


def comparison_tables(groups: Sequence[Group]) -> list[ComparisonTable]:
    """One table for each evaluated split, or for the last validation of training where no run was evaluated."""
    runs = [run for group in groups for run in group.runs.values()]
    evaluated = [run for run in runs if run.evaluation is not None]
    _check_comparable(evaluated)
    if not evaluated:
        last = {
            run.folder: (run.curves["validation/strict"].y[-1], None)
            for run in runs
            if "validation/strict" in run.curves
        }
        return [_table(f"strict on validation, last of {TRAINING}", groups, last)] if last else []
    results = evaluated[0].evaluation.results  # type: ignore[union-attr]
    headline = results["benchmark"]["headline"]
    tables = []
    for split in results["scores"]:
        scores = {run.folder: _overall(run, split, headline) for run in evaluated}
        tables.append(_table(f"{headline} on {split}", groups, scores))
    return tables


def over_seeds(values: Sequence[float], signed: bool, digits: int = 3) -> Cell:
    """The mean and its Student interval over seeds; one seed has no interval, nor have values that are all the same."""
    found = spread_estimate(values)
    return cell({"mean": found.mean, "low": found.low, "high": found.high}, signed, digits)


Scored = Mapping[Path, tuple[float, float | None]]  # (score, base score) of a run by its folder


def _table(title: str, groups: Sequence[Group], scores: Scored) -> ComparisonTable:
    by_seed = [
        {seed: scores[run.folder] for seed, run in g.runs.items() if run.folder in scores} for g in groups
    ]
    rows = []
    for group, found in zip(groups, by_seed, strict=True):
        if not found:
            continue
        gains = [score - base for score, base in found.values() if base is not None]
        shared = [seed for seed in found if seed in by_seed[0]]
        paired = [found[seed][0] - by_seed[0][seed][0] for seed in shared] if group is not groups[0] else []
        rows.append(
            ComparisonRow(
                group.label,
                tuple(found),
                over_seeds([score for score, _ in found.values()], signed=False),
                over_seeds(gains, signed=True) if gains else None,
                over_seeds(paired, signed=True) if paired else None,
            )
        )
    lacking = [run.name for group in groups for run in group.runs.values() if run.folder not in scores]
    note = f"Not evaluated and left out: {', '.join(lacking)}." if lacking else ""
    return ComparisonTable(title, groups[0].label, tuple(rows), note)


def _overall(run: Run, split: str, headline: str) -> tuple[float, float | None]:
    assert run.evaluation is not None
    row = run.evaluation.results["scores"][split][headline]["overall"]
    base = row["base"]["mean"] if "base" in row else None
    return (row["tuned"]["mean"], base) if "tuned" in row else (next(iter(row.values()))["mean"], None)


def _check_comparable(runs: Sequence[Run]) -> None:
    """Raise ValueError unless all evaluations drew the same prompts from the same base in the same way."""
    for run in runs[1:]:
        assert run.evaluation is not None and runs[0].evaluation is not None
        check_prompts(runs[0].evaluation, run.evaluation)
        check_scorers(runs[0].evaluation, run.evaluation)
        for key in ("benchmark", "settings", "scores"):
            mine, first = (_comparable(r, key) for r in (run, runs[0]))
            differing = [name for name in dict.fromkeys([*first, *mine]) if mine.get(name) != first.get(name)]
            if differing and mine and first:
                name = differing[0]
                raise ValueError(
                    "evaluations can be compared when base, sampler, seed, prompts and scorer are the same; in "
                    f"{key} {run.folder} has {name} {mine.get(name)}, {runs[0].folder} has {first.get(name)}, and "
                    f"{len(differing) - 1} more differ. Evaluate both with the same command."
                )


def _comparable(run: Run, key: str) -> dict[str, Any]:
    """What must be the same, by name; nothing where the evaluation does not say it."""
    assert run.evaluation is not None
    value = run.evaluation.results.get(key) or {}
    if key == "settings":
        return dict(flat(value.get("base") or {}))
    if key == "benchmark":
        return {name: value.get(name) for name in ("name", "headline", "images_per_prompt") if value}
    return {
        f"{split} {task}": next(iter(rows.values()))["prompts"]
        for split, parts in value.items()
        for task, rows in next(iter(parts.values())).items()
    }


def _lines(groups: Sequence[Group], column: str) -> list[Line]:
    """A line for each group in which at least one run logged the column."""
    found = [
        Line(place, [run.curves[column] for run in group.runs.values() if column in run.curves])
        for place, group in enumerate(groups)
    ]
    return [line for line in found if line.seeds]


def _title(groups: Sequence[Group]) -> str:
    return " against ".join(group.label for group in groups)


def _markdown(groups: Sequence[Group], tables: Sequence[ComparisonTable]) -> str:
    lines = [f"# {_title(groups)}", ""]
    for table in tables:
        header = ["algorithm", "seeds", "score", "over base", f"over {table.first}"]
        rows = [
            [
                row.label,
                str(len(row.seeds)),
                *(_text(item) for item in (row.score, row.to_base, row.to_first)),
            ]
            for row in table.rows
        ]
        lines += [f"## {table.title}", "", markdown(header, rows), ""] + (
            [table.note, ""] if table.note else []
        )
    lines += ["Means over seeds with 95 % Student intervals; differences are paired by seed.", ""]
    lines += ["## Runs", ""]
    lines += [
        f"- {group.label}, seed {seed}: {run.name}" for group in groups for seed, run in group.runs.items()
    ]
    return "\n".join([*lines, ""])


def _text(item: Cell | None) -> str:
    if item is None:
        return ""
    return f"{item.text} ({item.interval})" if item.interval else item.text
