"""The entropy reward: among the best samples of a group, prefer those as uncertain as the reference model.

Source: STAGE, arXiv 2509.25027, entropy reward; krennic999/STAGE,
src/grpo/src/open_r1/trainer/grpo_trainer.py. Entropies are full-vocabulary, in nats, and carry no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor


def closeness(entropy: Tensor, reference_entropy: Tensor) -> Tensor:
    """`e_i = 1 / (1 + (mean_t Hr_it - mean_t H_it)^2)`: 1 where both entropies agree, towards 0 as they part.

    Args:
        entropy: `[P, G, L]` of the policy that sampled, nats.
        reference_entropy: `[P, G, L]` of the reference model on the same tokens, nats.

    Returns:
        `[P, G]` float64 in (0, 1].
    """
    gap = reference_entropy.double().mean(dim=-1) - entropy.double().mean(dim=-1)
    return 1.0 / (1.0 + gap.square())


def entropy_reward(best: Tensor, closeness: Tensor, coefficient: float) -> Tensor:
    """`coefficient * (e_i - mean of e over the best samples)` on the best samples of each group, 0 elsewhere.

    One best sample alone gets 0, and so do best samples of equal closeness, exactly: the mean is taken of
    distances to the largest value, so that rounding cannot decide a sign.

    Args:
        best: bool `[P, G]`, the samples whose task reward equals the maximum of their group; at least one a
            group.
        closeness: `[P, G]`.
        coefficient: λ, in units of the reward.

    Returns:
        `[P, G]`, sums to 0 over each group.
    """
    largest = closeness.masked_fill(~best, -torch.inf).amax(dim=-1, keepdim=True)
    distance = (closeness - largest).masked_fill(~best, 0.0)
    mean = distance.sum(dim=-1, keepdim=True) / best.sum(dim=-1, keepdim=True)
    return coefficient * (distance - mean).masked_fill(~best, 0.0)


class EntropyReward:
    """The entropy reward as a slot: `entropy_reward` of `closeness`, among the best samples or among all.

    A slot for `Objective.entropy_reward` is called with keywords `best` (bool `[P, G]`), `entropy` and
    `reference_entropy` (`[P, G, L]`, nats) and `coefficient`, and returns the bonus `[P, G]`.

    Args:
        best_only: only samples whose task reward is the largest of their group, as the paper has it; false is the
            release's `only_add_max: False`, where the entropy also orders samples of unlike reward.
    """

    def __init__(self, *, best_only: bool) -> None:
        self.best_only = best_only

    def __call__(
        self, *, best: Tensor, entropy: Tensor, reference_entropy: Tensor, coefficient: float
    ) -> Tensor:
        """The bonus `[P, G]`, which sums to 0 over each group."""
        among = best if self.best_only else torch.ones_like(best)
        return entropy_reward(among, self.preference(entropy, reference_entropy), coefficient)

    def preference(self, entropy: Tensor, reference_entropy: Tensor) -> Tensor:
        """What is preferred, `[P, G]` float64: here `closeness`, in (0, 1]."""
        return closeness(entropy, reference_entropy)


class AbsoluteGap(EntropyReward):
    """Prefers `- |mean_t Hr_it - mean_t H_it|`: linear in the gap where the paper's form goes flat, in nats."""

    def preference(self, entropy: Tensor, reference_entropy: Tensor) -> Tensor:
        """`[P, G]` float64, at most 0."""
        return -(reference_entropy.double().mean(dim=-1) - entropy.double().mean(dim=-1)).abs()


class TokenGap(EntropyReward):
    """Prefers `mean_t 1 / (1 + (Hr_it - H_it)^2)`: gaps of single tokens, which cancel in the paper's mean."""

    def preference(self, entropy: Tensor, reference_entropy: Tensor) -> Tensor:
        """`[P, G]` float64 in (0, 1]."""
        gap = reference_entropy.double() - entropy.double()
        return (1.0 / (1.0 + gap.square())).mean(dim=-1)
