"""Sums of a part of a rollout, divided so that those of all parts add up to the mean of the whole."""

from __future__ import annotations

from torch import Tensor

from stage.objective.credit import Credit
from stage.objective.metrics import TensorMetrics
from stage.objective.surrogate import Surrogate
from stage.types import TokenScores


def mean_over_groups(values: Tensor, weights: Tensor | None, divisors: Tensor, num_groups: int) -> Tensor:
    """This part's share of the mean over groups of `Σ_it weights * values / divisor`; values `[P, G, L]`."""
    weighted = values if weights is None else weights * values
    return (weighted.sum(dim=(1, 2)) / divisors).sum() / num_groups


def share(values: Tensor, credit: Credit) -> Tensor:
    """This part's share of the plain mean of values `[P, G, L]` over the whole rollout, detached."""
    return values.detach().sum() / (credit.num_groups * credit.group_size * credit.num_tokens)


def policy_metrics(scores: TokenScores, surrogate: Surrogate, credit: Credit) -> TensorMetrics:
    """This part's share of what the policy is like at this update, detached 0-d tensors."""
    return {
        "policy/entropy": share(scores.entropy, credit),
        "policy/ratio_mean": share(surrogate.ratio, credit),
        "policy/ratio_max": surrogate.ratio.detach().amax(),
        "policy/clip_fraction": share(surrogate.clipped.to(scores.logps.dtype), credit),
    }
