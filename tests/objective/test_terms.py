"""Estimators and bounds of the KL, its coefficient over time, terms on the entropy, and forms of the entropy reward."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from stage.objective.baselines import ProgressFilter
from stage.objective.divergence import K1, K2, K3, Clipped
from stage.objective.entropy import AbsoluteGap, EntropyReward, TokenGap
from stage.rewards.terms import Linear
from stage.types import Rollout, TokenScores
from tests.objective import loop
from tests.objective.example import build, drifted, rollout, scores, some_rewards

EXACT: dict[str, Any] = {"atol": 1e-12, "rtol": 1e-12}


def pair() -> tuple[TokenScores, TokenScores]:
    """lp - lr = log 2, -1 and 30 nats."""
    lr = torch.tensor([[[-3.0, -4.0, -40.0]]], dtype=torch.float64)
    lp = lr + torch.tensor([math.log(2), -1.0, 30.0], dtype=torch.float64)
    return TokenScores(lp.requires_grad_(), lr), TokenScores(lr, lr)


def test_estimators_by_hand() -> None:
    policy, reference = pair()
    k1, k2, k3 = (slot(scores=policy, reference=reference)[0, 0].tolist() for slot in (K1(), K2(), K3()))
    assert k1 == pytest.approx([math.log(2), -1.0, 30.0], abs=1e-12)
    assert k2 == pytest.approx([math.log(2) ** 2 / 2, 0.5, 450.0], abs=1e-9)
    assert k3 == pytest.approx([0.5 + math.log(2) - 1, math.e - 1 - 1, math.exp(-30) + 30 - 1], abs=1e-9)


def test_gradients_are_of_the_divergences_that_the_docstring_names() -> None:
    """Exact expectations over a vocabulary of 5: k1 0, k2 of KL(policy || reference), k3 of KL(reference || policy)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, dtype=torch.float64, generator=generator).requires_grad_()
    reference = torch.randn(5, dtype=torch.float64, generator=generator).log_softmax(0)
    policy = logits.log_softmax(0)
    p, r = policy.exp(), reference.exp()
    (reverse,) = torch.autograd.grad((p * (policy - reference)).sum(), logits, retain_graph=True)
    (forward,) = torch.autograd.grad((r * (reference - policy)).sum(), logits, retain_graph=True)
    for slot, wanted in ((K1(), torch.zeros_like(reverse)), (K2(), reverse), (K3(), forward)):
        scored = TokenScores(policy[None, None], policy[None, None])
        value = slot(scores=scored, reference=TokenScores(reference[None, None], reference[None, None]))
        (found,) = torch.autograd.grad((p.detach() * value[0, 0]).sum(), logits, retain_graph=True)
        torch.testing.assert_close(found, wanted, **EXACT)


def test_a_clipped_divergence_has_no_gradient_beyond_its_bound() -> None:
    policy, reference = pair()
    found = Clipped(of=K3(), most=10.0)(scores=policy, reference=reference)
    (gradient,) = torch.autograd.grad(found.sum(), policy.logps)
    plain = K3()(scores=policy, reference=reference)
    (free,) = torch.autograd.grad(plain.sum(), policy.logps)
    torch.testing.assert_close(found[0, 0, :2], plain[0, 0, :2], **EXACT)
    assert found[0, 0, 2] == 10.0 and gradient[0, 0, 2] == 0
    torch.testing.assert_close(gradient[..., :2], free[..., :2], **EXACT)
    below = Clipped(of=K1(), most=0.5)(scores=policy, reference=reference)
    assert below[0, 0].tolist() == pytest.approx([0.5, -0.5, 0.5])
    with pytest.raises(Exception, match="bound above 0 nats"):
        build("grpo", divergence={"_target_": "stage.objective.divergence.Clipped", "of": None, "most": 0.0})


def test_beta_follows_its_schedule() -> None:
    record = rollout(scores(some_rewards("discrete", 2, 4, seed=1)))
    line = {"_target_": "stage.rewards.terms.Linear", "start": 1.0, "end": 0.0, "first": 0, "last": 10}
    objective, plain = build("stage", beta=0.5, beta_schedule=line), build("stage", beta=0.5)
    for update, factor in ((0, 1.0), (3, 0.7), (10, 0.0), (50, 0.0)):
        moved = Rollout(**{**vars(record), "update": update})
        credit, metrics = objective.credit(moved)
        assert (
            metrics["loss/beta"] == pytest.approx(0.5 * factor) and Linear(1.0, 0.0, 0, 10)(update) == factor
        )
        found = TokenScores(drifted(record), record.old.entropy)
        loss, parts = objective.loss(found, credit)
        expected = (
            parts["loss/policy"] + 0.5 * factor * plain.loss(found, plain.credit(moved)[0])[1]["loss/kl"]
        )
        torch.testing.assert_close(loss.detach(), expected, **EXACT)
    with pytest.raises(Exception, match="beta_schedule multiplies beta, got beta=0"):
        build("grpo", beta=0.0, beta_schedule=line)


def penalised(
    kind: str, coefficient: float, **changes: Any
) -> tuple[Rollout, torch.Tensor, torch.Tensor, Any]:
    """A rollout, an entropy with gradient, the difference that a penalty makes to the loss, its metrics."""
    record = rollout(scores(some_rewards("discrete", 2, 3, seed=2)))
    slot = {"_target_": f"stage.objective.penalty.{kind}", "coefficient": coefficient}
    objective = build("stage", penalty=slot, **changes)
    entropy = (record.old.entropy + 0.5).requires_grad_()
    credit, _ = objective.credit(record)
    logps = drifted(record)
    loss, metrics = objective.loss(TokenScores(logps, entropy), credit)
    bare, _ = build("stage", **changes).loss(TokenScores(logps, entropy), credit)
    (gradient,) = torch.autograd.grad(loss, entropy)
    torch.testing.assert_close(loss - bare, metrics["loss/penalty"], **EXACT)
    return record, entropy, gradient, metrics


