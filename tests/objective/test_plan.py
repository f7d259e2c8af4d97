"""The plans' term against a loop over tokens in float64, by hand, and in micro-batches."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from stage.objective.metrics import merge_metrics
from stage.objective.plan import plan_loss
from stage.types import Plans, Rollout, TokenScores
from tests.objective.example import build, drifted, rollout, scores, some_rewards
from tests.objective.test_micro_batch import CUTS

LONGEST, WEIGHT = 4, 0.7


def planned(record: Rollout, weight: float = WEIGHT, seed: int = 5) -> Rollout:
    """The rollout with plans of 1 to LONGEST tokens, whose padding holds what must never count."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*record.old.logps.shape[:2], LONGEST)
    lengths = torch.randint(1, LONGEST + 1, shape[:2], generator=generator)
    mask = (torch.arange(LONGEST) < lengths[..., None]).long()

    def noise() -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return torch.where(mask.bool(), values, 0.0)

    old = TokenScores(noise() - 2.0 * mask, 3.0 * mask + noise())
    near = TokenScores(old.logps + 0.3 * noise(), old.entropy)
    return replace(
        record,
        old=replace(record.old, plan=old),
        reference=record.reference and replace(record.reference, plan=near),
        plans=Plans(mask, mask, old.logps + 0.5 * mask),
        plan_weight=weight,
    )


def moved(record: Rollout) -> tuple[TokenScores, Tensor, Tensor]:
    """Scores of a policy that has moved on, and their leaves: image and plan."""
    assert record.old.plan is not None and record.plans is not None
    generator = torch.Generator().manual_seed(9)
    step = torch.randn(record.old.plan.logps.shape, generator=generator, dtype=torch.float64)
    plan = (record.old.plan.logps + 0.3 * step * record.plans.mask).requires_grad_()
    image = drifted(record)
    found = TokenScores(image, record.old.entropy, TokenScores(plan, record.old.plan.entropy))
    return found, image, plan


def text_term(record: Rollout, logps: Tensor, advantages: Tensor, beta: float, clip: float) -> Tensor:
    """The term of all groups, token by token."""
    assert record.plans is not None and record.old.plan is not None and record.reference is not None
    assert record.reference.plan is not None
    groups = []
    for p in range(logps.shape[0]):
        gain, kl, count = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64), 0
        for i in range(logps.shape[1]):
            for r in range(LONGEST):
                if record.plans.mask[p, i, r] == 0:
                    continue
                count += 1
                ratio = torch.exp(logps[p, i, r] - record.old.plan.logps[p, i, r].item())
                a = advantages[p, i].item()
                gain = gain + torch.min(ratio * a, torch.clamp(ratio, 1 - clip, 1 + clip) * a)
                apart = record.reference.plan.logps[p, i, r].item() - logps[p, i, r]
                kl = kl + torch.exp(apart) - apart - 1
        groups.append((-gain + beta * kl) / count)
    return torch.stack(groups).mean()


@pytest.mark.parametrize("name", ["grpo", "stage"])
@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_loss_is_image_term_plus_weighted_text_term(name: str, kind: str) -> None:
    record = rollout(scores(some_rewards(kind, 3, 5, seed=8)))
    with_plans, objective = planned(record), build(name, beta=0.3)
    credit, _ = objective.credit(with_plans)
    found, image, plan = moved(with_plans)
    loss, metrics = objective.loss(found, credit)
    got = torch.autograd.grad(loss, (image, plan))

    without, _ = objective.credit(record)
    assert without.plan is None and without.advantages.equal(credit.advantages)
    image_loss, image_metrics = objective.loss(TokenScores(image, record.old.entropy), without)
    text = text_term(with_plans, plan, credit.advantages, beta=0.3, clip=0.2)
    wanted = torch.autograd.grad(image_loss + WEIGHT * text, (image, plan))
    torch.testing.assert_close(loss, image_loss + WEIGHT * text, atol=1e-13, rtol=1e-12)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-14, rtol=1e-12)
    assert got[1].abs().max() > 1e-3
    assert metrics["plan/loss"].item() == pytest.approx(text.item(), rel=1e-12)
    # What is said of the images does not change, and without reasoning nothing is said of plans.
    assert not [key for key in image_metrics if key.startswith("plan/")]
    for key, value in image_metrics.items():
        assert key == "loss/total" or metrics[key].equal(value), key


@pytest.mark.parametrize("name", ["grpo", "stage"])
@pytest.mark.parametrize(("prompts", "samples"), CUTS)
def test_micro_batches_add_up(name: str, prompts: list[int], samples: list[int]) -> None:
    record = planned(rollout(scores(some_rewards("discrete", 3, 5, seed=8))))
    objective = build(name, beta=0.3)
    credit, _ = objective.credit(record)
    found, image, plan = moved(record)
    whole, expected = objective.loss(found, credit)
    gradients = torch.autograd.grad(whole, (image, plan))
    parts, total = [], torch.zeros((), dtype=torch.float64)
    assert found.plan is not None
    for rows in (slice(*ends) for ends in pairwise(prompts)):
        for columns in (slice(*ends) for ends in pairwise(samples)):
            cut = TokenScores(
                image[rows, columns],
                found.entropy[rows, columns],
                TokenScores(plan[rows, columns], found.plan.entropy[rows, columns]),
            )
            loss, metrics = objective.loss(cut, credit.micro_batch(rows, columns))
            loss.backward()
            total = total + loss.detach()
            parts.append(metrics)
    torch.testing.assert_close(total, whole.detach(), atol=1e-14, rtol=1e-13)
    for leaf, gradient in zip((image, plan), gradients, strict=True):
        torch.testing.assert_close(leaf.grad, gradient, atol=1e-15, rtol=1e-13)
    wanted = {key: value.item() for key, value in expected.items()}
    assert merge_metrics(parts) == pytest.approx(wanted, rel=1e-12, abs=1e-14)


