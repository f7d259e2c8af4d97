"""Scorers side by side: names, weights, reasons, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from stage.rewards.by_category import ByCategory
from stage.rewards.combine import Combine
from stage.score_checks import UnusableScores
from stage.types import ChecksPrompts, Prompt, Scorer, Scores

IMAGES = torch.zeros(2, 3, 4, 4, 3, dtype=torch.uint8)
PROMPTS = (Prompt(1, "one"), Prompt(2, "two"))


class Fixed:
    """The same parts for every call: part r of image (p, g) is `start + 100 p + 10 g + r`."""

    def __init__(self, start: float, names: tuple[str, ...], weights: tuple[float, ...]) -> None:
        self.start, self.names, self.weights = start, names, weights

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        p, g, r = torch.meshgrid(*map(torch.arange, (*images.shape[:2], len(self.names))), indexing="ij")
        reasons = tuple(tuple(f"{q.text}-{i}" for i in range(images.shape[1])) for q in prompts)
        return Scores(self.start + 100.0 * p + 10 * g + r, self.names, self.weights, reasons)


ONE = Fixed(0.0, ("partial", "strict"), (1.0, 0.0))
TWO = Fixed(0.5, ("score",), (3.0,))


def test_parts_lie_side_by_side() -> None:
    both = Combine({"shapes": ONE, "hps": TWO}, {"hps": 0.5, "shapes": 2.0})
    assert isinstance(both, Scorer)
    scores = both(IMAGES, PROMPTS)
    assert scores.names == ("shapes/partial", "shapes/strict", "hps/score")
    assert scores.weights == (2.0, 0.0, 1.5)  # 2 * 1, 2 * 0, 0.5 * 3
    assert scores.parts.shape == (2, 3, 3) and scores.parts.dtype == torch.float32
    assert scores.parts[1, 2].tolist() == [120.0, 121.0, 120.5]  # 100 + 20 + r, and 0.5 more
    assert scores.reasons[1][2] == "shapes: two-2; hps: two-2"
    # The weighted sum of image (1, 2) is 2 * 120 + 1.5 * 120.5.
    assert (scores.parts[1, 2] @ torch.tensor(scores.weights)).item() == pytest.approx(240 + 180.75)


def test_scorers_without_weights_have_no_provenance() -> None:
    weighted: Any = Fixed(0.0, ("score",), (1.0,))
    weighted.provenance = {"sha256": {"w.pt": "abc"}}
    inner = Combine({"a": ONE, "b": weighted}, {"a": 1.0, "b": 1.0})
    assert inner.provenance == {"b": {"sha256": {"w.pt": "abc"}}}
    assert Combine({"c": inner}, {"c": 1.0}).provenance == {"c": inner.provenance}


def test_combinations_nest() -> None:
    inner = Combine({"a": ONE}, {"a": 2.0})
    scores = Combine({"b": inner}, {"b": 3.0})(IMAGES, PROMPTS)
    with pytest.raises(ValueError, match="without '/'"):
        Combine({"b/a": ONE}, {"b/a": 1.0})
    assert scores.names == ("b/a/partial", "b/a/strict") and scores.weights == (6.0, 0.0)


@pytest.mark.parametrize(
    ("scorers", "weights", "words"),
    [
        ({}, {}, "at least one scorer"),
        ({"a": ONE}, {"a": 1.0, "b": 1.0}, r"weights without a scorer \['b'\]"),
        ({"a": ONE, "b": TWO}, {"a": 1.0}, r"scorers without a weight \['b'\]"),
        ({"": ONE}, {"": 1.0}, "non-empty word"),
        ({"a": 3}, {"a": 1.0}, "got 3 for 'a'"),
        ({"a": ONE}, {"a": float("nan")}, "finite"),
        ({"a": ONE}, {"a": float("inf")}, "finite"),
    ],
)
def test_lists_that_do_not_fit(scorers: dict[str, Any], weights: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Combine(scorers, weights)


def changed(**fields: Any) -> Callable[[Tensor, Sequence[Prompt]], Scores]:
    def score(images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        return Scores(**{**vars(ONE(images, prompts)), **fields})

    return score


def failing(images: Tensor, prompts: Sequence[Prompt]) -> Scores:
    raise RuntimeError("server is gone")


@pytest.mark.parametrize(
    ("scorer", "words"),
    [
        (failing, "'b' failed.*server is gone"),
        (changed(parts=torch.zeros(6, 2)), r"'b' gave \(6, 2\)"),
        (changed(names=("partial",)), "'b' gave"),
        (changed(weights=(1.0,)), "'b' gave"),
        (changed(reasons=()), "one reason.*'b' gave"),
        (changed(reasons=(("x",), ("y",))), "one reason.*'b' gave"),
        (changed(parts=torch.full((2, 3, 2), torch.nan)), "finite, 'b' gave"),
    ],
)
def test_the_scorer_at_fault_is_named(scorer: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Combine({"a": ONE, "b": scorer}, {"a": 1.0, "b": 1.0})(IMAGES, PROMPTS)


class Comparing(Fixed):
    compares_group = True


def test_one_scorer_that_compares_makes_the_combination_compare() -> None:
    inner = Combine({"a": Comparing(0.0, ("r",), (1.0,))}, {"a": 1.0})
    assert Combine({"one": ONE, "inner": inner}, {"one": 1.0, "inner": 1.0}).compares_group
    assert ByCategory("tag", {"x": "inner"}, {"inner": inner}).compares_group
    assert not Combine({"one": ONE, "two": TWO}, {"one": 1.0, "two": 1.0}).compares_group


class Picky(Fixed):
    """Cannot score prompts that begin with t."""

    def check(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            if prompt.text.startswith("t"):
                raise ValueError(f"{prompt.text!r} begins with t")


def test_prompts_are_checked_by_every_scorer_that_can() -> None:
    both = Combine({"a": ONE, "b": Picky(0.0, ("x",), (1.0,))}, {"a": 1.0, "b": 1.0})
    assert isinstance(both, ChecksPrompts) and not isinstance(ONE, ChecksPrompts)
    both.check(PROMPTS[:1])
    with pytest.raises(ValueError, match="b: 'two' begins with t"):
        both.check(PROMPTS)


def test_ranges_lie_side_by_side_and_are_held() -> None:
    ranged: Any = changed(parts=torch.full((2, 3, 2), 0.5), ranges=((0.0, 1.0), (0.0, 2.0)))
    scores = Combine({"a": ranged, "b": TWO}, {"a": 1.0, "b": 1.0})(IMAGES, PROMPTS)
    assert scores.ranges == ((0.0, 1.0), (0.0, 2.0), (-math.inf, math.inf))
    wrong: Any = changed(parts=torch.full((2, 3, 2), 1.5), ranges=((0.0, 1.0), (0.0, 2.0)))
    nested = Combine({"outer": Combine({"inner": wrong}, {"inner": 1.0})}, {"outer": 1.0})
    with pytest.raises(UnusableScores, match=r"'inner' gave: sample 0 of 'one' got 1.5") as caught:
        nested(IMAGES, PROMPTS)
    assert len(caught.value.images) == 6
