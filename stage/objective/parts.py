"""Advantages from rewards of several parts, each brought to one scale before they are added up.

`advantage.GroupAdvantage` adds the parts up in their own units, as the STAGE release does: the part that varies most
decides. The two slots here standardise each part in its group first. In both, a part is 0 where its gate is closed
(before it is standardised), and a column that is constant up to rounding contributes exactly 0.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from stage.objective.advantage import (
    Advantages,
    Bonus,
    best,
    centred,
    check_tied_groups,
    gated_parts,
    group_advantages,
    require_group,
    tied,
    tolerance,
)
from stage.types import Scores


def standardised(columns: Tensor, epsilon: float) -> Tensor:
    """`(c - mean c) / (std c + epsilon)` of each column in each group, std of ddof 1; `[P, G, R]` to the same."""
    groups = columns.transpose(-1, -2).flatten(0, 1)  # [P R, G]
    values = centred(groups) / (groups.std(dim=-1, keepdim=True) + epsilon)
    values = values.masked_fill(tied(groups)[:, None], 0.0)
    return values.unflatten(0, (columns.shape[0], columns.shape[2])).transpose(-1, -2)


def contributions(scores: Scores, epsilon: float, raw: Collection[str]) -> Tensor:
    """`[P, G, R]` float64: weight times the standardised part, or times the part itself where `raw` names it.

    A name in `raw` is that of a part, or what stands before a `/` in it: the name of a scorer in a combination.

    Raises:
        ValueError: `raw` names no part.
    """
    for name in raw:
        if not any(_belongs(part, name) for part in scores.names):
            raise ValueError(
                f"raw names reward parts or scorers, got {name!r}, parts are {', '.join(scores.names)}; choose of these"
            )
    columns = gated_parts(scores)
    plain = torch.tensor([any(_belongs(part, name) for name in raw) for part in scores.names])
    values = torch.where(plain.to(columns.device), columns, standardised(columns, epsilon))
    return values * values.new_tensor(scores.weights)


def _belongs(part: str, name: str) -> bool:
    return part == name or part.startswith(f"{name}/")


class StandardisedParts:
    """The parts are standardised in their group, added up, and the sum is an ordinary reward.

        r_i = sum_k w_k z_ik,    z_ik = (c_ik - mean_i c_ik) / (std_i c_ik + epsilon),    A of r as `GroupAdvantage`

    Args:
        epsilon: added to the std of a part, in its unit, and to the std of the sum.
        raw: parts, or scorers of a combination, that are added up in their own unit all the same.
    """

    def __init__(self, *, epsilon: float, raw: Collection[str]) -> None:
        self.epsilon, self.raw = epsilon, tuple(raw)

    def check(self, switches: Mapping[str, Any]) -> None:
        """Raises ValueError when `tied_groups` is no policy this slot knows."""
        check_tied_groups(switches)

    def __call__(self, *, scores: Scores, bonus: Bonus | None, tied_groups: str) -> Advantages:
        """`Advantages` of `scores.parts` `[P, G, R]`. Raises ValueError for groups of one sample."""
        require_group(scores.parts[..., 0])
        added = contributions(scores, self.epsilon, self.raw)
        rewards = added.sum(dim=-1)
        extra = None if bonus is None else bonus(best(rewards))
        values = group_advantages(rewards, extra, tied_groups=tied_groups, epsilon=self.epsilon)
        return Advantages(values, extra, torch.ones_like(tied(rewards)), added)


class DecoupledAdvantage:
    """GDPO (arXiv 2601.05242, NVlabs/GDPO): advantages of each part, added up, divided by their std over the batch.

        A_i = sum_k w_k z_ik / (std of the sum over all samples + epsilon),    z as in `StandardisedParts`

    Groups keep their relative sizes: one where all parts agree has larger advantages than one where they cancel out.

    Departures:
    1. The mean over the batch is not subtracted: each group is centred, so it is 0 up to rounding.
    2. The entropy reward, where it is on, is added to the sum before the division. In a tied group it is alone, and
       `tied_groups` says what happens: `raw` leaves it undivided, `normalise` divides by its std in the group.

    Args:
        epsilon: added to the std of a part, in its unit, and to the std over the batch.
    """

    compares_batch = True

    def __init__(self, *, epsilon: float) -> None:
        self.epsilon = epsilon

    def check(self, switches: Mapping[str, Any]) -> None:
        """Raises ValueError when `tied_groups` is no policy this slot knows."""
        check_tied_groups(switches)

    def __call__(self, *, scores: Scores, bonus: Bonus | None, tied_groups: str) -> Advantages:
        """`Advantages` of `scores.parts` `[P, G, R]`. Raises ValueError for groups of one sample."""
        require_group(scores.parts[..., 0])
        added = contributions(scores, self.epsilon, ())
        rewards = added.sum(dim=-1)
        extra = None if bonus is None else bonus(best(rewards))
        deviation = centred(rewards if extra is None else rewards + extra)
        deviation = deviation.masked_fill(deviation.abs() <= tolerance(rewards), 0.0)
        equal = tied(rewards)
        deviation = deviation.masked_fill(equal[:, None], 0.0)
        informed = deviation / (deviation.std() + self.epsilon)
        alone = group_advantages(
            torch.zeros_like(rewards), extra, tied_groups=tied_groups, epsilon=self.epsilon
        )
        return Advantages(torch.where(equal[:, None], alone, informed), extra, torch.ones_like(equal), added)
