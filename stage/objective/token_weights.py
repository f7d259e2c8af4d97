"""Variants of STAGE's token weights, for the questions that the paper leaves open.

Slots for `Objective.token_weights`, see `similarity.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from stage.objective.similarity import StageWeights, TokenWeights, mean_cosine, opposing, weigh


class ScaledWeights(StageWeights):
    """`w = clip((1 - s) / 2, 0, 1)` as in the paper, `m = kl_base + kl_slope * clip(s + 1, 0, 1)` with other numbers.

    The paper's are 0.5 and 0.5 (arXiv 2509.25027): an opposite token (s = -1) has half the KL of a like one. A slope
    of 0 weighs all alike, one below 0 holds unlike tokens the most.

    Args:
        kl_base: m where tokens are opposite.
        kl_slope: how much larger m is where they are alike or unrelated.
        features: method of the policy that gives the vectors compared: `codes`, those of the codebook, or
            `decoder_features`, what the VQ decoder makes of them and their surroundings.
    """

    def __init__(self, *, kl_base: float, kl_slope: float, features: str) -> None:
        self.kl_base, self.kl_slope, self.features = kl_base, kl_slope, features

    def check(self, switches: Mapping[str, Any]) -> None:
        """Raises ValueError for weights of the KL that could be negative, or an unknown space."""
        if self.kl_base < 0 or self.kl_base + self.kl_slope < 0:
            raise ValueError(
                f"weights of the KL are at least 0, got kl_base={self.kl_base} and kl_base + kl_slope="
                f"{self.kl_base + self.kl_slope}; the paper's are 0.5 and 1"
            )
        if self.features not in ("codes", "decoder_features"):
            raise ValueError(
                f"features must be codes or decoder_features, got {self.features!r}; the paper compares codes"
            )

    def __call__(self, *, advantages: Tensor, kept: Tensor, codes: Tensor) -> TokenWeights:
        """Weights from advantages `[P, G]` and vectors `[P, G, L, C]`; `kept` `[P]` plays no part."""
        found = super().__call__(advantages=advantages, kept=kept, codes=codes)
        kl = self.kl_base + self.kl_slope * (found.similarity + 1.0).clamp(0.0, 1.0)
        return replace(found, kl=kl)


class AcrossPrompts:
    """STAGE's weights with opponents from all prompts of the batch: every sample of the opposite advantage.

    The published code does this when a rank holds several prompts: its mask `A_i A_j <= 0` runs over all samples of
    the rank (krennic999/STAGE, grpo_trainer.py, `cos_sim_mask`), where the paper's is that of a group. Here it is that
    of all ranks. Baselines and divisors stay those of a group.
    """

    compares_batch = True

    def __call__(self, *, advantages: Tensor, kept: Tensor, codes: Tensor) -> TokenWeights:
        """Weights from advantages `[P, G]` and code vectors `[P, G, L, C]`; `kept` `[P]` plays no part."""
        everyone = advantages.flatten()[None]
        pairs = opposing(everyone)
        similarity = mean_cosine(codes.flatten(0, 1)[None], pairs, pairs.sum(dim=-1))
        return weigh(similarity[0].unflatten(0, advantages.shape))
