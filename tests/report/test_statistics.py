"""Intervals over seeds, paired differences, and Holm's correction, against arithmetic done by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from stage.report.statistics import estimate, holm, paired, spread_estimate


def test_three_values_by_hand() -> None:
    """1, 2, 3: standard error 1/√3, and Student's 97.5 % quantile for two degrees of freedom is 4.302653."""
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2.0 and found.n == 3
    assert found.low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-5)
    assert found.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-5)


def test_one_value_has_no_interval() -> None:
    found = estimate([0.25])
    assert (found.mean, found.low, found.high, found.n) == (0.25, None, None, 1)


def test_differences_are_paired_by_seed() -> None:
    """Gaps 0.1, 0.3, 0.2 over the seeds 1, 2, 3: mean 0.2, std 0.1, t = 0.2 / (0.1 / √3) = 3.4641."""
    values = {3: 0.7, 1: 0.5, 2: 0.9, 9: 0.0}
    found = paired(values, {1: 0.4, 2: 0.6, 3: 0.5, 4: 1.0})
    assert found is not None and found.estimate.n == 3
    assert found.estimate.mean == pytest.approx(0.2)
    # Student's distribution with two degrees of freedom has a closed form: F(t) = 1/2 + t / (2 √(2 + t²)).
    t = 0.2 / (0.1 / math.sqrt(3))
    assert found.p == pytest.approx(2 * (0.5 - t / (2 * math.sqrt(2 + t * t))), abs=1e-9)


def test_where_there_is_nothing_to_test() -> None:
    assert paired({1: 0.5}, {2: 0.5}) is None
    alone = paired({1: 0.5}, {1: 0.25})
    assert alone is not None and alone.estimate.mean == 0.25 and alone.p is None
    same = paired({1: 0.5, 2: 0.6}, {1: 0.4, 2: 0.5})
    assert same is not None and same.p is None


def test_values_that_are_all_the_same_have_no_interval_of_no_width() -> None:
    """Two seeds of one score would otherwise read as certain, and a difference of theirs would be coloured as one."""
    found = spread_estimate([0.493, 0.493])
    assert (found.mean, found.low, found.high, found.n) == (0.493, None, None, 2)
    assert spread_estimate([1.0, 2.0, 3.0]) == estimate([1.0, 2.0, 3.0])
    same = paired({1: 0.5, 2: 0.6}, {1: 0.4, 2: 0.5})
    assert same is not None and same.estimate.low is None and same.estimate.high is None


def test_holm_by_hand() -> None:
    """0.01, 0.04, 0.03 in ascending order times 3, 2, 1: 0.03, 0.06, 0.04, and none may be below the one before."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.01, None, 0.5]) == [pytest.approx(0.02), None, pytest.approx(0.5)]
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == [] and holm([None]) == [None]


def test_holm_keeps_the_level_when_nothing_is_true() -> None:
    """Of 2,000 tables of five comparisons without any effect, about 5 % call one certain; uncorrected 20 %."""
    random = np.random.default_rng(0)
    draws = random.normal(size=(2000, 5, 5))
    p = stats.ttest_1samp(draws, 0.0, axis=2).pvalue
    corrected = np.mean([min(value for value in holm(list(row)) if value is not None) < 0.05 for row in p])
    assert corrected < 0.065 and np.mean((p < 0.05).any(axis=1)) > 0.18
