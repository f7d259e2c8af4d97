"""From the runs of an ablation to tables: intervals over seeds, and differences with corrected significance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from stage.report.compare import over_seeds
from stage.report.overview import overview
from stage.report.scores import Score, cost_scores, evaluated_scores, not_evaluated, training_scores
from stage.report.sources import read_sources
from stage.report.statistics import Difference, holm, paired, quantile
from stage.report.tables import Cell, cell
from stage.report.variants import Finding, Variant, counterpart, find_variants

LEVEL = 0.05
FEW = 3  # seeds, below which a reader is warned of intervals


@dataclass(frozen=True)
class ScoreRow:
    """A variant in the table of one score, and its values by seed.

    `over` is the label of the variant that `difference` is to; `p` is Student's paired two-sided p, and `adjusted` the
    same corrected by Holm for all differences of the table.
    """

    label: str
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    cell: Cell
    to_base: Cell | None
    over: str | None
    difference: Cell | None
    p: float | None
    adjusted: float | None

    @property
    def certain(self) -> bool:
        return self.adjusted is not None and self.adjusted < LEVEL


@dataclass(frozen=True)
class ScoreTable:
    """One score of all variants that have it; `comparisons` is how many p-values were corrected together."""

    title: str
    main: bool
    rows: tuple[ScoreRow, ...]
    comparisons: int


@dataclass(frozen=True)
class Ablation:
    """Everything that page, markdown and numbers show."""

    variants: Sequence[Variant]
    findings: Sequence[Finding]
    tables: Sequence[ScoreTable]
    overview: Sequence[Sequence[str]]


def ablate(sources: Sequence[str], baseline: str | None) -> Ablation:
    """Read the runs and compare them."""
    runs, clashes = read_sources(sources)
    variants, findings = find_variants(runs, baseline)
    evaluated, others = evaluated_scores(variants)
    scores = [*evaluated, *training_scores(variants)]
    named = [Finding("one name for two runs", text) for text in clashes]
    tables = [score_table(score, variants) for score in scores]
    return Ablation(
        variants=variants,
        findings=[*named, *findings, *few_seeds(variants), *others, *not_evaluated(variants)],
        tables=tables,
        overview=overview(variants, [*scores, *cost_scores(variants)]),
    )


def few_seeds(variants: Sequence[Variant]) -> list[Finding]:
    """Variants of one seed or two, from which no difference can be told, whatever the means look like."""
    few = [f"{variant.label} has {len(variant.seeds)}" for variant in variants if len(variant.seeds) < FEW]
    if not few:
        return []
    text = (
        f"{', '.join(few)}. One seed has no interval, and that of two reaches {quantile(2):.1f} standard errors to "
        f"either side, where that of five reaches {quantile(5):.1f}: means of so few tell no difference yet"
    )
    return [Finding("few seeds", text)]


def score_table(score: Score, variants: Sequence[Variant]) -> ScoreTable:
    """Means over seeds, differences to the base and, paired by seed, to the counterpart of each variant."""
    shown = [variant for variant in variants if variant.label in score.values]
    others = [counterpart(variant, variants) for variant in shown]
    differences = [
        None if other is None else paired(score.values[variant.label], score.values.get(other.label, {}))
        for variant, other in zip(shown, others, strict=True)
    ]
    raw = [None if difference is None else difference.p for difference in differences]
    rows = [
        ScoreRow(
            label=variant.label,
            seeds=tuple(score.values[variant.label]),
            values=tuple(score.values[variant.label].values()),
            cell=over_seeds(list(score.values[variant.label].values()), False, score.digits),
            to_base=_to_base(score, variant.label),
            over=None if other is None or difference is None else other.label,
            difference=None if difference is None else _signed(difference, score),
            p=p,
            adjusted=adjusted,
        )
        for variant, other, difference, p, adjusted in zip(
            shown, others, differences, raw, holm(raw), strict=True
        )
    ]
    return ScoreTable(score.title, score.main, tuple(rows), sum(p is not None for p in raw))


def numbers(found: Ablation) -> dict[str, Any]:
    """The tables as plain numbers, each with the values it was made from."""
    return {
        "variants": {
            variant.label: {
                "runs": {str(seed): run.name for seed, run in variant.runs.items()},
                "broken": {str(seed): reason for seed, (_, reason) in variant.broken.items()},
            }
            for variant in found.variants
        },
        "findings": [asdict(finding) for finding in found.findings],
        "scores": [
            {
                "title": table.title,
                "comparisons": table.comparisons,
                "rows": [
                    {
                        "variant": row.label,
                        "values": {
                            str(seed): value for seed, value in zip(row.seeds, row.values, strict=True)
                        },
                        "mean": _interval(row.cell),
                        "over_base": _interval(row.to_base),
                        "over": row.over,
                        "difference": _interval(row.difference),
                        "p": row.p,
                        "p_holm": row.adjusted,
                    }
                    for row in table.rows
                ],
            }
            for table in found.tables
        ],
    }


def _to_base(score: Score, label: str) -> Cell | None:
    base = score.base.get(label, {})
    gains = [value - base[seed] for seed, value in score.values[label].items() if seed in base]
    if not gains:
        return None
    shown = over_seeds(gains, True, score.digits)
    return shown if score.good else replace(shown, sign=0)


def _signed(difference: Difference, score: Score) -> Cell:
    found = difference.estimate
    shown = cell({"mean": found.mean, "low": found.low, "high": found.high}, True, score.digits)
    return shown if score.good else replace(shown, sign=0)


def _interval(item: Cell | None) -> dict[str, float | None] | None:
    return None if item is None else {"mean": item.mean, "low": item.low, "high": item.high}
