from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stage.objective.similarity import (
    ReleasedWeights,
    StageWeights,
    TokenWeights,
    advantage_weights,
    kl_weights,
    opposing,
)
from tests.objective import loop

KEPT = torch.tensor([True])


def weigh(slot: StageWeights | ReleasedWeights, advantages: list[float], codes: Tensor) -> TokenWeights:
    return slot(advantages=torch.tensor([advantages], dtype=torch.float64), kept=KEPT, codes=codes[None])


def test_opponents_have_the_other_sign_or_none() -> None:
    pairs = opposing(torch.tensor([[2.0, 1.0, -3.0, 0.0]]))[0].int().tolist()
    #        +2 +1 -3  0
    assert pairs == [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 0]]


def test_tiny_advantages_of_one_sign_are_not_opponents() -> None:
    # their product underflows to 0
    assert not opposing(torch.tensor([[1e-200, 1e-200]], dtype=torch.float64)).any()


def test_by_hand() -> None:
    # one position; sample 0 is good, 1 and 2 are bad; angles 0, 60 and 180 degrees, lengths play no part
    codes = torch.tensor([[[2.0, 0.0]], [[0.5, math.sqrt(0.75)]], [[-3.0, 0.0]]], dtype=torch.float64)
    found = weigh(StageWeights(), [1.0, -0.5, -0.5], codes)
    # s: (cos 60 + cos 180) / 2 = -0.25; the bad ones see the good one alone: 0.5 and -1
    expected = {"similarity": [-0.25, 0.5, -1.0], "advantage": [0.625, 0.25, 1.0], "kl": [0.875, 1.0, 0.5]}
    for name, values in expected.items():
        wanted = torch.tensor(values, dtype=torch.float64)[None, :, None]
        torch.testing.assert_close(getattr(found, name), wanted, atol=1e-15, rtol=0)


def test_weights_stay_in_range_when_rounding_passes_one() -> None:
    s = torch.tensor([1.0 + 1e-9, -1.0 - 1e-9], dtype=torch.float64)
    assert advantage_weights(s).tolist() == [0.0, 1.0]
    assert kl_weights(s).tolist() == [1.0, 0.5]


def test_without_opponents_nothing_is_alike() -> None:
    found = weigh(StageWeights(), [1.0, 1.0], torch.ones(2, 3, 2))
    assert not found.similarity.any()
    assert found.advantage.eq(0.5).all()
    assert found.kl.eq(1.0).all()


def test_a_zero_vector_is_like_no_other() -> None:
    codes = torch.tensor([[[0.0, 0.0]], [[1.0, 0.0]]])
    assert not weigh(StageWeights(), [1.0, -1.0], codes).similarity.any()


def test_released_counts_a_sample_of_zero_advantage_among_its_opponents() -> None:
    # all codes equal: every cosine is 1. Sample 2 has A = 0: (1 + 1) / 3 against 2 / 2
    codes = torch.ones(3, 1, 2, dtype=torch.float64)
    right = weigh(StageWeights(), [1.0, -1.0, 0.0], codes).similarity.flatten()
    released = weigh(ReleasedWeights(), [1.0, -1.0, 0.0], codes).similarity.flatten()
    torch.testing.assert_close(right, torch.ones(3, dtype=torch.float64), atol=1e-15, rtol=0)
    torch.testing.assert_close(released, torch.tensor([1.0, 1.0, 2 / 3]), atol=1e-7, rtol=0)


def test_released_without_a_kept_column_is_alike_everywhere() -> None:
    found = ReleasedWeights()(
        advantages=torch.zeros(1, 4), kept=torch.tensor([False]), codes=torch.randn(1, 4, 3, 2)
    )
    assert found.similarity.eq(1).all()
    assert not found.advantage.any()
    assert found.kl.eq(1).all()


@pytest.mark.parametrize("self_at_zero", [False, True])
@pytest.mark.parametrize("group", [2, 5, 8])
def test_equals_the_loop(self_at_zero: bool, group: int) -> None:
    advantages = torch.randint(-1, 2, (group,)).double().tolist()
    codes = torch.randn(group, 6, 4, dtype=torch.float64)
    slot = ReleasedWeights() if self_at_zero else StageWeights()
    rows = loop.similarity(advantages, codes.tolist(), self_at_zero=self_at_zero)
    found = weigh(slot, advantages, codes).similarity[0].double()
    # the published code keeps cosines in float32
    tolerance = 2e-7 if self_at_zero else 1e-14
    torch.testing.assert_close(found, torch.tensor(rows, dtype=torch.float64), atol=tolerance, rtol=0)


def test_groups_never_meet() -> None:
    advantages, codes = torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 4, 3, 5, dtype=torch.float64)
    together = StageWeights()(advantages=advantages, kept=torch.tensor([True, True]), codes=codes)
    for prompt in range(2):
        alone = StageWeights()(advantages=advantages[[prompt]], kept=KEPT, codes=codes[[prompt]])
        torch.testing.assert_close(together.similarity[[prompt]], alone.similarity, atol=1e-15, rtol=0)
