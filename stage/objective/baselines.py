"""Advantages that differ from GRPO's in their baseline or scale, or in the groups that have one.

All of them take the entropy reward in as `advantage.GroupAdvantage` does, and decide ties with the same tolerance.
`CentredAdvantage` and `LeaveOneOut` do not divide by a std, so `tied_groups: normalise` is refused there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stage.objective.advantage import (
    Advantages,
    Bonus,
    GroupAdvantage,
    best,
    centred,
    check_tied_groups,
    require_group,
    task_rewards,
    tied,
    tolerance,
)
from stage.types import Scores


def centred_advantages(rewards: Tensor, bonus: Tensor | None, tied_groups: str) -> Tensor:
    """`A_i = r_i - mean r`, r = task reward plus bonus, in units of the reward; `[P, G]` float64.

    In a tied group the centred bonus is left (`raw`), or nothing (`zero`).
    """
    noise = torch.zeros_like(rewards) if bonus is None or tied_groups == "zero" else centred(bonus)
    deviation = centred(rewards if bonus is None else rewards + bonus)
    deviation = deviation.masked_fill(deviation.abs() <= tolerance(rewards), 0.0)
    return torch.where(tied(rewards)[:, None], noise, deviation)


class CentredAdvantage:
    """Dr.GRPO's advantage: `A_i = r_i - mean r`, without the division by the std of the group.

    Source: "Understanding R1-Zero-Like Training" (Dr.GRPO), arXiv 2503.20783, section 3.2, which removes the std, "a
    question-level difficulty bias", and the length from GRPO. The length is the aggregation's:
    `aggregation.FixedLength`.
    """

    def check(self, switches: Mapping[str, Any]) -> None:
        """Raises ValueError when ties are to be divided by a std."""
        check_undivided(switches)

    def __call__(self, *, scores: Scores, bonus: Bonus | None, tied_groups: str) -> Advantages:
        """`Advantages` of `scores.parts` `[P, G, R]`. Raises ValueError for groups of one sample."""
        rewards = task_rewards(scores)
        require_group(rewards)
        extra = None if bonus is None else bonus(best(rewards))
        values = centred_advantages(rewards, extra, tied_groups)
        return Advantages(values=values, bonus=extra, kept=torch.ones_like(tied(rewards)))


class LeaveOneOut(CentredAdvantage):
    """RLOO's advantage: `A_i = r_i - mean of r_j over j != i`, an unbiased baseline.

    That is `G / (G - 1)` times Dr.GRPO's. Source: W. Kool et al., "Buy 4 REINFORCE samples, get a baseline for free!";
    A. Ahmadian et al., "Back to Basics" (RLOO), arXiv 2402.14740, section 2.3.
    """

    def __call__(self, *, scores: Scores, bonus: Bonus | None, tied_groups: str) -> Advantages:
        """`Advantages` of `scores.parts` `[P, G, R]`. Raises ValueError for groups of one sample."""
        found = super().__call__(scores=scores, bonus=bonus, tied_groups=tied_groups)
        group = found.values.shape[-1]
        return replace(found, values=found.values * (group / (group - 1)))


class ProgressFilter(GroupAdvantage):
    """GRPO's advantage, where groups that are too hard wait until the bar has fallen below their rewards.

    A group takes part where its best task reward is above `best * f` and its mean is at least `mean * f`, with
    `f = 1 - update / until`; from update `until` on, every group does. The advantages of a group that waits are 0.

    Source: krennic999/STAGE, grpo_trainer.py, `progress_learning`: 0.5 and 0.3, until half of the steps are done.

    Departures:
    1. The published code asks each reward column of the one prompt of a rank; here it is the task reward of a group.
    2. A published group that waits keeps its entropy reward; here nothing of it is learned but the KL.
    3. The published `f` goes on below 0, where its bars are no bars for rewards of at least 0; here it stops at 0.

    Args:
        epsilon: as in `GroupAdvantage`.
        best, mean: bars at update 0, in units of the task reward.
        until: update at which the bars have fallen to 0.
    """

    def __init__(self, *, epsilon: float, best: float, mean: float, until: int) -> None:
        super().__init__(epsilon=epsilon)
        self.best, self.mean, self.until = best, mean, until
        self.factor = 1.0

    def check(self, switches: Mapping[str, Any]) -> None:
        """Raises ValueError for bars that are no numbers, or an end before the first update."""
        super().check(switches)
        if self.until < 1 or not (math.isfinite(self.best) and math.isfinite(self.mean)):
            raise ValueError(
                f"a progress filter needs finite bars and an update of at least 1, got best={self.best}, "
                f"mean={self.mean}, until={self.until}; the published bars are 0.5 and 0.3, until half of the updates"
            )

    def at(self, update: int) -> ProgressFilter:
        """The filter with the bars of `update`."""
        moved = copy(self)
        moved.factor = max(0.0, 1.0 - update / self.until)
        return moved

    def __call__(self, *, scores: Scores, bonus: Bonus | None, tied_groups: str) -> Advantages:
        """Those of GRPO, 0 in groups that wait; `kept` is False there."""
        found = super().__call__(scores=scores, bonus=bonus, tied_groups=tied_groups)
        if self.factor == 0:
            return found
        rewards = task_rewards(scores)
        high = rewards.amax(dim=-1) > self.best * self.factor
        ready = high & (rewards.mean(dim=-1) >= self.mean * self.factor)
        values = found.values.masked_fill(~ready[:, None], 0.0)
        return replace(found, values=values, kept=found.kept & ready)


def check_undivided(switches: Mapping[str, Any]) -> None:
    """Raises ValueError when `tied_groups` is unknown, or divides by a std where there is none."""
    check_tied_groups(switches)
    if switches["tied_groups"] == "normalise":
        raise ValueError(
            "an advantage without a std cannot divide ties by one, got tied_groups='normalise'; set raw or zero, "
            "or take stage.objective.advantage.GroupAdvantage"
        )
