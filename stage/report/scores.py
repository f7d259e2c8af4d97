"""The numbers that an ablation compares, one a run: evaluated scores, best and last validation, trajectories, cost."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stage.report.read import Curve, Evaluation, Run
from stage.report.spread import grid_spread
from stage.report.variants import Finding, Variant

VALIDATION = ("validation/strict", "validation/reward")  # the first that was logged
TAIL = 10  # a trajectory ends with the mean of its last tenth
DRIFT = "drift"  # a benchmark whose scores are neither good nor bad
FINAL = "last"  # the checkpoint that stands at the end of a run


@dataclass(frozen=True)
class Score:
    """One number a run: `values` by the label of the variant and the seed, `base` the same before training, if known.

    `main` is what an overview shows; the rest stands below it. `digits` are its decimals. `good` says that higher is
    better, so that a page may colour its differences.
    """

    title: str
    short: str
    values: Mapping[str, Mapping[int, float]]
    base: Mapping[str, Mapping[int, float]]
    main: bool = True
    digits: int = 3
    good: bool = True


@dataclass(frozen=True)
class _Key:
    checkpoint: str
    benchmark: str
    split: str
    part: str


def evaluated_scores(variants: Sequence[Variant]) -> tuple[list[Score], list[Finding]]:
    """A score for each checkpoint, benchmark, split and part of results.json, the headline's first.

    Evaluations that drew other prompts, from another base or with another judge than most, are left out and named.
    """
    usual, findings = _usual_settings(variants)
    values: dict[_Key, dict[str, dict[int, float]]] = {}
    base: dict[_Key, dict[str, dict[int, float]]] = {}
    main: dict[_Key, bool] = {}
    good: dict[_Key, bool] = {}
    for variant in variants:
        for seed, run in variant.runs.items():
            for place, evaluation in run.evaluations.items():
                if _settings(evaluation) != usual[place]:
                    continue
                headlines = evaluation.results["benchmark"]
                wanted = [headlines["headline"], *headlines.get("beside", [])]
                for split, parts in evaluation.results["scores"].items():
                    for part, tasks in parts.items():
                        key = _Key(*place, split, part)
                        main[key] = part in wanted and place[0] == FINAL
                        good[key] = key.benchmark != DRIFT
                        row = tasks["overall"]
                        final = row.get("tuned") or next(iter(row.values()))
                        values.setdefault(key, {}).setdefault(variant.label, {})[seed] = final["mean"]
                        if "tuned" in row:
                            base.setdefault(key, {}).setdefault(variant.label, {})[seed] = row["base"]["mean"]
    several = len({key.benchmark for key in values}) > 1
    order = sorted(
        values, key=lambda key: (not main[key], not good[key])
    )  # stable: splits stay as in the file
    return [
        Score(_title(key), _short(key, several), values[key], base.get(key, {}), main[key], good=good[key])
        for key in order
    ], findings


def not_evaluated(variants: Sequence[Variant]) -> list[Finding]:
    """Runs without an evaluation, by name where others have one."""
    runs = [(variant, seed, run) for variant in variants for seed, run in variant.runs.items()]
    lacking = [f"{variant.label}, seed {seed}" for variant, seed, run in runs if not run.evaluations]
    if not lacking:
        return []
    if len(lacking) == len(runs):
        return [
            Finding(
                "nothing is evaluated",
                "the scores are those that training logged, the best of them chosen on the prompts it is measured on; "
                "`python evaluate.py checkpoint=RUN/checkpoints/last.ckpt` for each run, and this report again, adds "
                "those of a benchmark",
            )
        ]
    return [Finding("not evaluated", f"{'; '.join(lacking)}: only their curves count")]


def training_scores(variants: Sequence[Variant]) -> list[Score]:
    """What training logged: validation at its best and at the end, reward, entropy and KL of the last updates."""
    column = next(
        (c for c in VALIDATION if any(c in r.curves for v in variants for r in v.runs.values())), None
    )
    found = []
    if column is not None:
        part = column.rpartition("/")[2]
        found = [
            _curve_score(variants, column, f"best validation in training, {part}", "best", _best),
            _curve_score(variants, column, f"last validation in training, {part}", "last", _last, main=False),
        ]
    tails = (
        ("reward/mean", "reward of the last updates", "reward", True),
        ("policy/entropy", "entropy of the policy in the last updates, nats a token", "entropy", False),
        ("policy/kl", "KL to the reference in the last updates, nats a token", "KL", False),
    )
    found += [
        replace(_curve_score(variants, column, title, short, _tail), good=good)
        for column, title, short, good in tails
    ]
    found.append(_spread_score(variants))
    return [score for score in found if score.values]


def _spread_score(variants: Sequence[Variant]) -> Score:
    """How far the last pictures of a prompt lie apart, and the first: what a policy that draws one picture loses.

    The first are the same in all runs from one base, so a run without them takes those of another.
    """
    ends = _score(
        variants, "spread of the images of a prompt, RMS of pixels in [0, 1]", "spread", _end_spread
    )
    runs = [run for variant in variants for run in variant.runs.values()]
    starts: dict[str, float] = {}
    for run in runs:
        if _beginning(run) not in starts and (found := grid_spread(run, 0)) is not None:
            starts[_beginning(run)] = found
    base = _score(variants, "", "", lambda run: starts.get(_beginning(run)))
    return replace(ends, base=base.values, good=False)


def _end_spread(run: Run) -> float | None:
    return grid_spread(run, max(run.grids, default=0)) if max(run.grids, default=0) else None


def _beginning(run: Run) -> str:
    """What the pictures before training depend on."""
    images = {
        k: v for k, v in ((run.config.get("callbacks") or {}).get("images") or {}).items() if k != "folder"
    }
    return json.dumps(
        [images, run.config.get("model"), run.config.get("sampler")], sort_keys=True, default=str
    )


def cost_scores(variants: Sequence[Variant]) -> list[Score]:
    """Images that training drew and hours that it took, evaluation not counted."""
    found = [
        replace(_score(variants, "images drawn in training", "images", images), digits=0),
        replace(_score(variants, "hours of training", "hours", hours), digits=3),
    ]
    return [score for score in found if score.values]


def images(run: Run) -> float | None:
    """Images a run drew for learning, from the time of each update and its images a second."""
    return _sum(run, lambda speed, seconds: round(speed * seconds))


def hours(run: Run) -> float | None:
    """Hours that the updates of a run took, which others on the same device may have slowed down."""
    total = _sum(run, lambda speed, seconds: seconds)
    return None if total is None else total / 3600


def _sum(run: Run, term: Any) -> float | None:
    speed, seconds = run.curves.get("time/images_per_second"), run.curves.get("time/total")
    if speed is None or seconds is None:
        return None
    return float(sum(term(a, b) for a, b in zip(speed.y, seconds.y, strict=True)))


def _score(variants: Sequence[Variant], title: str, short: str, number: Any, main: bool = True) -> Score:
    found = {
        variant.label: {s: value for s, run in variant.runs.items() if (value := number(run)) is not None}
        for variant in variants
    }
    return Score(title, short, {label: values for label, values in found.items() if values}, {}, main)


def _curve_score(
    variants: Sequence[Variant], column: str, title: str, short: str, number: Any, main: bool = True
) -> Score:
    return _score(
        variants, title, short, lambda run: number(run.curves[column]) if column in run.curves else None, main
    )


def _best(curve: Curve) -> float:
    return float(curve.y.max())


def _last(curve: Curve) -> float:
    return float(curve.y[-1])


def _tail(curve: Curve) -> float:
    return float(np.mean(curve.y[-max(1, len(curve.y) // TAIL) :]))


def _usual_settings(variants: Sequence[Variant]) -> tuple[dict[tuple[str, str], str], list[Finding]]:
    """How most runs were evaluated, for each checkpoint and benchmark, and the runs that were evaluated otherwise."""
    by_place: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for variant in variants:
        for seed, run in variant.runs.items():
            for place, evaluation in run.evaluations.items():
                by_place.setdefault(place, []).append(
                    (f"{variant.label}, seed {seed}", _settings(evaluation))
                )
    usual, findings = {}, []
    for place, found in by_place.items():
        usual[place] = Counter(settings for _, settings in found).most_common(1)[0][0]
        others = [name for name, settings in found if settings != usual[place]]
        if others:
            text = f"{'; '.join(others)} on {place[1]}: other prompts, base, sampler or judge than most; left out"
            findings.append(Finding("evaluated otherwise", text))
    return usual, findings


def _settings(evaluation: Evaluation) -> str:
    """What evaluations must share to be compared, as text."""
    results = evaluation.results
    benchmark = {k: v for k, v in results["benchmark"].items() if k != "published"}
    counts = {
        split: {task: next(iter(row.values()))["prompts"] for task, row in next(iter(parts.values())).items()}
        for split, parts in results["scores"].items()
    }
    kept = [benchmark, results["settings"].get("base"), results.get("judge"), counts]
    return json.dumps(kept, sort_keys=True)


def _title(key: _Key) -> str:
    checkpoint = "" if key.checkpoint == FINAL else f", {key.checkpoint} checkpoint"
    return f"{key.benchmark}, {key.split}: {key.part}{checkpoint}"


def _short(key: _Key, several: bool) -> str:
    words = [key.benchmark] if several else []
    words += [key.split, key.part] + ([] if key.checkpoint == FINAL else [f"({key.checkpoint})"])
    return " ".join(words)
