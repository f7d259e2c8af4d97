"""Means over prompts with bootstrap intervals, and paired differences between two models.

The prompt is what is resampled: the images of one prompt are not independent of each other. The overall score is the
mean of the task means; its bootstrap resamples the prompts within each task, which keeps the number of prompts a task
has. A difference is paired: both models drew the same prompts with the same seeds, so one difference a prompt is
resampled. The resampling is scipy.stats.bootstrap's percentile method. Where all prompts of a task have one score, it
sees no spread and the interval has no width, which is a limit of the method and no certainty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import bootstrap

OVERALL = "overall"


@dataclass(frozen=True)
class Interval:
    """A mean over `prompts` prompts and its interval; `low` and `high` are None when there are too few to say."""

    mean: float
    low: float | None
    high: float | None
    prompts: int


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made: `confidence` in (0, 1), number of `resamples`, and the `seed` that repeats them."""

    confidence: float
    resamples: int
    seed: int

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1 or self.resamples < 1:
            raise ValueError(
                "an interval needs a confidence between 0 and 1 and at least one resample, got "
                f"{self.confidence} and {self.resamples}; 0.95 and 10000 are usual"
            )

    def mean_of_means(self, groups: Sequence[np.ndarray]) -> Interval:
        """The mean of the groups' means; `groups` are float `[prompts of the group]`.

        A group of one prompt has no spread to resample, so there is no interval then.
        """
        mean = float(np.mean([group.mean() for group in groups]))
        prompts = sum(len(group) for group in groups)
        if min(len(group) for group in groups) < 2:
            return Interval(mean, None, None, prompts)
        found = bootstrap(
            tuple(groups),
            _mean_of_means,
            n_resamples=self.resamples,
            batch=1000,
            vectorized=True,
            confidence_level=self.confidence,
            method="percentile",
            rng=np.random.default_rng(self.seed),
        ).confidence_interval
        return Interval(mean, float(found.low), float(found.high), prompts)

    def table(
        self, tasks: Mapping[str, np.ndarray], overall: Sequence[np.ndarray] | None = None
    ) -> dict[str, Interval]:
        """An interval for each task and, under "overall", for the mean of the means of `overall`, None: the tasks."""
        rows = {task: self.mean_of_means([values]) for task, values in tasks.items()}
        return {**rows, OVERALL: self.mean_of_means(list(tasks.values()) if overall is None else overall)}

    def paired(
        self,
        base: Mapping[str, np.ndarray],
        tuned: Mapping[str, np.ndarray],
        overall: tuple[Sequence[np.ndarray], Sequence[np.ndarray]] | None = None,
    ) -> dict[str, Interval]:
        """Intervals of tuned minus base, where entry n of a task is the same prompt in both.

        Args:
            overall: the groups of base and of tuned whose means are averaged to the overall score; None: the tasks.

        Raises ValueError when the two do not have the same tasks and prompts.
        """
        if {task: len(values) for task, values in base.items()} != {
            task: len(values) for task, values in tuned.items()
        }:
            raise ValueError(
                "a paired difference needs the same prompts on both sides, got "
                f"{ {t: len(v) for t, v in base.items()} } and { {t: len(v) for t, v in tuned.items()} }; "
                "evaluate both with the same prompt files"
            )
        groups = None if overall is None else [b - a for a, b in zip(*overall, strict=True)]
        return self.table({task: tuned[task] - base[task] for task in base}, groups)


def _mean_of_means(*groups: np.ndarray, axis: int = -1) -> Any:
    return sum(group.mean(axis=axis) for group in groups) / len(groups)