def test_entropy_bonus_equals_a_loop() -> None:
    _, entropy, gradient, metrics = penalised("EntropyBonus", 0.01)
    values = entropy.flatten().tolist()
    assert metrics["loss/penalty"].item() == pytest.approx(-0.01 * loop.mean(values), abs=1e-12)
    torch.testing.assert_close(gradient, torch.full_like(gradient, -0.01 / len(values)), **EXACT)


def test_entropy_gap_equals_a_loop() -> None:
    record, entropy, gradient, metrics = penalised("EntropyGap", 0.01)
    assert record.reference is not None
    gaps = [
        [loop.mean(e) - loop.mean(r) for e, r in zip(rows, others, strict=True)]
        for rows, others in zip(entropy.tolist(), record.reference.entropy.tolist(), strict=True)
    ]
    squares = [gap**2 for row in gaps for gap in row]
    assert metrics["loss/penalty"].item() == pytest.approx(0.01 * loop.mean(squares), abs=1e-12)
    # d/dH_it of 0.01 mean_i gap² = 0.01 * 2 gap_i / (6 samples * 5 tokens)
    expected = torch.tensor(gaps, dtype=torch.float64)[..., None].expand_as(gradient) * 0.02 / 30
    torch.testing.assert_close(gradient, expected, **EXACT)


def test_a_penalty_asks_for_a_reference_and_for_a_gradient() -> None:
    slot = {"_target_": "stage.objective.penalty.EntropyGap", "coefficient": 0.01}
    off = {"beta": 0.0, "entropy_coefficient": 0.0}
    assert build("grpo", penalty=slot, **off).needs_reference and not build("grpo", **off).needs_reference
    record = rollout(scores([[1.0, 0.0]]))
    objective = build("grpo", penalty=slot)
    credit, _ = objective.credit(record)
    with pytest.raises(ValueError, match="needs its gradient, got a detached entropy"):
        objective.loss(TokenScores(drifted(record), record.old.entropy), credit)
    with pytest.raises(Exception, match="coefficient above 0"):
        build("grpo", penalty={**slot, "coefficient": 0.0})


@pytest.mark.parametrize("kind", ["EntropyReward", "AbsoluteGap", "TokenGap"])
@pytest.mark.parametrize("best_only", [True, False])
def test_forms_of_the_entropy_reward_equal_a_loop(kind: str, best_only: bool) -> None:
    record = rollout(scores(some_rewards("discrete", 3, 6, seed=3)))
    assert record.reference is not None
    slot = {"EntropyReward": EntropyReward, "AbsoluteGap": AbsoluteGap, "TokenGap": TokenGap}[kind]
    rewards = record.scores.parts[..., 0]
    found = slot(best_only=best_only)(
        best=rewards == rewards.amax(-1, keepdim=True),
        entropy=record.old.entropy,
        reference_entropy=record.reference.entropy,
        coefficient=0.4,
    )
    for p in range(3):
        preferred = []
        for h, hr in zip(record.old.entropy[p].tolist(), record.reference.entropy[p].tolist(), strict=True):
            gap = loop.mean(hr) - loop.mean(h)
            preferred.append(
                {
                    "EntropyReward": 1 / (1 + gap**2),
                    "AbsoluteGap": -abs(gap),
                    "TokenGap": loop.mean([1 / (1 + (a - b) ** 2) for a, b in zip(h, hr, strict=True)]),
                }[kind]
            )
        row = rewards[p].tolist()
        among = [i for i in range(6) if not best_only or row[i] == max(row)]
        centre = loop.mean([preferred[i] for i in among])
        expected = [0.4 * (preferred[i] - centre) if i in among else 0.0 for i in range(6)]
        assert found[p].tolist() == pytest.approx(expected, abs=1e-12)


def test_a_progress_filter_lets_hard_groups_wait() -> None:
    # bars at update 0: best above 0.5, mean at least 0.3; half way: 0.25 and 0.15; then none
    rewards = scores([[1.0, 0.0, 0.0, 0.4], [1.0, 0.0, 0.0, 0.0], [0.4, 0.4, 0.2, 0.4], [0.2, 0.0, 0.0, 0.0]])
    slot = ProgressFilter(epsilon=1e-4, best=0.5, mean=0.3, until=10)
    plain = build("grpo").advantage(scores=rewards, bonus=None, tied_groups="raw").values
    for update, ready in ((0, [0]), (5, [0, 1, 2]), (10, [0, 1, 2, 3]), (99, [0, 1, 2, 3])):
        found = slot.at(update)(scores=rewards, bonus=None, tied_groups="raw")
        kept = torch.tensor([index in ready for index in range(4)])
        assert found.kept.equal(kept)
        assert found.values.equal(plain.masked_fill(~kept[:, None], 0.0))


def test_an_objective_moves_its_filter_along() -> None:
    slot = {"_target_": "stage.objective.baselines.ProgressFilter", "epsilon": 1e-4, "best": 0.5, "mean": 0.3}
    objective = build("stage", advantage={**slot, "until": 10})
    record = rollout(scores([[0.2, 0.0]]))
    later = Rollout(**{**vars(record), "update": 10})
    assert not objective.credit(record)[0].advantages.any() and objective.credit(later)[0].advantages.any()
    with pytest.raises(Exception, match="an update of at least 1"):
        build("stage", advantage={**slot, "until": 0})
