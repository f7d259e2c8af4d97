"""The credit of a rollout that lies on several processes, as one process alone would give it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from stage.objective.credit import Batch, Credit
from stage.ranks import Ranks
from stage.types import Metrics, Rollout, TokenScores, map_tensors


def joint_credit(objective: Any, rollout: Rollout, ranks: Ranks) -> tuple[Credit, Metrics]:
    """`Objective.credit` of the groups that this process has a part of, whole, and their metrics.

    All of `ranks` must call it, and where one fails all do.
    """
    whole = whole_groups(rollout, ranks)
    batch = whole_batch(whole, ranks) if objective.compares_batch and ranks.world > 1 else None
    with ranks.together():
        credit, metrics = objective.credit(whole) if batch is None else objective.credit(whole, batch)
    return equal_totals(credit, metrics, ranks)


def whole_groups(rollout: Rollout, ranks: Ranks) -> Rollout:
    """The rollout with all samples of its groups where these span several processes; images stay those drawn here."""

    def whole(part: Any) -> Any:
        return (
            ranks.whole_group(part)
            if isinstance(part, Tensor)
            else part and map_tensors(part, ranks.whole_group)
        )

    if ranks.sharing is None:
        return rollout
    parts = (
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
    found: dict[str, Any] = {name: whole(getattr(rollout, name)) for name in parts}
    return replace(rollout, **found)


def whole_batch(rollout: Rollout, ranks: Ranks) -> Batch:
    """What advantages are made of, of all groups of all processes, and which of them are those of `rollout`."""
    scores = map_tensors(rollout.scores, ranks.whole_batch)
    groups = len(rollout.prompts)
    first = ranks.rank * (len(scores.parts) // groups) // ranks.world * groups

    def entropies(found: TokenScores) -> TokenScores:
        entropy = ranks.whole_batch(found.entropy)
        return TokenScores(entropy, entropy)

    old, reference = entropies(rollout.old), rollout.reference and entropies(rollout.reference)
    everything = replace(rollout, scores=scores, old=old, reference=reference)
    return everything, slice(first, first + groups)


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
