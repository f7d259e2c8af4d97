"""Every prompt goes to the scorer of its category, and its scores come back to its place."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from stage.rewards.by_category import ByCategory
from stage.types import Prompt, Scores

PROMPTS = tuple(Prompt(n, f"prompt {n}", {"category": name}) for n, name in enumerate("abcab"))


class Scaled:
    """`factor` times the first pixel, and a part that is logged only."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.provenance = {"factor": factor}

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        found = images[:, :, 0, 0, 0].float() * self.factor
        reasons = tuple(
            tuple(f"{prompt.text} x{self.factor}" for _ in group)
            for prompt, group in zip(prompts, found, strict=True)
        )
        return Scores(torch.stack([found, found + 100], -1), ("mine", "other"), (1.0, 0.0), reasons)


def made() -> ByCategory:
    return ByCategory(
        "category", {"a": "one", "b": "two", "c": "one"}, {"one": Scaled(1), "two": Scaled(0.5)}
    )


def test_scores_come_back_to_their_prompts() -> None:
    images = torch.arange(10, dtype=torch.uint8).reshape(5, 2, 1, 1, 1).expand(5, 2, 1, 1, 3)
    scores = made()(images, PROMPTS)
    # Pixels (0 1) (2 3) (4 5) (6 7) (8 9); b is halved.
    assert scores.parts[..., 0].tolist() == [[0, 1], [1, 1.5], [4, 5], [6, 7], [4, 4.5]]
    assert [reasons[0] for reasons in scores.reasons] == [
        f"prompt {n} x{factor}" for n, factor in enumerate((1, 0.5, 1, 1, 0.5))
    ]
    assert scores.names == ("score",) and made().provenance == {"one": {"factor": 1}, "two": {"factor": 0.5}}


def test_a_category_without_a_scorer() -> None:
    with pytest.raises(ValueError, match="scorers for the category a, b, c, 'x' has 'None'"):
        made().check([Prompt(1, "x")])
    with pytest.raises(ValueError, match="categories name the scorers that there are"):
        ByCategory("category", {"a": "one"}, {"two": Scaled(1)})


def test_a_scorer_that_does_not_know_its_answers_is_named() -> None:
    class Blind(Scaled):
        def self_check(self) -> None:
            raise ValueError("sees nothing")

    made().self_check()  # of scorers without one there is nothing to ask
    with pytest.raises(ValueError, match="two: sees nothing"):
        ByCategory("category", {"a": "one", "b": "two"}, {"one": Scaled(1), "two": Blind(1)}).self_check()
