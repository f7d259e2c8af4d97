"""Scores that torchmetrics holds: every planned image once, nothing averaged over what is missing."""

from __future__ import annotations

import math

import pytest
import torch
from torchmetrics import Metric

from stage.benchmarks.accumulate import PromptScores


def test_values_stand_where_they_belong_in_whatever_order_they_come() -> None:
    scores = PromptScores(2, 2, "strict")
    assert isinstance(scores, Metric)
    scores.update([1, 0], [0, 1], [0.25, 0.5])
    scores.update([0, 1], [0, 1], [1.0, 0.125])
    assert scores.compute().tolist() == [[1.0, 0.5], [0.25, 0.125]]


def test_one_image_is_a_table_too() -> None:
    scores = PromptScores(1, 1, "strict")
    scores.update([0], [0], [0.5])
    assert scores.table().tolist() == [[0.5]]


def test_states_of_two_processes_add_up_to_those_of_one() -> None:
    """As torchmetrics gathers them: both states are sums."""
    halves = [PromptScores(2, 1, "strict") for _ in range(2)]
    for prompt, half in enumerate(halves):
        half.update([prompt], [0], [prompt + 0.5])
    whole = halves[0]
    for name, add in whole._reductions.items():
        assert callable(add)
        setattr(whole, name, add(torch.stack([getattr(half, name) for half in halves])))
    assert whole.compute().tolist() == [[0.5], [1.5]]


@pytest.mark.parametrize(
    ("prompts", "samples", "values", "said"),
    [
        ([0, 0, 1], [0, 1, 0], [1, 1, 1], "each of 4 images: 1 have none, 0 have several, 0 are not finite"),
        ([0, 0, 1, 1, 1], [0, 1, 0, 1, 1], [1] * 5, "0 have none, 1 have several, 0 are not"),
        ([0, 0, 1, 1], [0, 1, 0, 1], [1, 1, math.nan, 1], "0 have none, 0 have several, 1 are not finite"),
        (
            [0, 2],
            [0, 0],
            [1, 1],
            "2 prompts of 2 images, 1 values are of others, the first of prompt 2, sample 0",
        ),
        ([0], [-1], [1], "1 values are of others"),
    ],
)
def test_gaps_and_repetitions_are_refused(
    prompts: list[int], samples: list[int], values: list[float], said: str
) -> None:
    scores = PromptScores(2, 2, "strict of base")
    with pytest.raises(ValueError, match=f"strict of base .*{said}"):
        scores.update(prompts, samples, values)
        scores.compute()
