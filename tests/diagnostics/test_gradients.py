"""Gradients of single samples: they add up, their cosines are right, and the weights change what they change."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stage.diagnostics.gradients import (
    agreement,
    chosen_parameters,
    cosine,
    mean_sample_cosine,
    sample_gradients,
)
from stage.group_draws import Stopwatch
from stage.policy.reference import frozen_reference
from stage.policy.sampler import Sampler
from stage.rollout import collect, scored_distribution
from tests.tiny_training import PROMPTS, Redness, objective, tiny_base, tiny_policy


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A rollout of two prompts with three samples."""
    policy = tiny_policy(tiny_base(tmp_path_factory.mktemp("base"))).eval()
    sampler, stage = Sampler(guidance_scale=1.0, temperature=1.0), objective("stage", beta=0.5)
    with torch.no_grad():
        moved = frozen_reference(policy)
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.02)
    rollout = collect(
        policy,
        moved,
        sampler,
        Redness(),
        stage,
        PROMPTS[:2],
        update=0,
        seed=0,
        group_size=3,
        differentiable=False,
        beside=False,
        watch=Stopwatch(torch.device("cpu")),
    ).rollout
    return {"policy": policy, "rollout": rollout, "stage": stage, "sampler": sampler}


@pytest.mark.parametrize("with_kl", [True, False])
def test_they_add_up_to_the_gradient_of_the_rollout(world: dict[str, Any], with_kl: bool) -> None:
    policy, rollout, stage = world["policy"], world["rollout"], world["stage"]
    credit = stage.credit(rollout)[0]
    parameters, distribution = chosen_parameters(policy, None), scored_distribution(stage, world["sampler"])
    found = sample_gradients(policy, stage, rollout, credit, distribution, parameters, with_kl=with_kl)
    assert found.shape == (2, 3, sum(p.numel() for p in parameters))
    scores = policy.score(rollout.prompt_tokens, rollout.tokens, guidance_scale=1.0, temperature=1.0)
    whole, metrics = stage.loss(scores, credit)
    if not with_kl:
        kl = stage.divergence(scores=scores, reference=credit.reference)
        weighted = (kl * credit.kl_weights).sum(dim=(1, 2)) / credit.kl_divisors
        whole = whole - credit.beta * weighted.mean()
        assert weighted.mean().item() == pytest.approx(metrics["loss/kl"].item(), abs=1e-6)
    gradients = torch.autograd.grad(whole, parameters, allow_unused=True)
    flat = torch.cat(
        [
            torch.zeros(p.numel()) if g is None else g.flatten()
            for g, p in zip(gradients, parameters, strict=True)
        ]
    )
    assert torch.allclose(found.sum(dim=(0, 1)), flat, atol=1e-6, rtol=1e-4)
    assert float(flat.norm()) > 1e-3


def test_the_weights_change_the_gradient(world: dict[str, Any]) -> None:
    policy, rollout, stage = world["policy"], world["rollout"], world["stage"]
    plain = objective("stage", beta=0.5, reweight_advantage=False, reweight_kl=False)
    parameters, distribution = (
        chosen_parameters(policy, "layers.0"),
        scored_distribution(stage, world["sampler"]),
    )
    found = [
        sample_gradients(
            policy, each, rollout, each.credit(rollout)[0], distribution, parameters, with_kl=False
        )
        for each in (stage, plain)
    ]
    between = mean_sample_cosine(*found)
    assert between is not None and 0.2 < between < 0.9999
    assert mean_sample_cosine(found[0], found[0]) == pytest.approx(1.0)


def test_agreement_by_hand() -> None:
    """Right angles, opposites and equals: lengths 1, 1, 2 along x, y and -x, signs +, -, -."""
    gradients = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-2.0, 0.0]], [[0.0, 0.0]] * 3])
    found = agreement(gradients, torch.tensor([[1.0, -1.0, -1.0], [0.0, 0.0, 0.0]]))
    assert found.groups == 1
    assert found.opposite == pytest.approx((0.0 - 1.0) / 2) and found.alike == pytest.approx(0.0)
    assert found.surviving == pytest.approx(2**0.5 / 4)
    nothing = agreement(torch.zeros(1, 2, 3), torch.zeros(1, 2))
    assert (nothing.opposite, nothing.alike, nothing.surviving, nothing.groups) == (None, None, None, 0)


def test_cosine() -> None:
    assert cosine(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])) == pytest.approx(0.5**0.5)
    assert cosine(torch.tensor([1.0, 0.0]), torch.zeros(2)) is None
    assert mean_sample_cosine(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2)) is None


def test_parameters_are_chosen_by_name(world: dict[str, Any]) -> None:
    some, every = chosen_parameters(world["policy"], r"layers\.0\."), chosen_parameters(world["policy"], None)
    assert 0 < len(some) < len(every)
    with pytest.raises(ValueError, match="matches 'vision'"):
        chosen_parameters(world["policy"], "vision")
