"""Losses, gradients and metrics of micro-batches add up to those of the whole rollout."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from stage.objective.metrics import is_maximum, merge_metrics
from stage.types import TokenScores
from tests.objective.example import build, drifted, rollout, scores, some_rewards

CUTS = [
    ([0, 3], [0, 5]),
    ([0, 1, 2, 3], [0, 5]),
    ([0, 2, 3], [0, 5]),
    ([0, 3], [0, 1, 5]),
    ([0, 1, 3], [0, 2, 3, 5]),
    ([0, 1, 2, 3], [0, 1, 2, 3, 4, 5]),
]


GAP = {"_target_": "stage.objective.penalty.EntropyGap", "coefficient": 0.5}
NAMES = ["grpo", "stage", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "gcpo"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("prompts", "samples"), CUTS)
@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_parts_add_up(name: str, prompts: list[int], samples: list[int], kind: str) -> None:
    record = rollout(scores(some_rewards(kind, 3, 5, seed=8)), length=4 if name == "gcpo" else 5)
    shares = {f"critical_tokens.{key}": 0.25 for key in ("early", "entropy", "variety")}
    switches = {"penalty": GAP, "reweight_advantage": True} if name not in ("grpo", "stage") else {}
    objective = build(name, beta=0.3, **(shares if name == "gcpo" else {}), **switches)
    credit, _ = objective.credit(record)
    logps, entropy = drifted(record), record.old.entropy.clone().requires_grad_()
    whole, expected = objective.loss(TokenScores(logps, entropy), credit)
    (gradient,) = torch.autograd.grad(whole, logps)

    parts, total = [], torch.zeros((), dtype=torch.float64)
    for rows in (slice(*ends) for ends in pairwise(prompts)):
        for columns in (slice(*ends) for ends in pairwise(samples)):
            cut = TokenScores(logps[rows, columns], entropy[rows, columns])
            loss, metrics = objective.loss(cut, credit.micro_batch(rows, columns))
            loss.backward()
            total = total + loss.detach()
            parts.append(metrics)
    torch.testing.assert_close(total, whole.detach(), atol=1e-14, rtol=1e-13)
    torch.testing.assert_close(logps.grad, gradient, atol=1e-15, rtol=1e-13)
    merged = merge_metrics(parts)
    assert merged == pytest.approx(
        {key: value.item() for key, value in expected.items()}, rel=1e-12, abs=1e-14
    )


def test_a_part_keeps_the_sizes_and_divisors_of_the_whole() -> None:
    record = rollout(scores(some_rewards("continuous", 3, 5, seed=9)))
    credit, _ = build("stage").credit(record)
    part = credit.micro_batch(slice(1, 3), slice(4, 5))
    assert (part.num_groups, part.group_size, part.num_tokens) == (3, 5, 5)
    assert part.divisors.equal(credit.divisors[1:3])
    assert part.advantages.equal(credit.advantages[1:3, 4:5])
    assert credit.token_weights is not None and part.token_weights is not None
    assert part.token_weights.equal(credit.token_weights[1:3, 4:5])
    assert credit.reference is not None and part.reference is not None
    assert part.reference.entropy.equal(credit.reference.entropy[1:3, 4:5])
    assert part.reference_logps is not None and part.reference_logps.equal(credit.reference.logps[1:3, 4:5])


def test_merging_adds_and_takes_the_largest_where_the_name_says_so() -> None:
    parts = [{"a/ratio_max": torch.tensor(value), "loss/total": torch.tensor(value)} for value in (2.0, 3.0)]
    assert merge_metrics(parts) == {"a/ratio_max": 3.0, "loss/total": 5.0}
    assert is_maximum("advantage/max")
    assert not is_maximum("reward/climax")
    with pytest.raises(ValueError, match="at least one micro-batch"):
        merge_metrics([])


def test_metrics_by_hand() -> None:
    # two groups of two: rewards 1, 0 and 3, 3. Group means 0.5 and 3; stds sqrt(1/2) and 0
    record = rollout(scores([[1.0, 0.0], [3.0, 3.0]], ["geneval"]), length=2)
    objective = build("grpo", beta=0.0)
    credit, metrics = objective.credit(record)
    advantage = 0.5 / (0.5**0.5 + 1e-4)
    assert record.reference is not None
    assert metrics == pytest.approx(
        {
            "reward/mean": 1.75,
            "reward/std": 0.5**0.5 / 2,
            "reward/informative_groups": 0.5,
            "reward/geneval": 1.75,
            "advantage/abs_mean": advantage / 2,
            "advantage/max": advantage,
            "policy/sampling_gap": 0.25,
            "reference/entropy": record.reference.entropy.mean().item(),
        }
    )
    # ratios 2 and 1 of the good sample, 1/2 and 1 of the bad one: clipped to 1.2 and 0.8; a tie has A = 0
    ratio = torch.tensor([[[2.0, 1.0], [0.5, 1.0]], [[3.0, 1.0], [1.0, 1.0]]], dtype=torch.float64)
    logps = (record.old.logps + ratio.log()).requires_grad_()
    loss, found = objective.loss(TokenScores(logps, torch.full_like(ratio, 4.0)), credit)
    assert not any(value.requires_grad for value in found.values())
    k3 = (record.reference.logps - logps).exp() - (record.reference.logps - logps) - 1
    assert merge_metrics([found]) == pytest.approx(
        {
            # - (1.2 A + A - 0.8 A - A) / 4, half of it for two groups
            "loss/total": -0.4 * advantage / 4 / 2,
            "loss/policy": -0.4 * advantage / 4 / 2,
            "policy/entropy": 4.0,
            "policy/ratio_mean": 10.5 / 8,
            "policy/ratio_max": 3.0,
            "policy/clip_fraction": 2 / 8,
            "policy/kl": k3.mean().item(),
        }
    )
    assert loss.item() == pytest.approx(found["loss/total"].item())


def test_metrics_of_the_weights_and_of_the_entropy_reward() -> None:
    # rewards 1, 1, 0 and 2, 0, 0: the first group has two best samples, the second one
    record = rollout(scores([[1.0, 1.0, 0.0], [2.0, 0.0, 0.0]]))
    credit, metrics = build("stage", beta=0.5).credit(record)
    assert metrics["reward/entropy_active_groups"] == 0.5
    assert metrics["reward/informative_groups"] == 1.0
    assert metrics["reward/mean"] == pytest.approx(4 / 6)  # of the task, without the entropy reward
    for name, tensor in (
        ("weights/advantage_mean", credit.token_weights),
        ("weights/kl_mean", credit.kl_weights),
        ("weights/similarity_mean", credit.similarity),
    ):
        assert tensor is not None
        assert metrics[name] == pytest.approx(tensor.mean().item())
    _, found = build("stage", beta=0.5).loss(record.old, credit)
    assert credit.kl_weights is not None and credit.reference is not None
    apart = credit.reference.logps - record.old.logps
    k3 = apart.exp() - apart - 1
    assert found["loss/kl"].item() == pytest.approx((credit.kl_weights * k3).mean().item())
    assert found["policy/kl"].item() == pytest.approx(k3.mean().item())
    total = found["loss/policy"] + 0.5 * found["loss/kl"]
    assert found["loss/total"].item() == pytest.approx(total.item())
