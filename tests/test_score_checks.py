"""Scores that are no numbers or lie outside of their range stop training, with the images that caused it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from stage.score_checks import UnusableScores, check_values
from stage.types import Prompt, Scores

IMAGES = torch.arange(6, dtype=torch.uint8).view(2, 3, 1, 1, 1).expand(2, 3, 4, 4, 3).contiguous()
PROMPTS = (Prompt(1, "one"), Prompt(2, "two"))


def scores(
    *changes: tuple[int, int, int, float], ranges: Sequence[tuple[float, float]] | None = None
) -> Scores:
    parts = torch.full((2, 3, 2), 0.5)
    for p, g, r, value in changes:
        parts[p, g, r] = value
    return Scores(
        parts, ("a", "b"), (1.0, 0.0), ((("",) * 3),) * 2, None if ranges is None else tuple(ranges)
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_comes_with_its_images(value: float) -> None:
    with pytest.raises(UnusableScores) as caught:
        check_values(scores((1, 0, 0, value), (0, 2, 1, value), (0, 2, 0, value)), IMAGES, PROMPTS, "'hps'")
    # Images 2 = (0, 2) and 3 = (1, 0), one note each, in the order of the rollout.
    assert caught.value.images.shape == (2, 4, 4, 3)
    assert caught.value.images[:, 0, 0, 0].tolist() == [2, 3]
    assert caught.value.notes == (
        f"sample 2 of 'one' got {value} in part 'a'",
        f"sample 0 of 'two' got {value} in part 'a'",
    )
    assert str(caught.value).startswith("reward parts must be finite, 'hps' gave: sample 2 of 'one'")
    assert isinstance(caught.value, ValueError)  # one line at the end of a run


@pytest.mark.parametrize(
    ("value", "part", "wrong"),
    [
        (1.0, 0, False),
        (1.00001, 0, False),
        (1.01, 0, True),
        (-0.01, 0, True),
        (-9.0, 1, False),
        (1.5, 1, True),
    ],
)
def test_values_outside_of_the_range(value: float, part: int, wrong: bool) -> None:
    found = scores((1, 2, part, value), ranges=[(0.0, 1.0), (-math.inf, 1.0)])
    if not wrong:
        return check_values(found, IMAGES, PROMPTS, "x")
    with pytest.raises(
        UnusableScores, match=r"range that is stated.*sample 2 of 'two' got .* whose range is"
    ):
        check_values(found, IMAGES, PROMPTS, "x")


def test_without_ranges_any_number_is_one() -> None:
    check_values(scores((0, 0, 0, 1e9)), IMAGES, PROMPTS, "x")
    with pytest.raises(ValueError, match=r"one range, low and high, x gave .* for \('a', 'b'\)"):
        check_values(scores(ranges=[(0.0, 1.0)]), IMAGES, PROMPTS, "x")
