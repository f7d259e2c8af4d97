"""The policy term of one token: the probability ratio, the advantage, and what keeps the ratio near 1.

A slot for `Objective.ratio` is called with keywords `scores`, `old_logps`, `advantages`, `clip_low`,
`clip_high` and returns `Surrogate`. It may have a `check(switches)` that raises at construction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stage.types import TokenScores


@dataclass(frozen=True)
class Surrogate:
    """`values` `[P, G, L]` to be maximised, with gradient; `ratio` and bool `clipped` `[P, G, L]` for the
    log."""

    values: Tensor
    ratio: Tensor
    clipped: Tensor


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Surrogate:
    """`min(ρ A, clip(ρ, 1 - clip_low, 1 + clip_high) A)` (PPO, arXiv 1707.06347, eq. 7).

    Args:
        ratio: ρ, `[P, G, L]`.
        advantages: A, `[P, G]`, the same for every token of a sample.
    """
    advantage = advantages[..., None]
    free = ratio * advantage
    bounded = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantage
    return Surrogate(values=torch.minimum(free, bounded), ratio=ratio, clipped=bounded < free)


class ClippedRatio:
    """`ρ = exp(lp - lp_old)` a token, clipped to `[1 - clip_low, 1 + clip_high]`."""

    def check(self, switches: Mapping[str, Any]) -> None:
        """Raises ValueError unless both bounds are numbers, 0 < clip_low <= 1 and 0 < clip_high."""
        low, high = switches["clip_low"], switches["clip_high"]
        if low is None or high is None or not (0 < low <= 1 and high > 0):
            raise ValueError(
                "a clipped ratio needs 0 < clip_low <= 1 and clip_high > 0, "
                f"got clip_low={low}, clip_high={high}; the usual value of both is 0.2"
            )

    def __call__(
        self,
        *,
        scores: TokenScores,
        old_logps: Tensor,
        advantages: Tensor,
        clip_low: float | None,
        clip_high: float | None,
    ) -> Surrogate:
        """The surrogate of `scores.logps` `[P, G, L]` against `old_logps` `[P, G, L]`."""
        assert clip_low is not None and clip_high is not None  # `check` saw to it
        return clipped_surrogate((scores.logps - old_logps).exp(), advantages, clip_low, clip_high)


class OnPolicyRatio:
    """`ρ = exp(lp - stop_gradient(lp))`: 1 in value, `∇ lp` in gradient; for one update a rollout.

    As in krennic999/STAGE, grpo_trainer.py: no clip, and the old policy is the present one.
    """

    def check(self, switches: Mapping[str, Any]) -> None:
        """Raises ValueError when a clip is set or a rollout serves more than one update."""
        low, high, updates = switches["clip_low"], switches["clip_high"], switches["updates_per_rollout"]
        if low is not None or high is not None:
            raise ValueError(
                f"an on-policy ratio is never clipped, got clip_low={low}, clip_high={high}; "
                "set both to null or take stage.objective.surrogate.ClippedRatio"
            )
        if updates != 1:
            raise ValueError(
                f"an on-policy ratio allows one update a rollout, got updates_per_rollout={updates}; "
                "set it to 1 or take stage.objective.surrogate.ClippedRatio"
            )

    def __call__(
        self,
        *,
        scores: TokenScores,
        old_logps: Tensor,
        advantages: Tensor,
        clip_low: float | None,
        clip_high: float | None,
    ) -> Surrogate:
        """The surrogate of `scores.logps` `[P, G, L]`; the old log-probabilities play no part."""
        ratio = (scores.logps - scores.logps.detach()).exp()
        nothing = torch.zeros_like(ratio, dtype=torch.bool)
        return Surrogate(values=ratio * advantages[..., None], ratio=ratio, clipped=nothing)
