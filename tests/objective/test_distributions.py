"""Divergences of whole distributions: by hand, by an independent loop in float64, and by finite differences."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stage.objective.distributions import (
    Comparison,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    WholeDistribution,
    linear_divergence,
)
from stage.objective.divergence import Clipped
from stage.types import TokenScores, map_tensors
from tests.objective.example import GRPO, build, rollout, scores

KINDS = (ReverseKL(), ForwardKL(), JensenShannon())
names = lambda kind: type(kind).__name__  # noqa: E731


def distributions(logits: Tensor) -> list[list[float]]:
    found = []
    for row in logits.tolist():
        weights = [math.exp(value - max(row)) for value in row]
        found.append([weight / math.fsum(weights) for weight in weights])
    return found


def loop(kind: WholeDistribution, policy: Tensor, reference: Tensor) -> list[float]:
    """The textbook sums over the vocabulary, number by number."""

    def kl(p: list[float], q: list[float]) -> float:
        return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

    found = []
    for p, r in zip(distributions(policy), distributions(reference), strict=True):
        m = [(a + b) / 2 for a, b in zip(p, r, strict=True)]
        found.append(
            {
                "ReverseKL": kl(p, r),
                "ForwardKL": kl(r, p),
                "JensenShannon": 0.5 * kl(p, m) + 0.5 * kl(r, m),
            }[names(kind)]
        )
    return found


def layers(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Comparison]:
    """Features `[2, 3, 5, 4]`, a layer from 4 to 7 with its bias, and those of a reference."""
    generator = torch.Generator().manual_seed(seed)
    mine, theirs = (
        [
            torch.randn(*shape, dtype=torch.float64, generator=generator)
            for shape in ((2, 3, 5, 4), (7, 4), (7,))
        ]
        for _ in range(2)
    )
    features, weight, bias = (tensor.requires_grad_() for tensor in mine)
    return features, weight, bias, Comparison(KINDS[0], *theirs)


def test_by_hand() -> None:
    # p = 1/2, 1/2 and r = 1/4, 3/4: KL(p||r) = log 2 - log(3) / 2, KL(r||p) = log(2) - H(r)
    features = torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    weight = torch.eye(2, dtype=torch.float64)
    theirs = torch.tensor([[[[0.0, math.log(3)]]]], dtype=torch.float64)
    entropy = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    middle = (0.375, 0.625)
    js = 0.5 * math.fsum(0.5 * math.log(0.5 / m) for m in middle)
    js += 0.5 * (0.25 * math.log(0.25 / middle[0]) + 0.75 * math.log(0.75 / middle[1]))
    for kind, expected in zip(
        KINDS, (math.log(2) - 0.5 * math.log(3), math.log(2) - entropy, js), strict=True
    ):
        found = linear_divergence(features, weight, None, Comparison(kind, theirs, weight, None), 1.0)
        torch.testing.assert_close(found.item(), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", KINDS, ids=names)
@pytest.mark.parametrize("rows", [1, 4, 30, 1000])
def test_equals_a_loop_over_the_vocabulary(kind: WholeDistribution, rows: int) -> None:
    features, weight, bias, other = layers()
    other = replace(other, kind=kind)
    found = linear_divergence(features, weight, bias, other, 1.7, rows)
    mine = (features @ weight.t() + bias).flatten(0, 2) / 1.7
    assert other.bias is not None
    theirs = (other.features @ other.weight.t() + other.bias).flatten(0, 2) / 1.7
    expected = torch.tensor(loop(kind, mine.detach(), theirs), dtype=torch.float64)
    torch.testing.assert_close(found.flatten(), expected, atol=1e-13, rtol=0)
    assert found.shape == features.shape[:-1]


@pytest.mark.parametrize("kind", KINDS, ids=names)
def test_gradient_by_finite_differences(kind: WholeDistribution) -> None:
    features, weight, bias, other = layers()
    temperature = torch.linspace(0.5, 2.0, 6, dtype=torch.float64).view(2, 3, 1)  # one a sample
    other = replace(other, kind=kind)
    assert torch.autograd.gradcheck(
        lambda x, w, b: linear_divergence(x, w, b, other, temperature, 4), (features, weight, bias)
    )


@pytest.mark.parametrize("kind", KINDS, ids=names)
def test_equal_distributions_are_no_distance_apart_and_have_no_gradient(kind: WholeDistribution) -> None:
    features, weight, bias, _ = layers()
    other = Comparison(kind, features.detach(), weight.detach(), bias.detach())
    found = linear_divergence(features, weight, bias, other, 1.0)
    (gradient,) = torch.autograd.grad(found.sum(), features)
    assert found.abs().max() < 1e-15 and gradient.abs().max() < 1e-14


@pytest.mark.parametrize("kind", KINDS, ids=names)
def test_a_token_without_probability_adds_nothing(kind: WholeDistribution) -> None:
    mine = torch.tensor([[0.0, 1.0, -math.inf]], dtype=torch.float64).log_softmax(-1)
    theirs = torch.tensor([[0.5, 0.0, -math.inf]], dtype=torch.float64).log_softmax(-1)
    expected = kind.value(mine[:, :2], theirs[:, :2])
    torch.testing.assert_close(kind.value(mine, theirs), expected, atol=1e-15, rtol=0)
    assert kind.slope(mine, theirs).isfinite().all() and kind.slope(mine, theirs)[0, 2] == 0


def test_the_divergence_of_jensen_and_shannon_is_at_most_log_2() -> None:
    apart = torch.tensor([[60.0, 0.0], [0.0, 60.0]], dtype=torch.float64).log_softmax(-1)
    found = JensenShannon().value(apart[:1], apart[1:])
    torch.testing.assert_close(found, torch.full_like(found, math.log(2)), atol=1e-12, rtol=0)


def test_estimators_mean_what_is_summed_here() -> None:
    """The value of k3 is that of the reverse KL in expectation over tokens, its gradient that of the forward KL."""
    features, weight, bias, other = layers()
    mine = (features @ weight.t() + bias).log_softmax(-1)
    assert other.bias is not None
    theirs = (other.features @ other.weight.t() + other.bias).log_softmax(-1)
    difference = theirs - mine
    k3 = difference.exp() - difference - 1
    value = (mine.exp() * k3).sum(-1)
    reverse = linear_divergence(features, weight, bias, replace(other, kind=ReverseKL()), 1.0)
    torch.testing.assert_close(reverse, value, atol=1e-13, rtol=0)
    forward = linear_divergence(features, weight, bias, replace(other, kind=ForwardKL()), 1.0)
    (wanted,) = torch.autograd.grad((mine.exp().detach() * k3).sum(), features, retain_graph=True)
    (gradient,) = torch.autograd.grad(forward.sum(), features)
    torch.testing.assert_close(gradient, wanted, atol=1e-12, rtol=0)


def test_float32_agrees_with_float64_for_a_codebook() -> None:
    generator = torch.Generator().manual_seed(0)
    features, theirs = torch.randn(2, 8, 16, dtype=torch.float64, generator=generator)
    weight = torch.randn(16384, 16, dtype=torch.float64, generator=generator) / 4
    for kind in KINDS:
        wide = linear_divergence(features, weight, None, Comparison(kind, theirs, weight, None), 1.0)
        narrow = [tensor.float() for tensor in (features, weight, theirs)]
        other = Comparison(kind, narrow[2], narrow[1], None)
        found = linear_divergence(narrow[0], narrow[1], None, other, 1.0, rows=3)
        torch.testing.assert_close(found.double(), wide, atol=1e-5, rtol=1e-5)


def test_unfit_arguments_raise() -> None:
    features, weight, bias, other = layers()
    with pytest.raises(ValueError, match="position by position over one vocabulary"):
        linear_divergence(features[:1], weight, bias, other, 1.0)
    with pytest.raises(ValueError, match="position by position over one vocabulary"):
        linear_divergence(features, weight[:5], bias[:5], other, 1.0)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        linear_divergence(features, weight, bias, other, 0.0)
    nothing = TokenScores(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="these scores hold none"):
        ReverseKL()(scores=nothing, reference=nothing)


def test_an_objective_puts_it_into_the_loss_with_its_weights() -> None:
    slot = {"_target_": "stage.objective.distributions.ForwardKL"}
    record = rollout(scores(torch.rand(2, 4, dtype=torch.float64)))
    for changes in (GRPO, {}):
        objective = build("stage", divergence=slot, beta=0.5, **changes)
        assert isinstance(objective.compared, ForwardKL)
        credit, _ = objective.credit(record)
        apart = torch.rand(record.old.logps.shape, dtype=torch.float64, requires_grad=True)
        found = TokenScores(record.old.logps, record.old.entropy, divergence=apart)
        loss, metrics = objective.loss(found, credit)
        m = torch.ones_like(apart) if credit.kl_weights is None else credit.kl_weights
        torch.testing.assert_close(metrics["loss/kl"], (m * apart).mean().detach(), atol=1e-14, rtol=0)
        torch.testing.assert_close(metrics["policy/kl"], apart.mean().detach(), atol=1e-14, rtol=0)
        (gradient,) = torch.autograd.grad(loss, apart)
        torch.testing.assert_close(gradient, 0.5 * m / m.numel(), atol=1e-15, rtol=0)


def test_nothing_is_asked_for_where_it_is_off() -> None:
    slot = {"_target_": "stage.objective.distributions.ReverseKL"}
    off = build("stage", divergence=slot, beta=0.0, reweight_kl=False)
    assert off.compared is None and build("stage").compared is None
    record = rollout(scores(torch.rand(2, 4, dtype=torch.float64)))
    _, metrics = off.loss(record.old, off.credit(record)[0])
    assert "policy/kl" not in metrics
    clipped = Clipped(of=ReverseKL(), most=0.5)
    assert isinstance(build("grpo", divergence=slot).compared, ReverseKL)
    assert isinstance(clipped.compared, ReverseKL)
    apart = map_tensors(record.old, torch.clone)
    apart = replace(
        apart, divergence=torch.linspace(0, 1, record.old.logps.numel()).view_as(record.old.logps)
    )
    assert clipped(scores=apart, reference=record.old).max() == 0.5
