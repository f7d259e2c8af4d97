"""How far the weights of STAGE move what a rollout would have done without them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FULL = 0.999  # a KL weight below it holds a token less


@dataclass(frozen=True)
class WeightUse:
    """Means over the tokens of groups that teach, those with an advantage other than 0.

    similarity: mean s, in [-1, 1].
    weight: mean w, in [0, 1]; where their sum divides, as in algorithm=stage, only its spread acts.
    effective: (Σ w)² / (n Σ w²), the share of the tokens that as many equal weights would stand for (Kish 1965).
    kl_weight: mean m, in [0.5, 1]. freed: share of the tokens with m below 1, which are held less than others.
    same_everywhere: share of the tokens that all samples of their group drew alike.
    groups: that teach.
    """

    similarity: float
    weight: float
    effective: float
    kl_weight: float
    freed: float
    same_everywhere: float
    groups: int


def weight_use(
    similarity: Tensor, weights: Tensor, kl_weights: Tensor, advantages: Tensor, tokens: Tensor
) -> WeightUse | None:
    """From s, w and m `[P, G, L]`, advantages `[P, G]` and tokens `[P, G, L]`; None where no group teaches."""
    teaching = (advantages != 0).any(dim=-1)
    if not bool(teaching.any()):
        return None
    s, w, m = (values[teaching].double() for values in (similarity, weights, kl_weights))
    total = float(w.square().sum()) * w.numel()
    same = (tokens[teaching] == tokens[teaching][:, :1]).all(dim=1)
    return WeightUse(
        similarity=float(s.mean()),
        weight=float(w.mean()),
        effective=float(w.sum() ** 2) / total if total else 0.0,
        kl_weight=float(m.mean()),
        freed=float((m < FULL).double().mean()),
        same_everywhere=float(same.double().mean()),
        groups=int(teaching.sum()),
    )


@dataclass(frozen=True)
class Pull:
    """Where the policy term pulls, before and after the weights. The pull of a token is `|A| (1 - p)`.

    That is the size of the gradient of `A log p` in the logit of the token itself: nothing is learned from a token that
    was certain anyway, whatever its weight.

    tokens: share of the tokens that hold 90 % of the pull.
    similarity: mean s, each token counted by its pull.
    moved: share of the pull that the weights move to other tokens of its group, in [0, 1].
    """

    tokens: float
    similarity: float
    moved: float


def pull_of(similarity: Tensor, weights: Tensor, advantages: Tensor, logps: Tensor) -> Pull | None:
    """From s, w and log-probabilities `[P, G, L]` and advantages `[P, G]`; None where nothing pulls."""
    pull = advantages.double().abs()[..., None] * -logps.double().expm1()
    total = pull.sum()
    if not bool(total > 0):
        return None
    ordered = pull.flatten().sort(descending=True).values.cumsum(0)
    needed = int((ordered < 0.9 * total).sum()) + 1
    teaching = pull.sum(dim=(1, 2)) > 0
    before = pull[teaching].flatten(1)
    after = before * weights[teaching].double().flatten(1)
    kept = after.sum(dim=1) > 0
    shares = [part[kept] / part[kept].sum(dim=1, keepdim=True) for part in (before, after)]
    moved = (shares[0] - shares[1]).abs().sum(dim=1) / 2
    return Pull(
        tokens=needed / pull.numel(),
        similarity=float((pull * similarity.double()).sum() / total),
        moved=float(moved.mean()) if len(moved) else 0.0,
    )


def alignment(similarity: Tensor, entropy: Tensor) -> float | None:
    """Pearson's correlation between similarity and entropy over all tokens, both `[P, G, L]`; None without spread.

    Tokens that are alike because nothing else was likely have a low entropy: then it is negative.
    """
    pair = torch.stack([similarity.double().flatten(), entropy.double().flatten()])
    if bool((pair.std(dim=1) == 0).any()):
        return None
    return float(torch.corrcoef(pair)[0, 1])
