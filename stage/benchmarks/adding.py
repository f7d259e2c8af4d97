"""Verdicts added up: scores by split, part and task, with intervals over prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from stage.benchmarks.accumulate import PromptScores
from stage.benchmarks.benchmark import Benchmark
from stage.benchmarks.evaluation import Judged
from stage.benchmarks.intervals import Bootstrap

Tables = dict[str, dict[str, dict[str, Any]]]


def add_up(
    judged: Sequence[Judged], benchmark: Benchmark, splits: Sequence[str], bootstrap: Bootstrap
) -> dict[str, Tables]:
    """Scores by split, part and task: `{"validation": {"strict": {"colors": {"base": {mean, low, high}, ...}}}}`.

    Each row has one entry a role and, where both are there, `difference`: tuned minus base, paired by prompt; and
    `win_rate` where the benchmark asks for it.

    Raises ValueError, with counts, where a planned image has no verdict, or several.
    """
    parts = list(judged[0].verdict.parts)
    return {
        split: {
            part: _table([item for item in judged if item.split == split], benchmark, split, part, bootstrap)
            for part in parts
        }
        for split in splits
    }


def _table(
    judged: Sequence[Judged], benchmark: Benchmark, split: str, part: str, bootstrap: Bootstrap
) -> dict[str, dict[str, Any]]:
    """The rows of one split and part."""
    prompts = benchmark.prompts(split)
    values = {
        role: _values([item for item in judged if item.role == role], benchmark, split, part, role)
        for role in dict.fromkeys(item.role for item in judged)
    }
    means = {role: found.mean(axis=1).tolist() for role, found in values.items()}
    tasks = {role: benchmark.by_task(prompts, found) for role, found in means.items()}
    overall = {role: benchmark.overall(tasks[role], found) for role, found in means.items()}
    columns = {role: bootstrap.table(groups, overall[role]) for role, groups in tasks.items()}
    if {"base", "tuned"} <= columns.keys():
        both = (overall["base"], overall["tuned"])
        columns["difference"] = bootstrap.paired(tasks["base"], tasks["tuned"], both)
        if benchmark.win_rate:
            wins = [win_rate(*pair) for pair in zip(values["base"], values["tuned"], strict=True)]
            rows = benchmark.by_task(prompts, wins)
            columns["win_rate"] = bootstrap.table(rows, benchmark.overall(rows, wins))
    found_rows = next(iter(columns.values()))
    return {task: {column: asdict(table[task]) for column, table in columns.items()} for task in found_rows}


def win_rate(base: Sequence[float] | np.ndarray, tuned: Sequence[float] | np.ndarray) -> float:
    """The share of pairs in which tuned is above base, in [0, 1]; an equal pair counts half."""
    return float(np.mean((np.sign(np.subtract(tuned, base)) + 1) / 2))


def _values(judged: Sequence[Judged], benchmark: Benchmark, split: str, part: str, role: str) -> np.ndarray:
    """The values of `part` of all images of a role, float64 `[P, G]`."""
    name = f"{part} of {role} on {split}"
    scores = PromptScores(len(benchmark.prompts(split)), benchmark.images_per_prompt, name)
    scores.update(
        [item.index for item in judged],
        [item.sample for item in judged],
        [item.verdict.parts[part] for item in judged],
    )
    return scores.table()
