"""The credit of a rollout that lies on several processes, as one process alone would give it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from stage.objective.credit import Credit
from stage.ranks import Ranks
from stage.types import Metrics, Rollout, map_tensors


def joint_credit(objective: Any, rollout: Rollout, samples: slice, ranks: Ranks) -> tuple[Credit, Metrics]:
    """`Objective.credit` of this process's `samples` of its groups, and the metrics of all that it was computed from.

    That is the whole groups, or all groups of all processes where the objective compares them (`num_parts`). All of
    `ranks` must call it, and where one fails all do.
    """
    whole = mapped(rollout, ranks.whole_group) if ranks.sharing is not None else rollout
    first, groups = 0, len(rollout.tokens)
    if objective.compares_batch and ranks.world > 1:
        whole = mapped(whole, ranks.whole_batch)
        first = ranks.rank * (len(whole.tokens) // groups) // ranks.world * groups
    with ranks.together():
        credit, metrics = objective.credit(whole)
    credit, metrics = equal_totals(credit, metrics, ranks)
    return credit.micro_batch(slice(first, first + groups), samples), metrics


def num_parts(objective: Any, ranks: Ranks, span: int) -> int:
    """How many processes have a part of one mean, so that their losses add up to it: all of them, or `span`."""
    return ranks.world if objective.compares_batch else span


def mapped(rollout: Rollout, gather: Callable[[Tensor], Tensor]) -> Rollout:
    """The rollout with what credit is made of as `gather` gives it; prompts and images stay those drawn here."""

    def everywhere(part: Any) -> Any:
        return gather(part) if isinstance(part, Tensor) else part and map_tensors(part, gather)

    reference = rollout.reference and replace(
        rollout.reference, features=None
    )  # large, and of no use to credit
    rollout = replace(rollout, reference=reference)
    names = (
        "tokens",
        "codes",
        "sampled_logps",
        "scores",
        "old",
        "reference",
        "plans",
        "guidance_scale",
        "temperature",
    )
    found: dict[str, Any] = {name: everywhere(getattr(rollout, name)) for name in names}
    return replace(rollout, **found)


def equal_totals(credit: Credit, metrics: Metrics, ranks: Ranks) -> tuple[Credit, Metrics]:
    """Credit and its metrics, so that the mean over processes of a mean over the plans' tokens is that of all tokens.

    Plans differ in length, so processes differ in tokens: each divides by the mean of their numbers, not by its own.
    """
    if credit.plan is None or ranks.world == 1:
        return credit, metrics
    mine = float(credit.plan.total)
    total = sum(ranks.gathered(mine)) / ranks.world
    gap = {"plan/sampling_gap": metrics["plan/sampling_gap"] * mine / total}
    return replace(credit, plan=credit.plan.counted_as(total)), metrics | gap
