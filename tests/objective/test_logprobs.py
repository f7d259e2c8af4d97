from __future__ import annotations

import math

import pytest
import torch

from stage.objective.logprobs import token_scores


def test_by_hand() -> None:
    # softmax of log 1, log 1, log 2 is 1/4, 1/4, 1/2; entropy 2 * (1/4) log 4 + (1/2) log 2 = 1.5 log 2
    logits = torch.log(torch.tensor([[1.0, 1.0, 2.0], [1.0, 1.0, 2.0]], dtype=torch.float64))
    found = token_scores(logits, torch.tensor([0, 2]), temperature=1.0)
    expected = torch.tensor([-math.log(4), -math.log(2)], dtype=torch.float64)
    torch.testing.assert_close(found.logps, expected, atol=1e-15, rtol=0)
    entropy = torch.full((2,), 1.5 * math.log(2), dtype=torch.float64)
    torch.testing.assert_close(found.entropy, entropy, atol=1e-15, rtol=0)


def test_temperature_by_hand() -> None:
    # at temperature 1/2 the odds 1 : 2 become 1 : 4
    logits = torch.log(torch.tensor([[1.0, 2.0]], dtype=torch.float64))
    found = token_scores(logits, torch.tensor([1]), temperature=0.5)
    torch.testing.assert_close(
        found.logps.exp(), torch.tensor([0.8], dtype=torch.float64), atol=1e-15, rtol=0
    )


@pytest.mark.parametrize("rows", [1, 7, 30, 1000])
def test_equals_log_softmax_for_any_chunk(rows: int) -> None:
    logits = torch.randn(2, 3, 5, 17, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, 17, (2, 3, 5))
    weights = torch.randn(2, 3, 5, dtype=torch.float64)
    expected = (logits / 1.7).log_softmax(-1)
    entropy = -(expected.exp() * expected).sum(-1)
    expected = expected.gather(-1, tokens[..., None])[..., 0]
    found = token_scores(logits, tokens, temperature=1.7, rows=rows)
    torch.testing.assert_close(found.logps, expected, atol=1e-14, rtol=0)
    torch.testing.assert_close(found.entropy, entropy, atol=1e-14, rtol=0)
    (wanted,) = torch.autograd.grad((weights * expected).sum(), logits)
    (gradient,) = torch.autograd.grad((weights * found.logps).sum(), logits)
    torch.testing.assert_close(gradient, wanted, atol=1e-14, rtol=0)


def test_gradient_by_finite_differences() -> None:
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([0, 3, 5, 5])
    assert torch.autograd.gradcheck(
        lambda x: token_scores(x, tokens, temperature=0.8, rows=3).logps, (logits,)
    )


def test_entropy_carries_no_gradient() -> None:
    logits = torch.randn(4, 6, requires_grad=True)
    found = token_scores(logits, torch.zeros(4, dtype=torch.int64), temperature=1.0)
    assert found.logps.requires_grad
    assert not found.entropy.requires_grad


def test_bfloat16_is_accumulated_in_float32() -> None:
    # 16384 equal logits: log V = 9.704061 nats; a bfloat16 sum of ones stops growing at 256
    logits = torch.full((2, 16384), 3.0, dtype=torch.bfloat16, requires_grad=True)
    found = token_scores(logits, torch.tensor([0, 5]), temperature=1.0)
    assert found.logps.dtype == found.entropy.dtype == torch.float32
    expected = torch.full((2,), math.log(16384))
    torch.testing.assert_close(-found.logps, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.entropy, expected, atol=1e-5, rtol=0)
    (gradient,) = torch.autograd.grad(found.logps.sum(), logits)
    assert gradient.dtype == torch.bfloat16


def test_a_masked_token_adds_nothing_to_the_entropy() -> None:
    logits = torch.tensor([[0.0, 0.0, -math.inf]], requires_grad=True)
    found = token_scores(logits, torch.tensor([0]), temperature=1.0)
    torch.testing.assert_close(found.entropy, torch.tensor([math.log(2)]), atol=1e-6, rtol=0)
    (gradient,) = torch.autograd.grad(found.logps.sum(), logits)
    assert gradient.isfinite().all()


def test_unfit_arguments_raise() -> None:
    logits, tokens = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="shape of the logits without the vocabulary"):
        token_scores(logits, tokens[:1], temperature=1.0)
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature must be above 0"):
            token_scores(logits, tokens, temperature=temperature)
