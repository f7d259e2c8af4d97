from __future__ import annotations

import pytest
import torch

from stage.objective.surrogate import ClippedRatio, OnPolicyRatio, clipped_surrogate
from stage.types import TokenScores


def test_clip_by_hand() -> None:
    # bounds 0.8 and 1.3. A = 2: 0.5 stays, 1.5 is cut to 1.3. A = -2: 0.5 is cut to 0.8, 1.5 stays.
    ratio = torch.tensor([[[0.5, 1.0, 1.5], [0.5, 1.0, 1.5]]], dtype=torch.float64, requires_grad=True)
    found = clipped_surrogate(ratio, torch.tensor([[2.0, -2.0]], dtype=torch.float64), 0.2, 0.3)
    expected = torch.tensor([[[1.0, 2.0, 2.6], [-1.6, -2.0, -3.0]]], dtype=torch.float64)
    torch.testing.assert_close(found.values, expected, atol=1e-15, rtol=0)
    assert found.clipped.tolist() == [[[False, False, True], [True, False, False]]]
    # a clipped token has no gradient, every other has A
    (gradient,) = torch.autograd.grad(found.values.sum(), ratio)
    assert gradient.tolist() == [[[2.0, 2.0, 0.0], [0.0, -2.0, -2.0]]]


def test_ratio_is_taken_against_the_rollout() -> None:
    logps = torch.log(torch.tensor([[[0.2, 0.1]]], dtype=torch.float64))
    old = torch.log(torch.tensor([[[0.1, 0.1]]], dtype=torch.float64))
    slot = ClippedRatio()
    found = slot(
        scores=TokenScores(logps, logps),
        old_logps=old,
        advantages=torch.ones(1, 1),
        clip_low=0.2,
        clip_high=0.2,
    )
    torch.testing.assert_close(found.ratio, torch.tensor([[[2.0, 1.0]]], dtype=torch.float64))
    torch.testing.assert_close(found.values, torch.tensor([[[1.2, 1.0]]], dtype=torch.float64))


def test_no_advantage_has_no_gradient_even_when_clipped() -> None:
    ratio = torch.tensor([[[0.1, 1.0, 9.0]]], requires_grad=True)
    found = clipped_surrogate(ratio, torch.zeros(1, 1), 0.2, 0.2)
    (gradient,) = torch.autograd.grad(found.values.sum(), ratio)
    assert not gradient.any()
    assert not found.clipped.any()


def test_on_policy_ratio_is_one_with_the_gradient_of_the_log_probability() -> None:
    logps = torch.tensor([[[-3.0, -700.0]]], dtype=torch.float64, requires_grad=True)
    found = OnPolicyRatio()(
        scores=TokenScores(logps, logps.detach()),
        old_logps=torch.zeros(1, 1, 2),
        advantages=torch.tensor([[0.5]], dtype=torch.float64),
        clip_low=None,
        clip_high=None,
    )
    assert found.ratio.eq(1).all()
    assert not found.clipped.any()
    (gradient,) = torch.autograd.grad(found.values.sum(), logps)
    assert gradient.tolist() == [[[0.5, 0.5]]]


@pytest.mark.parametrize(
    ("low", "high"), [(None, 0.2), (0.2, None), (0.0, 0.2), (0.2, 0.0), (1.5, 0.2), (-0.2, 0.2)]
)
def test_clip_bounds_out_of_range_raise(low: float | None, high: float | None) -> None:
    with pytest.raises(ValueError, match="clipped ratio needs"):
        ClippedRatio().check({"clip_low": low, "clip_high": high})
