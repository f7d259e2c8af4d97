"""Means and intervals against hand arithmetic and full enumeration of the resamples."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from stage.benchmarks.intervals import Bootstrap, Interval

USUAL = Bootstrap(confidence=0.95, resamples=10_000, seed=0)


def array(*values: float) -> np.ndarray:
    return np.array(values)


def test_overall_is_the_mean_of_tasks_and_not_of_prompts() -> None:
    table = USUAL.table({"colors": array(1, 0, 1, 1), "counting": array(0.5, 0.0)})
    assert table["colors"].mean == 0.75
    assert table["counting"].mean == 0.25
    assert table["overall"].mean == 0.5  # of prompts it would be 3.5 / 6
    assert [row.prompts for row in table.values()] == [4, 2, 6]
    assert list(table) == ["colors", "counting", "overall"]


def test_interval_of_two_prompts_by_hand() -> None:
    # Resamples of (0, 1) have mean 0, 1/2, 1 with probability 1/4, 1/2, 1/4. Between the quantiles 0.3 and 0.7 lies
    # only 1/2; between 0.2 and 0.8 lies everything.
    values = [array(0, 1)]
    assert Bootstrap(0.4, 10_000, 0).mean_of_means(values) == Interval(0.5, 0.5, 0.5, 2)
    assert Bootstrap(0.6, 10_000, 0).mean_of_means(values) == Interval(0.5, 0.0, 1.0, 2)


def test_interval_of_two_tasks_is_that_of_all_resamples() -> None:
    # All 4^4 * 3^3 pairs of resamples, each task resampled by itself. The mean takes few values, and 5 % and 95 % of
    # the resamples end well inside of the steps at 7/24 (3.9 % to 9.5 %) and 21/24 (90.7 % to 98.2 %).
    first, second = array(0, 0, 1, 1), array(0, 1, 1)
    means = sorted(
        (sum(a) / 4 + sum(b) / 3) / 2 for a, b in product(product(first, repeat=4), product(second, repeat=3))
    )
    low, high = means[round(0.05 * len(means))], means[round(0.95 * len(means))]
    assert (round(24 * low), round(24 * high)) == (7, 21)
    found = Bootstrap(0.9, 10_000, 1).mean_of_means([first, second])
    assert found.mean == pytest.approx((1 / 2 + 2 / 3) / 2, abs=1e-12)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-12)


def test_difference_is_paired_by_prompt() -> None:
    # Every prompt gains a quarter: the pairs leave no doubt, though both scores alone are uncertain.
    base = {"colors": array(0, 0.25, 0.5, 0.75)}
    tuned = {"colors": base["colors"] + 0.25}
    assert USUAL.paired(base, tuned)["colors"] == Interval(0.25, 0.25, 0.25, 4)
    alone = USUAL.table(base)["colors"]
    assert alone.low is not None and alone.high is not None and alone.high - alone.low > 0.4


def test_difference_by_hand_where_one_prompt_falls() -> None:
    # Differences (1, -1): resamples have mean -1, 0, 1 with probability 1/4, 1/2, 1/4.
    found = Bootstrap(0.4, 10_000, 0).paired({"a": array(0, 1)}, {"a": array(1, 0)})
    assert found["a"] == Interval(0.0, 0.0, 0.0, 2)
    assert found["overall"] == found["a"]
    wide = Bootstrap(0.6, 10_000, 0).paired({"a": array(0, 1)}, {"a": array(1, 0)})
    assert wide["a"] == Interval(0.0, -1.0, 1.0, 2)


def test_sign_of_a_difference_is_tuned_minus_base() -> None:
    assert USUAL.paired({"a": array(0, 0)}, {"a": array(1, 1)})["a"].mean == 1.0


def test_one_prompt_has_a_mean_and_no_interval() -> None:
    assert USUAL.table({"a": array(1), "b": array(0, 1)})["a"] == Interval(1.0, None, None, 1)
    assert USUAL.table({"a": array(1), "b": array(0, 1)})["overall"] == Interval(0.75, None, None, 3)


def test_same_seed_same_interval() -> None:
    values = [np.random.default_rng(3).random(30)]
    assert USUAL.mean_of_means(values) == USUAL.mean_of_means(values)
    assert USUAL.mean_of_means(values) != Bootstrap(0.95, 10_000, 1).mean_of_means(values)


def test_different_prompts_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="same prompts on both sides"):
        USUAL.paired({"a": array(0, 1)}, {"a": array(0, 1, 1)})
    with pytest.raises(ValueError, match="same prompts on both sides"):
        USUAL.paired({"a": array(0, 1)}, {"b": array(0, 1)})


@pytest.mark.parametrize(("confidence", "resamples"), [(0, 10), (1, 10), (0.95, 0)])
def test_settings_that_make_no_interval(confidence: float, resamples: int) -> None:
    with pytest.raises(ValueError, match="confidence between 0 and 1"):
        Bootstrap(confidence, resamples, 0)
