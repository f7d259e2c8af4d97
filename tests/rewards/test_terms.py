"""Gates and schedules of a combination, by hand and down to the weights of an update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from stage.rewards.combine import Combine
from stage.rewards.terms import Above, Linear, Step
from tests.rewards.test_combine import IMAGES, ONE, PROMPTS, TWO


def test_a_line_and_a_step_by_hand() -> None:
    line = Linear(start=1.0, end=0.2, first=10, last=50)
    assert [line(update) for update in (0, 10, 20, 30, 50, 999)] == pytest.approx([1, 1, 0.8, 0.6, 0.2, 0.2])
    step = Step(before=0.0, after=1.0, at=5)
    assert [step(update) for update in (0, 4, 5, 6)] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Linear(1.0, 0.0, 5, 5), "got first 5 and last 5"),
        (lambda: Linear(1.0, 0.0, -1, 5), "got first -1"),
        (lambda: Linear(1.0, float("nan"), 0, 5), "finite"),
        (lambda: Step(float("inf"), 0.0, 5), "finite"),
        (lambda: Step(1.0, 0.0, -5), "got -5"),
    ],
)
def test_schedules_that_are_none(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_a_gate_opens_by_another_part() -> None:
    # ONE's partial of image (p, g) is 100 p + 10 g: above 10 in (0, 2) and in all of prompt 1.
    both = Combine({"a": ONE, "b": TWO}, {"a": 1.0, "b": 1.0}, gates={"b": Above("a/partial", 10.0)})
    scores = both(IMAGES, PROMPTS)
    assert scores.gates is not None and scores.gates.dtype == torch.bool
    assert scores.gates[..., :2].all()
    assert scores.gates[..., 2].tolist() == [[False, False, True], [True, True, True]]
    assert torch.equal(
        scores.parts, Combine({"a": ONE, "b": TWO}, {"a": 1.0, "b": 1.0})(IMAGES, PROMPTS).parts
    )


def test_schedules_multiply_the_weights_of_an_update() -> None:
    inner = Combine({"x": ONE}, {"x": 3.0}, schedules={"x": Step(0.0, 1.0, 4)})
    outer = Combine({"in": inner, "b": TWO}, {"in": 2.0, "b": 1.0}, schedules={"in": Linear(1.0, 0.0, 0, 10)})
    scores = outer(IMAGES, PROMPTS)
    assert scores.weights == (6.0, 0.0, 3.0)  # TWO has a weight of 3 of its own
    assert scores.at(2).weights == (0.0, 0.0, 3.0)
    assert scores.at(5).weights == pytest.approx((3.0, 0.0, 3.0))
    assert scores.at(10).weights == (0.0, 0.0, 3.0)


def test_gates_nest() -> None:
    inner = Combine({"x": ONE, "y": TWO}, {"x": 1.0, "y": 1.0}, gates={"y": Above("x/partial", 0.0)})
    outer = Combine({"in": inner, "b": TWO}, {"in": 1.0, "b": 1.0}, gates={"in": Above("b/score", 10.6)})
    gates = outer(IMAGES, PROMPTS).gates
    assert gates is not None
    # b/score is 0.5, 10.5, 20.5: the outer gate leaves (0, 2) of prompt 0; the inner one shuts (0, 0) alone.
    assert gates[0].tolist() == [[False, False, False, True]] * 2 + [[True, True, True, True]]
    assert gates[1].all()


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ({"gates": {"c": Above("a/partial", 0.0)}}, r"gates belong to scorers .* got \['c'\]"),
        ({"schedules": {"c": Step(1.0, 0.0, 1)}}, r"schedules belong to scorers .* got \['c'\]"),
    ],
)
def test_terms_of_nobody(terms: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Combine({"a": ONE}, {"a": 1.0}, **terms)


def test_a_gate_that_looks_at_nothing() -> None:
    with pytest.raises(
        ValueError, match=r"gate of 'a' looks at a part .* got 'hps', parts are a/partial, a/strict"
    ):
        Combine({"a": ONE}, {"a": 1.0}, gates={"a": Above("hps", 0.0)})(IMAGES, PROMPTS)


def test_without_terms_scores_are_as_before() -> None:
    scores = Combine({"a": ONE}, {"a": 1.0})(IMAGES, PROMPTS)
    assert scores.gates is None and scores.schedules is None
