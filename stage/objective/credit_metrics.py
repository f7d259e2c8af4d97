"""What a rollout says before anything is learned from it: rewards, advantages and weights as metrics."""

from __future__ import annotations

import torch
from torch import Tensor

from stage.objective import advantage as advantages_of
from stage.objective.advantage import Advantages
from stage.objective.credit import Credit
from stage.objective.metrics import TensorMetrics
from stage.types import Rollout, Scores


def share_of_active(found: Advantages) -> Tensor:
    """Share of the groups in which the entropy reward was not 0 throughout."""
    bonus = torch.zeros_like(found.values) if found.bonus is None else found.bonus
    return (bonus != 0).any(dim=-1).double().mean()


def credit_metrics(rollout: Rollout, found: Advantages, credit: Credit) -> TensorMetrics:
    """Means over a rollout, 0-d tensors; `Objective.credit` says what each is."""
    rewards = advantages_of.task_rewards(rollout.scores)
    metrics = {
        "reward/mean": rewards.mean(),
        "reward/std": rewards.std(dim=-1).mean(),
        "reward/informative_groups": (~advantages_of.tied(rewards)).double().mean(),
        "advantage/abs_mean": found.values.abs().mean(),
        "advantage/max": found.values.abs().amax(),
        "policy/sampling_gap": (rollout.sampled_logps - rollout.old.logps).abs().mean(),
    }
    metrics |= _part_metrics(rollout.scores, found.contributions)
    if rollout.reference is not None:
        metrics["reference/entropy"] = rollout.reference.entropy.mean()
    if rollout.plans is not None and credit.plan is not None:
        gap = credit.plan.mask * (rollout.plans.logps - credit.plan.old_logps).abs()
        metrics["plan/sampling_gap"] = gap.sum() / credit.plan.total
    weights = {
        "weights/advantage_mean": credit.token_weights,
        "weights/kl_mean": credit.kl_weights,
        "weights/similarity_mean": credit.similarity,
    }
    return metrics | {name: tensor.mean() for name, tensor in weights.items() if tensor is not None}


def _part_metrics(scores: Scores, contributions: Tensor | None) -> TensorMetrics:
    """Each part as the scorer gave it and, where there are several, what was added up of it."""
    metrics = {f"reward/{name}": scores.parts[..., i].double().mean() for i, name in enumerate(scores.names)}
    if len(scores.names) > 1:
        added = advantages_of.weighted_parts(scores) if contributions is None else contributions
        for i, name in enumerate(scores.names):
            metrics[f"contribution/{name}"] = added[..., i].mean()
            metrics[f"contribution_std/{name}"] = added[..., i].std(dim=-1).mean()
    return metrics
