"""Advantages of a group: how much better a sample was than the others drawn for the same prompt.

A slot for `Objective.advantage` is called with keywords `scores`, `bonus` and `tied_groups` and returns
`Advantages`. All arithmetic is float64: groups are small, and float32 rounding of a mean must not decide the
sign of an advantage.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stage.types import Scores

TIED_GROUPS = ("raw", "zero", "normalise")
TOLERANCE = 1e-6  # rewards closer than this, relative to max(1, |best|), are the same reward
CONSTANT_COLUMN = 1e-6  # the released code's bound on the std of a reward column without variance

Bonus = Callable[[Tensor], Tensor]  # the best samples, bool [P, G] -> the entropy reward [P, G]


@dataclass(frozen=True)
class Advantages:
    """What an advantage slot returns.

    `values` float64 `[P, G]`. `bonus` `[P, G]` is the entropy reward that went in, None when none acted.
    `kept` bool `[P]` is False where neither a reward column nor an entropy reward was left to learn from; all
    True for a slot that drops no columns. `contributions` `[P, G, R]` are the parts as they were added up, None for
    `weighted_parts`.
    """

    values: Tensor
    bonus: Tensor | None
    kept: Tensor
    contributions: Tensor | None = None


def gated_parts(scores: Scores) -> Tensor:
    """`[P, G, R]` float64: the parts as they are, 0 where their gate is closed."""
    parts = scores.parts.double()
    return parts if scores.gates is None else parts.masked_fill(~scores.gates, 0.0)


def weighted_parts(scores: Scores) -> Tensor:
    """`[P, G, R]` float64: `gated_parts` times their weights, in the unit of the reward."""
    columns = gated_parts(scores).unbind(dim=-1)
    # Weights are numbers of the host: a tensor of them would make it wait for the device.
    return torch.stack([part * weight for part, weight in zip(columns, scores.weights, strict=True)], dim=-1)


def task_rewards(scores: Scores) -> Tensor:
    """`[P, G]` float64: the sum of the weighted parts, in the unit of the reward."""
    return weighted_parts(scores).sum(dim=-1)


def tolerance(rewards: Tensor) -> Tensor:
    """`[P, 1]`: the distance up to which two of the rewards `[P, G]` are equal, `1e-6 * max(1, |max|)`."""
    return TOLERANCE * rewards.amax(dim=-1, keepdim=True).abs().clamp_min(1.0)


def tied(rewards: Tensor) -> Tensor:
    """bool `[P]`: groups whose task rewards `[P, G]` differ by rounding at most."""
    return (rewards.amax(dim=-1) - rewards.amin(dim=-1)) <= tolerance(rewards)[..., 0]


def best(rewards: Tensor) -> Tensor:
    """bool `[P, G]`: the samples whose reward equals the maximum of their group."""
    return rewards.amax(dim=-1, keepdim=True) - rewards <= tolerance(rewards)


def centred(values: Tensor) -> Tensor:
    """`values - mean` over the last axis; equal values give exactly 0, whatever a mean of them rounds to."""
    distance = values - values.amax(dim=-1, keepdim=True)
    return distance - distance.mean(dim=-1, keepdim=True)


def group_advantages(rewards: Tensor, bonus: Tensor | None, *, tied_groups: str, epsilon: float) -> Tensor:
    """`A_i = (r_i - mean r) / (std r + epsilon)` in each group, r = task reward plus bonus, std of ddof 1.

    A sample within `tolerance` of the mean has A = 0: with opponents chosen by sign, rounding of a mean must
    not make it an opponent of half the group. In a tied group the task rewards say nothing and only the bonus
    is left: `raw` is the centred bonus, not divided by its std; `zero` is 0; `normalise` divides, which turns
    the noise of the entropies into unit variance. Without a bonus a tied group has A = 0 exactly.

    Args:
        rewards: task rewards float64 `[P, G]`.
        bonus: the entropy reward `[P, G]` or None.

    Returns:
        `[P, G]` float64.
    """
    noise = torch.zeros_like(rewards) if bonus is None else centred(bonus)
    total = rewards if bonus is None else rewards + bonus
    deviation = centred(total)
    deviation = deviation.masked_fill(deviation.abs() <= tolerance(rewards), 0.0)
    informed = deviation / (total.std(dim=-1, keepdim=True) + epsilon)
    if tied_groups == "normalise":
        noise = noise / (noise.std(dim=-1, keepdim=True) + epsilon)
    elif tied_groups == "zero":
        noise = torch.zeros_like(noise)
    return torch.where(tied(rewards)[:, None], noise, informed)


def check_tied_groups(switches: Mapping[str, Any]) -> None:
    """Raises ValueError when `tied_groups` is no policy for equal rewards."""
    if switches["tied_groups"] not in TIED_GROUPS:
        raise ValueError(
            f"tied_groups must be one of {', '.join(TIED_GROUPS)}, got {switches['tied_groups']!r}; "
            "`raw` keeps the plain entropy reward in groups whose rewards are all equal"
        )


class GroupAdvantage:
    """GRPO's advantage (DeepSeekMath, arXiv 2402.03300, eq. 4 ff.) with a named answer to ties.

    Args:
        epsilon: added to the std of the group, in units of the reward.
    """

    def __init__(self, *, epsilon: float) -> None:
        self.epsilon = epsilon

    def check(self, switches: Mapping[str, Any]) -> None:
        """Raises ValueError when `tied_groups` is no policy this slot knows."""
        check_tied_groups(switches)

    def __call__(self, *, scores: Scores, bonus: Bonus | None, tied_groups: str) -> Advantages:
        """`Advantages` of `scores.parts` `[P, G, R]`. Raises ValueError for groups of one sample."""
        rewards = task_rewards(scores)
        require_group(rewards)
        extra = None if bonus is None else bonus(best(rewards))
        values = group_advantages(rewards, extra, tied_groups=tied_groups, epsilon=self.epsilon)
        return Advantages(values=values, bonus=extra, kept=torch.ones_like(tied(rewards)))


class ReleasedAdvantage:
    """The advantage as the published STAGE code computes it (krennic999/STAGE, grpo_trainer.py).

    Differences from `GroupAdvantage`:
    1. When a part is named in `filtered`, reward columns with a std of at most 1e-6 are dropped first.
    2. The entropy reward acts in those recipes only; elsewhere the coefficient has no effect.
    3. The best samples are those exactly equal to the maximum.
    4. Ties are normalised; no tolerance decides what a tie is.
    5. The baseline is that of the batch of a rank, which is one group only while a rank holds one prompt.
    Departures from the published code:
    6. More than one prompt raises (the published code takes one maximum over all of them).
    7. Rewards exactly equal give exactly 0, where the published mean may leave rounding.
    8. A part of weight 0 is not a column; a name counts when one of its `/`-separated pieces does.

    Args:
        epsilon: added to the std of the group, in units of the reward.
        filtered: names of reward parts that put a run into the recipes of points 1 and 2.
    """

    def __init__(self, *, epsilon: float, filtered: Collection[str]) -> None:
        self.epsilon = epsilon
        self.filtered = frozenset(filtered)

    def check(self, switches: Mapping[str, Any]) -> None:
        """Raises ValueError unless ties are normalised, the one thing the published code does."""
        if switches["tied_groups"] != "normalise":
            raise ValueError(
                f"the released advantage needs tied_groups: normalise, got {switches['tied_groups']!r}; "
                "take algorithm=stage for another policy"
            )

    def __call__(self, *, scores: Scores, bonus: Bonus | None, tied_groups: str) -> Advantages:
        """`Advantages` of `scores.parts` `[1, G, R]`. Raises ValueError for more prompts or one sample."""
        if len(scores.parts) != 1:
            raise ValueError(
                f"the released arithmetic holds for one prompt a rank, got {len(scores.parts)}; "
                "set one prompt a rank or take algorithm=stage"
            )
        require_group(scores.parts[..., 0])
        columns, filters = self._columns(scores)
        rewards = columns.sum(dim=-1)
        extra = None
        if bonus is not None and filters:
            extra = bonus(rewards == rewards.amax(dim=-1, keepdim=True))
        total = rewards if extra is None else rewards + extra
        deviation = total - total.mean(dim=-1, keepdim=True)
        deviation = deviation.masked_fill(total.amax(-1, keepdim=True) == total.amin(-1, keepdim=True), 0.0)
        values = deviation / (total.std(dim=-1, keepdim=True) + self.epsilon)
        kept = torch.tensor([columns.shape[-1] > 0 or extra is not None], device=values.device)
        return Advantages(values=values, bonus=extra, kept=kept)

    def _columns(self, scores: Scores) -> tuple[Tensor, bool]:
        """Weighted reward columns float64 `[1, G, R']` that count, and whether the filtering recipe is on."""
        used = [index for index, weight in enumerate(scores.weights) if weight != 0]
        parts = gated_parts(scores)
        columns = parts[..., used] * parts.new_tensor([scores.weights[index] for index in used])
        filters = any(self.filtered & set(scores.names[index].split("/")) for index in used)
        if filters:
            columns = columns[..., columns[0].std(dim=0) > CONSTANT_COLUMN]
        return columns, filters


def require_group(rewards: Tensor) -> None:
    """Raises ValueError unless the groups of rewards `[P, G]` hold two samples or more."""
    if rewards.shape[-1] < 2:
        raise ValueError(
            f"a group needs at least 2 samples to have a baseline, got G = {rewards.shape[-1]}; "
            "raise the number of images sampled per prompt"
        )
