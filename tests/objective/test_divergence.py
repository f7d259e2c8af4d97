from __future__ import annotations

import math

import torch

from stage.objective.divergence import K3, k3
from stage.types import TokenScores


def test_by_hand() -> None:
    # lr - lp = log 2: 2 - log 2 - 1; lr - lp = -log 2: 1/2 + log 2 - 1; equal: 0
    lp = torch.zeros(3, dtype=torch.float64)
    lr = torch.tensor([math.log(2), -math.log(2), 0.0], dtype=torch.float64)
    expected = torch.tensor([1 - math.log(2), math.log(2) - 0.5, 0.0], dtype=torch.float64)
    torch.testing.assert_close(k3(lp, lr), expected, atol=1e-15, rtol=0)


def test_gradient_by_hand() -> None:
    # d/dlp = 1 - exp(lr - lp): -1 for lr - lp = log 2
    lp = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(k3(lp, torch.tensor([math.log(2)], dtype=torch.float64)).sum(), lp)
    torch.testing.assert_close(gradient, torch.tensor([-1.0], dtype=torch.float64), atol=1e-15, rtol=0)


def test_float32_keeps_its_digits_close_to_the_reference() -> None:
    # d = 1e-4: d^2 / 2 + d^3 / 6 = 5.00017e-9; exp(d) - d - 1 in float32 would be 0 or 1e-7
    value = k3(torch.zeros(1), torch.full((1,), 1e-4))
    torch.testing.assert_close(value, torch.tensor([5.000167e-9]), atol=0, rtol=2e-3)


def test_slot_compares_log_probabilities() -> None:
    scores = TokenScores(torch.randn(1, 2, 3), torch.zeros(1, 2, 3))
    reference = TokenScores(torch.randn(1, 2, 3), torch.zeros(1, 2, 3))
    assert K3()(scores=scores, reference=reference).equal(k3(scores.logps, reference.logps))
