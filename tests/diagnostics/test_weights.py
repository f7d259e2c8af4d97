"""What weights do, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from stage.diagnostics.weights import alignment, pull_of, weight_use
from stage.objective.similarity import weigh


def test_two_tokens_by_hand() -> None:
    """s = 1 and -0.5: w = 0 and 0.75, m = 1 and 0.75. One of two tokens carries all weight; half are held less."""
    similarity = torch.tensor([[[1.0, -0.5], [1.0, -0.5]]])
    weights = weigh(similarity)
    advantages, tokens = torch.tensor([[1.0, -1.0]]), torch.tensor([[[4, 1], [4, 2]]])
    found = weight_use(similarity, weights.advantage, weights.kl, advantages, tokens)
    assert found is not None and found.groups == 1
    assert found.similarity == 0.25 and found.weight == 0.375 and found.kl_weight == 0.875
    assert found.effective == pytest.approx(0.5) and found.freed == 0.5 and found.same_everywhere == 0.5


def test_groups_that_teach_nothing_do_not_count() -> None:
    similarity = torch.tensor([[[1.0], [1.0]], [[0.0], [0.0]]])
    weights, tokens = weigh(similarity), torch.zeros(2, 2, 1)
    found = weight_use(
        similarity, weights.advantage, weights.kl, torch.tensor([[1.0, -1.0], [0.0, 0.0]]), tokens
    )
    assert found is not None and found.similarity == 1.0 and found.groups == 1
    assert found.effective == 0.0  # every weight of the group is 0
    assert weight_use(similarity, weights.advantage, weights.kl, torch.zeros(2, 2), tokens) is None


def test_pull_by_hand() -> None:
    """|A| = 2 and 1, p = 1 and 1/2: pulls 0, 1 and 0, 1/2. Two tokens hold it all; weights 1/4 and 3/4 turn
    (2/3, 1/3) into (2/5, 3/5) and move 4/15.
    """
    logps = torch.tensor([[[0.0, math.log(0.5)], [0.0, math.log(0.5)]]])
    similarity = torch.tensor([[[1.0, 0.5], [1.0, -0.5]]])
    weights = torch.tensor([[[9.0, 0.25], [9.0, 0.75]]])
    found = pull_of(similarity, weights, torch.tensor([[2.0, -1.0]]), logps)
    assert found is not None and found.tokens == 0.5
    assert found.similarity == pytest.approx((1 * 0.5 - 0.5 * 0.5) / 1.5)
    assert found.moved == pytest.approx(4 / 15)
    assert pull_of(similarity, weights, torch.zeros(1, 2), logps) is None
    equal = pull_of(similarity, torch.ones_like(weights), torch.tensor([[2.0, -1.0]]), logps)
    assert equal is not None and equal.moved == pytest.approx(0.0)


def test_correlation() -> None:
    rising = torch.arange(6.0).reshape(1, 2, 3)
    assert alignment(rising, -2 * rising + 1) == pytest.approx(-1.0)
    assert alignment(rising, torch.ones_like(rising)) is None
