"""Terms of the loss beside policy gradient and KL: what the entropy of the policy itself should be.

A slot for `Objective.penalty` is called with keywords `scores` and `reference` (None without one), both `TokenScores`
`[P, G, L]`, and returns `[P, G, L]`, whose mean over samples and tokens is added to the loss. The gradient flows
through `scores.entropy`. A slot with `needs_reference = True` gets a reference in every rollout. Plans are left alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from stage.types import TokenScores


def check_coefficient(coefficient: float) -> None:
    """Raises ValueError for a coefficient that is no positive number."""
    if not (math.isfinite(coefficient) and coefficient > 0):
        raise ValueError(
            f"an entropy term needs a coefficient above 0, got {coefficient}; null in its slot turns it off"
        )


class EntropyBonus:
    """`- coefficient * H_it`: rewards uncertainty, so that sampling does not collapse.

    Source: PPO, arXiv 1707.06347, eq. 9, `c_2 S`; verl's `entropy_coeff`, 0.001 in its GRPO examples of the time.

    Args:
        coefficient: of the entropy in nats, in units of the loss.
    """

    needs_reference = False

    def __init__(self, *, coefficient: float) -> None:
        self.coefficient = coefficient

    def check(self, switches: Mapping[str, Any]) -> None:
        """Raises ValueError for a coefficient that is not positive."""
        check_coefficient(self.coefficient)

    def __call__(self, *, scores: TokenScores, reference: TokenScores | None) -> Tensor:
        """`[P, G, L]`."""
        return -self.coefficient * scores.entropy


class EntropyGap:
    """`coefficient * (mean_t H_it - mean_t Hr_it)^2`: holds the mean entropy of each sample at the reference's.

    Source: krennic999/STAGE, grpo_trainer.py, `entropy_reward_v2`, the release's second form of the entropy reward:
    `0.01 * (entropy_gap ** 2).mean()`. It acts on every sample and through the gradient, where the first form acts on
    the best samples of a group and through their advantage. Both may be on.

    Args:
        coefficient: of the squared gap in nats², in units of the loss.
    """

    needs_reference = True

    def __init__(self, *, coefficient: float) -> None:
        self.coefficient = coefficient

    def check(self, switches: Mapping[str, Any]) -> None:
        """Raises ValueError for a coefficient that is not positive."""
        check_coefficient(self.coefficient)

    def __call__(self, *, scores: TokenScores, reference: TokenScores | None) -> Tensor:
        """`[P, G, L]`, the same for all tokens of a sample."""
        assert reference is not None  # `needs_reference`, and `checks.check_rollout` saw to it
        gap = scores.entropy.mean(dim=-1, keepdim=True) - reference.entropy.mean(dim=-1, keepdim=True)
        return self.coefficient * gap.square().expand_as(scores.entropy)
