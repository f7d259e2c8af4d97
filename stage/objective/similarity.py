"""STAGE's token weights: how alike is what a sample drew here to what samples of the opposite advantage drew.

A position where a good and a bad image carry the same visual token cannot be what made one of them good: its
advantage is weighted down, and its KL keeps its weight, which is lowered where the codes point apart. Source: STAGE,
arXiv 2509.25027, similarity-aware reweighting.

A slot for `Objective.token_weights` is called with keywords `advantages`, `kept` and `codes`, returns
`TokenWeights`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

SMALLEST_NORM = 1e-8  # a code vector shorter than this has cosine 0 with every other


@dataclass(frozen=True)
class TokenWeights:
    """`[P, G, L]` each: `similarity` s in [-1, 1], `advantage` w in [0, 1], `kl` m in [0.5, 1].

    Divisors are sums of these; `Objective` then stores them in the dtype of the log-probabilities.
    """

    similarity: Tensor
    advantage: Tensor
    kl: Tensor


def opposing(advantages: Tensor) -> Tensor:
    """bool `[P, G, G]`: `M_ij = 1[A_i A_j <= 0]` for `i != j`, from advantages `[P, G]`.

    Signs are compared, not products, so tiny advantages do not underflow into opposition.
    """
    signs = advantages.sign()
    pairs = signs[:, :, None] * signs[:, None, :] <= 0
    diagonal = torch.eye(advantages.shape[-1], dtype=torch.bool, device=advantages.device)
    return pairs & ~diagonal


def mean_cosine(codes: Tensor, pairs: Tensor, counts: Tensor) -> Tensor:
    """`s_it = sum_j M_ij cos(q_it, q_jt) / counts_i`, 0 where the count is 0.

    The sum over j runs over unit vectors before the dot product, so nothing of size `[G, G, L]` is built.

    Args:
        codes: q, `[P, G, L, C]`.
        pairs: M, bool `[P, G, G]`.
        counts: `[P, G]`, what the sum is divided by.

    Returns:
        `[P, G, L]` float64.
    """
    vectors = codes.double()
    unit = vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(SMALLEST_NORM)
    others = torch.einsum("pij,pjlc->pilc", pairs.to(unit.dtype), unit)
    total = (unit * others).sum(dim=-1)
    return torch.where(counts[..., None] > 0, total / counts[..., None].clamp_min(1), 0.0)


def advantage_weights(similarity: Tensor) -> Tensor:
    """`w = clip((1 - s) / 2, 0, 1)`: 1 where the tokens are opposite, 0 where they are the same."""
    return ((1.0 - similarity) / 2.0).clamp(0.0, 1.0)


def kl_weights(similarity: Tensor) -> Tensor:
    """`m = 0.5 + 0.5 clip(s + 1, 0, 1)`: 1 where tokens are alike or unrelated, 0.5 where opposite."""
    return 0.5 + 0.5 * (similarity + 1.0).clamp(0.0, 1.0)


def weigh(similarity: Tensor) -> TokenWeights:
    """Both weights of a similarity `[P, G, L]`."""
    return TokenWeights(similarity, advantage_weights(similarity), kl_weights(similarity))


class StageWeights:
    """The weights of the paper: a sample is never compared with itself."""

    def __call__(self, *, advantages: Tensor, kept: Tensor, codes: Tensor) -> TokenWeights:
        """Weights from advantages `[P, G]` and code vectors `[P, G, L, C]`; `kept` `[P]` plays no part."""
        pairs = opposing(advantages)
        return weigh(mean_cosine(codes, pairs, pairs.sum(dim=-1)))


class ReleasedWeights:
    """The weights as the published code computes them (krennic999/STAGE, grpo_trainer.py).

    Differences from `StageWeights`:
    1. Where A_i = 0 the sample counts itself among its opponents, with a cosine of 0: the divisor is
       larger by one.
    2. Where no reward column was kept and no entropy reward acts, s = 1 everywhere, so w = 0 and m = 1.
    3. Every cosine is rounded to float32, and what follows is float32: a loss near 0 shows the difference.
    Departure from the published code:
    4. A sample without opponents has s = 0, where the published code divides by zero.
    """

    def __call__(self, *, advantages: Tensor, kept: Tensor, codes: Tensor) -> TokenWeights:
        """Weights from advantages `[P, G]`, `kept` bool `[P]` and code vectors `[P, G, L, C]`."""
        pairs = opposing(advantages)
        counts = (pairs.sum(dim=-1) + (advantages == 0))[..., None]
        cosines = functional.cosine_similarity(codes[:, :, None], codes[:, None], dim=-1).float()
        total = (cosines * pairs[..., None]).sum(dim=2)
        similarity = torch.where(counts > 0, total / counts.clamp_min(1), 0.0)
        return weigh(torch.where(kept[:, None, None], similarity, 1.0))
