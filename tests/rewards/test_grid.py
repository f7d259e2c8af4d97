"""Grids of values with their limits."""

from __future__ import annotations

import pytest
import torch

from stage.rewards import grid
from stage.score_checks import UnusableScores
from stage.types import Prompt, Scores


def test_values_are_held_to_their_limits() -> None:
    images, prompts = torch.zeros(2, 2, 4, 4, 3, dtype=torch.uint8), (Prompt(0, "one"), Prompt(1, "two"))

    def fold(values: list[float], limits: tuple[float, float]) -> Scores:
        return grid.fold(torch.tensor(values), images, prompts, "abcd", limits, "git")

    scores = fold([0.0, 0.5, 1.004, -0.004], (0.0, 1.0))
    # A rounding error of half precision is cut off at the limit.
    assert scores.parts.tolist() == [[[0.0], [0.5]], [[1.0], [0.0]]]
    assert scores.reasons == (("a", "b"), ("c", "d")) and scores.ranges == ((0.0, 1.0),)
    for wrong in (1.5, -0.2, float("nan"), float("inf")):
        with pytest.raises(UnusableScores, match=r"git gave: sample 0 of 'two' got"):
            fold([0.0, 0.5, wrong, 0.1], (0.0, 1.0))
    with pytest.raises(UnusableScores, match="finite"):
        fold([0.0, 0.5, float("inf"), 0.1], (-float("inf"), float("inf")))
