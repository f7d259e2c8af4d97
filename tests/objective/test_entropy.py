from __future__ import annotations

import pytest
import torch

from stage.objective.entropy import closeness, entropy_reward


def test_closeness_by_hand() -> None:
    # mean entropies over t: 1 and 4; of the reference 2 and 4: e = 1 / (1 + 1), 1 / (1 + 0)
    policy = torch.tensor([[[0.0, 2.0], [3.0, 5.0]]])
    reference = torch.tensor([[[1.0, 3.0], [5.0, 3.0]]])
    assert closeness(policy, reference).tolist() == [[0.5, 1.0]]


def test_reward_by_hand() -> None:
    # best samples 0, 2, 3 with e = 0.5, 1.0, 0.3: mean 0.6, times 0.4: -0.04, 0.16, -0.12
    best = torch.tensor([[True, False, True, True]])
    e = torch.tensor([[0.5, 0.9, 1.0, 0.3]], dtype=torch.float64)
    expected = torch.tensor([[-0.04, 0.0, 0.16, -0.12]], dtype=torch.float64)
    torch.testing.assert_close(entropy_reward(best, e, 0.4), expected, atol=1e-15, rtol=0)


def test_one_best_sample_gets_exactly_nothing() -> None:
    best = torch.tensor([[False, True, False]])
    assert not entropy_reward(best, torch.rand(1, 3, dtype=torch.float64), 0.4).any()


@pytest.mark.parametrize("size", [3, 7, 8])
def test_equal_closeness_gives_exactly_nothing(size: int) -> None:
    e = torch.full((1, size), 0.1, dtype=torch.float64)
    assert not entropy_reward(torch.ones(1, size, dtype=torch.bool), e, 0.4).any()


def test_groups_have_their_own_mean() -> None:
    best = torch.tensor([[True, True], [True, True]])
    e = torch.tensor([[0.2, 0.4], [0.8, 1.0]], dtype=torch.float64)
    expected = torch.tensor([[-0.1, 0.1], [-0.1, 0.1]], dtype=torch.float64)
    torch.testing.assert_close(entropy_reward(best, e, 1.0), expected, atol=1e-15, rtol=0)
