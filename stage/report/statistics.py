"""Differences between groups of runs, paired by seed, and what so many comparisons do to their significance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean of `n` values with its 95 % Student interval; the bounds are None for a single value."""

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """Paired by seed: its estimate, and the two-sided p of Student's paired test; None where it cannot be made."""

    estimate: Estimate
    p: float | None


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of at least one value, and the interval that Student's t with n - 1 degrees of freedom gives."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return Estimate(mean, None, None, n)
    half = quantile(n) * float(stats.sem(values))
    return Estimate(mean, mean - half, mean + half, n)


def quantile(n: int) -> float:
    """How many standard errors the interval of `n` values, at least two, reaches to either side."""
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))


def spread_estimate(values: Sequence[float]) -> Estimate:
    """As `estimate`, without bounds where all values are the same: an interval of no width would claim certainty."""
    found = estimate(values)
    return Estimate(found.mean, None, None, found.n) if _alike(values) else found


def _alike(values: Sequence[float]) -> bool:
    return bool(np.ptp(values) <= 1e-12 * max(1.0, float(np.max(np.abs(values)))))


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Values minus baseline over the seeds that both have; None where there is no such seed.

    p and interval are None for fewer than two seeds and for differences that are all the same, whose spread a test
    cannot know.
    """
    seeds = [seed for seed in values if seed in baseline]
    if not seeds:
        return None
    gaps = [values[seed] - baseline[seed] for seed in seeds]
    found = spread_estimate(gaps)
    if found.low is None:
        return Difference(found, None)
    return Difference(found, float(stats.ttest_1samp(gaps, 0.0).pvalue))


def holm(values: Sequence[float | None]) -> list[float | None]:
    """p-values adjusted for their number (Holm 1979, Scand. J. Statist. 6, 65-70); None stays and does not count.

    With the m known values in ascending order, adjusted p_(k) = max over j <= k of min(1, (m - j + 1) p_(j)): the
    chance that any of the m null hypotheses is rejected wrongly stays below the level.
    """
    order = sorted((value, place) for place, value in enumerate(values) if value is not None)
    adjusted: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, (value, place) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * value))
        adjusted[place] = largest
    return adjusted
