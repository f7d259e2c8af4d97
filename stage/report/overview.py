"""One row a variant: the main scores, what they cost, and what papers print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stage.benchmarks.published import read_published
from stage.report.scores import FINAL, Score
from stage.report.statistics import spread_estimate
from stage.report.tables import number
from stage.report.variants import Variant

PUBLISHED = "package://stage/benchmarks/assets/published.json"
# Switches of an algorithm (advantage weights, KL weights, entropy reward, KL) to a row of the paper's tables. Without
# KL there is none to weigh, whatever the second says.
PAPER = {
    (False, False, False, True): ("geneval", "GRPO"),
    (True, True, True, True): ("geneval", "STAGE"),
    (False, False, True, True): ("geneval_ablation", "STAGE without reweighting"),
    (True, True, False, True): ("geneval_ablation", "STAGE without entropy reward"),
    (True, False, True, False): ("geneval_ablation", "STAGE without KL"),
    (True, False, False, False): ("geneval_ablation", "STAGE without entropy reward and KL"),
}
# What fills the slots of the paper's method; a critical_tokens or a penalty has no class there.
PLAIN = {
    "advantage": "GroupAdvantage",
    "ratio": "ClippedRatio",
    "divergence": "K3",
    "aggregation": "GroupMean",
    "token_weights": "StageWeights",
    "entropy_reward": "EntropyReward",
    "critical_tokens": "none",
    "penalty": "none",
    "beta_schedule": "none",
}


def overview(variants: Sequence[Variant], scores: Sequence[Score]) -> list[list[str]]:
    """Headings and a row a variant: the main scores, what they cost, and what the paper has."""
    shown = [score for score in scores if score.main]
    paper = {variant.label: paper_score(variant) for variant in variants}
    heading = ["", "runs", *(score.short for score in shown)]
    rows = []
    for variant in variants:
        whole = len(variant.runs)
        runs = str(whole) if not variant.broken else f"{whole} of {len(variant.seeds)}"
        cells = [_brief(score, variant.label) for score in shown]
        there = paper[variant.label]
        rows.append([variant.label, runs, *cells, "" if there is None else f"{there:.2f}"])
    if any(paper.values()):
        return [[*heading, "paper, GenEval of 7B"], *rows]
    return [heading, *(row[:-1] for row in rows)]


def _brief(score: Score, label: str) -> str:
    """A mean and, where it varies, half its interval."""
    values = list(score.values.get(label, {}).values())
    if not values:
        return ""
    found = spread_estimate(values)
    text = number(found.mean, digits=score.digits)
    if found.low is None:
        return text
    return f"{text} ± {number(found.mean - found.low, digits=score.digits)}"


def paper_score(variant: Variant) -> float | None:
    """The overall score that the paper prints for a variant's switches; None where it prints none.

    Other objectives have no row there, whatever their switches.
    """
    runs = [*variant.runs.values(), *(run for run, _ in variant.broken.values())]
    algorithm = runs[0].config.get("algorithm") or {}
    if "reweight_advantage" not in algorithm:
        return None
    targets = {
        slot: str((algorithm.get(slot) or {}).get("_target_", "")).rpartition(".")[2] for slot in PLAIN
    }
    if any(target and target != PLAIN[slot] for slot, target in targets.items()):
        return None
    held = algorithm.get("beta") != 0
    switches = (
        bool(algorithm["reweight_advantage"]),
        bool(algorithm["reweight_kl"]) and held,
        algorithm["entropy_coefficient"] != 0,
        held,
    )
    if switches not in PAPER:
        return None
    table, row = PAPER[switches]
    return float(read_published(PUBLISHED, table).rows[row]["overall"])


def published(variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """For each benchmark with printed numbers, its rows of text: ours as means over seeds, then those of the papers."""
    tables: dict[str, dict[str, Any]] = {}
    for variant in variants:
        for run in variant.runs.values():
            for (checkpoint, name), evaluation in run.evaluations.items():
                printed = evaluation.results["benchmark"].get("published")
                if printed is None or checkpoint != FINAL:
                    continue
                part = evaluation.results["benchmark"]["headline"]
                for split, parts in evaluation.results["scores"].items():
                    table = tables.setdefault(
                        f"{name}, {split}", {"source": printed["source"], "rows": printed["rows"], "ours": {}}
                    )
                    for task, row in parts[part].items():
                        ours = table["ours"].setdefault(variant.label, {}).setdefault(task, [])
                        ours.append((row.get("tuned") or next(iter(row.values())))["mean"])
    return [{"title": title, **table, "table": _beside(table)} for title, table in tables.items()]


def _beside(table: Mapping[str, Any]) -> list[list[str]]:
    tasks = [t for t in next(iter(table["ours"].values())) if any(t in row for row in table["rows"].values())]
    ours = [
        [f"ours: {label}", *(number(sum(found[t]) / len(found[t])) for t in tasks)]
        for label, found in table["ours"].items()
    ]
    theirs = [[name, *(str(row.get(t, "")) for t in tasks)] for name, row in table["rows"].items()]
    return [["", *tasks], *ours, *theirs]