def test_metrics_by_hand() -> None:
    """Plans of 1 and 3 tokens. Rewards 1 and 0: advantages a and -a. Ratios 2; 1, 1/2, 1. References equal."""
    record = rollout(scores([[1.0, 0.0]], ["geneval"]), length=2)
    mask = torch.tensor([[[1, 0, 0], [1, 1, 1]]])
    old = TokenScores(torch.full((1, 2, 3), -2.0, dtype=torch.float64), torch.zeros(1, 2, 3).double())
    assert record.reference is not None
    record = replace(
        record,
        old=replace(record.old, plan=old),
        reference=replace(record.reference, plan=old),
        plans=Plans(mask, mask, old.logps + 0.5),
        plan_weight=2.0,
    )
    objective = build("grpo", beta=0.1)
    credit, metrics = objective.credit(record)
    assert metrics["plan/sampling_gap"] == pytest.approx(0.5)
    # The padding of the first plan has a ratio of 100, which nothing may notice.
    ratio = torch.tensor([[[2.0, 100.0, 100.0], [1.0, 0.5, 1.0]]], dtype=torch.float64)
    plan = TokenScores(old.logps + ratio.log(), torch.tensor([[[4.0, 9.0, 9.0], [1.0, 2.0, 3.0]]]).double())
    loss, found = objective.loss(replace(record.old, plan=plan), credit)
    a = 0.5 / (0.5**0.5 + 1e-4)
    # k3 of a ratio x to an equal reference: 1/x + log x - 1
    log2 = torch.tensor(2.0).double().log().item()
    kl = ((0.5 + log2 - 1) + 0 + (2 - log2 - 1) + 0) / 4
    policy = -(1.2 * a - a - 0.8 * a - a) / 4
    assert {key: value.item() for key, value in found.items() if key.startswith("plan/")} == pytest.approx(
        {
            "plan/loss": policy + 0.1 * kl,
            "plan/length": 2.0,
            "plan/entropy": 10 / 4,
            "plan/ratio_max": 2.0,
            "plan/clip_fraction": 2 / 4,
            "plan/kl": kl,
        }
    )
    image = found["loss/policy"] + 0.1 * found["loss/kl"]
    assert loss.item() == pytest.approx(image.item() + 2 * (policy + 0.1 * kl))


def test_a_long_plan_weighs_more_than_a_short_one() -> None:
    """The mean runs over the tokens of the group: gradients 1/4 of a token each, not 1/2 and 1/6."""
    values = torch.zeros(1, 2, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]], dtype=torch.float64)
    plan_loss(values, None, mask, torch.tensor([4.0]).double(), beta=0.5, num_groups=1).backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad, -mask / 4, atol=0, rtol=0)


def test_weight_zero_leaves_the_gradient_of_the_images_alone() -> None:
    record = planned(rollout(scores([[0.0, 1.0, 1.0]])), weight=0.0)
    objective = build("stage", beta=0.3)
    credit, _ = objective.credit(record)
    found, _, plan = moved(record)
    loss, metrics = objective.loss(found, credit)
    (gradient,) = torch.autograd.grad(loss, plan)
    assert (gradient == 0).all() and metrics["plan/loss"] != 0


def test_no_kl_without_beta_or_reference() -> None:
    found = {}
    for beta, reference in ((0.0, True), (0.0, False)):
        record = planned(rollout(scores([[0.0, 1.0, 1.0]]), reference=reference))
        objective = build("grpo", beta=beta)
        credit, _ = objective.credit(record)
        _, metrics = objective.loss(moved(record)[0], credit)
        found[reference] = metrics
    assert "plan/kl" in found[True] and "plan/kl" not in found[False]
    assert found[True]["plan/loss"].equal(found[False]["plan/loss"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"plan_weight": None}, "needs their weight and their old scores"),
        ({"old": None}, "needs their weight and their old scores"),
    ],
)
def test_a_rollout_with_half_a_plan(change: dict[str, Any], words: str) -> None:
    record = planned(rollout(scores([[0.0, 1.0]])))
    change = {key: replace(record.old, plan=None) if key == "old" else value for key, value in change.items()}
    with pytest.raises(ValueError, match=words):
        build("grpo").credit(replace(record, **change))


def test_scores_without_the_plans_are_an_error() -> None:
    record = planned(rollout(scores([[0.0, 1.0]])))
    objective = build("grpo")
    credit, _ = objective.credit(record)
    with pytest.raises(ValueError, match=r"those of the plans \(1, 2, 4\), got None"):
        objective.loss(TokenScores(record.old.logps, record.old.entropy), credit)
