"""Critical tokens: a group learns from a few of its tokens, chosen by position, entropy and variety.

A slot for `Objective.critical_tokens` is called with keywords `old` and `reference` (`TokenScores` `[P, G, L]`, the
second None without a reference) and `codes` `[P, G, L, C]`, and returns `CriticalTokens`. It multiplies the weights of
the policy term and of the KL, STAGE's included. A slot with a true `needs_reference` gets a reference in every rollout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from stage.objective.similarity import mean_cosine
from stage.types import TokenScores


@dataclass(frozen=True)
class CriticalTokens:
    """`mask` `[P, G, L]`: the share of a token in every sum and divisor, 0 leaves it out. `gain` `[P, G, L]` multiplies
    the policy term alone and no divisor, None is 1 throughout.
    """

    mask: Tensor
    gain: Tensor | None = None


def early(like: Tensor, share: float) -> Tensor:
    """bool `[P, G, L]`: the first `floor(share L)` tokens, on which all others depend."""
    length = like.shape[-1]
    return (torch.arange(length, device=like.device) < int(share * length)).expand(like.shape)


def entropy_slope(entropy: Tensor) -> Tensor:
    """`[P, G, L]`: size of the spatial gradient of the entropy map, after a mean over the neighbours drawn before.

    The L tokens are a square in raster order. A token's mean is over itself and what lies left, above left, above and
    above right of it, as far as there is any; slopes are central differences, one-sided at the border.
    Source: zghhui/GCPO, gcpo_trainer.py, `select_high_entropy_gradient_tokens_batch`.

    Raises:
        ValueError: L is no square.
    """
    side = math.isqrt(entropy.shape[-1])
    if side * side != entropy.shape[-1] or side < 2:
        raise ValueError(
            f"the slope of the entropy needs image tokens in a square of 2 by 2 or more, got L = {entropy.shape[-1]}; "
            "set the share of entropy to 0"
        )
    picture = entropy.unflatten(-1, (side, side))
    padded = functional.pad(picture, (1, 1, 1, 0))
    there = functional.pad(torch.ones_like(picture), (1, 1, 1, 0))
    offsets = ((1, 1), (1, 0), (0, 0), (0, 1), (0, 2))  # row and column into the padding: self first

    def neighbours(values: Tensor) -> Tensor:
        return torch.stack([values[..., r : r + side, c : c + side] for r, c in offsets]).sum(0)

    smooth = neighbours(padded) / neighbours(there)
    down, right = torch.gradient(smooth, dim=(-2, -1))
    return (down.square() + right.square()).sqrt().flatten(-2)


def variety(codes: Tensor) -> Tensor:
    """`[P, G, L]`: mean cosine to the other samples of the group at each position; low is varied."""
    groups, group_size = codes.shape[:2]
    others = ~torch.eye(group_size, dtype=torch.bool, device=codes.device)
    counts = others.sum(dim=-1).expand(groups, group_size)
    return mean_cosine(codes, others.expand(groups, group_size, group_size), counts)


def largest(values: Tensor, among: Tensor, count: int) -> Tensor:
    """bool `[P, G, L]`: the `count` largest values of each sample among the tokens of a mask, the first of equals."""
    order = values.masked_fill(~among, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    chosen = torch.zeros_like(among).scatter(-1, order[..., :count], True)
    return chosen & among


class CriticalShares:
    """GCPO's choice of tokens: early ones, ones at edges of the entropy map, and ones that differ within the group.

        mask = early ∪ steep ∪ varied,    gain_t = mean over u <= t of exp(clip(lp_u - lr_u, -bound, bound))

    `early` are the first tokens; `steep` have the steepest entropy among the tokens between the early ones and as many
    at the end; `varied` have the lowest mean cosine to the group among the tokens not chosen yet.

    Source: GCPO, arXiv 2509.22485, section 3, and zghhui/GCPO, gcpo_trainer.py: shares of 0.1 each, "leveraging 30% of
    the image tokens", bound 0.5.

    Departures from the published code:
    1. The gain is a number: the published one carries a gradient of its own through lp.
    2. Cosines are of codebook vectors (what `rollout.codes` holds); the published ones of the embeddings read next.
    3. The entropy is that of the scored distribution; the published one of the guided logits while sampling.
    4. lp is that of the policy that sampled, also in later updates of a rollout.
    5. The end left out of `steep` is as long as the beginning: 57 of 576 tokens, where the published code leaves 59.

    Args:
        early, entropy, variety: shares of the tokens of a sample, at least 0, together at most 1.
        bound: of the log-ratio to the reference in the gain, nats; null leaves the gain out.
    """

    def __init__(self, *, early: float, entropy: float, variety: float, bound: float | None) -> None:
        self.early, self.entropy, self.variety, self.bound = early, entropy, variety, bound

    @property
    def needs_reference(self) -> bool:
        """Whether the gain compares with the reference."""
        return self.bound is not None

    def check(self, switches: Mapping[str, Any]) -> None:
        """Raises ValueError for shares that are none, or a bound that is not positive."""
        shares = (self.early, self.entropy, self.variety)
        if not all(share >= 0 for share in shares) or not 0 < sum(shares) <= 1 + 1e-9:
            raise ValueError(
                f"critical tokens need shares of at least 0 that are together above 0 and at most 1, got {shares}; "
                "GCPO's are 0.1 each"
            )
        if self.bound is not None and not self.bound > 0:
            raise ValueError(
                f"the gain of critical tokens needs a bound above 0 nats, got {self.bound}; null leaves it out"
            )

    def __call__(self, *, old: TokenScores, reference: TokenScores | None, codes: Tensor) -> CriticalTokens:
        """The mask in the dtype of `old.logps`, and the gain."""
        length = old.logps.shape[-1]
        first = early(old.logps, self.early)
        mask = first
        if self.entropy > 0:
            middle = ~first & ~first.flip(-1)
            mask = mask | largest(entropy_slope(old.entropy), middle, int(self.entropy * length))
        if self.variety > 0:
            mask = mask | largest(-variety(codes), ~mask, int(self.variety * length))
        gain = None
        if self.bound is not None:
            assert reference is not None  # `needs_reference`, and `checks.check_rollout` saw to it
            ratio = (old.logps - reference.logps).clamp(-self.bound, self.bound).exp()
            gain = ratio.cumsum(dim=-1) / torch.arange(1, length + 1, device=ratio.device)
        return CriticalTokens(mask=mask.to(old.logps.dtype), gain=gain)
