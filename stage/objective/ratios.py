"""Ratios beyond PPO's: one of the whole sequence (GSPO), and one that weighs the gradient (CISPO).

Both are slots for `Objective.ratio`, see `surrogate.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stage.objective.surrogate import Surrogate, clipped_surrogate
from stage.types import TokenScores


def sequence_log_ratio(scores: TokenScores, old_logps: Tensor) -> Tensor:
    """`mean_t (lp_t - lp_old_t)` over a sample's own tokens, `[P, G, 1]`; 0 for a sample without tokens."""
    difference = scores.logps - old_logps
    if scores.mask is None:
        return difference.mean(dim=-1, keepdim=True)
    mask = scores.mask.to(difference.dtype)
    return (mask * difference).sum(dim=-1, keepdim=True) / mask.sum(dim=-1, keepdim=True).clamp_min(1.0)


class SequenceRatio:
    """GSPO: one ratio a sample, the geometric mean of those of its tokens, clipped for all tokens at once.

        ρ_i = exp(mean_t (lp_it - lp_old_it)),    ρ_it = sg(ρ_i) exp(lp_it - sg(lp_it)),    min(ρ A, clip(ρ) A)

    Source: GSPO, arXiv 2507.18071, eq. 5 and 7; `ρ_it` is that of GSPO-token, eq. 13 and 14, with the value of `ρ_i`
    everywhere and the gradient of its own token. Where all tokens weigh the same it is GSPO in value and gradient;
    where they do not (STAGE's reweighting, critical tokens) each weight meets the gradient of its own token, while
    ρ_i stays that of all tokens.
    """

    def check(self, switches: Mapping[str, Any]) -> None:
        """Raises ValueError unless both bounds are numbers, 0 < clip_low <= 1 and 0 < clip_high."""
        low, high = switches["clip_low"], switches["clip_high"]
        if low is None or high is None or not (0 < low <= 1 and high > 0):
            raise ValueError(
                "a sequence ratio needs 0 < clip_low <= 1 and clip_high > 0, "
                f"got clip_low={low}, clip_high={high}; GSPO's are 3e-4 and 4e-4, since a mean moves little"
            )

    def __call__(
        self,
        *,
        scores: TokenScores,
        old_logps: Tensor,
        advantages: Tensor,
        clip_low: float | None,
        clip_high: float | None,
    ) -> Surrogate:
        """The surrogate of `scores.logps` `[P, G, L]` against `old_logps` `[P, G, L]`."""
        assert clip_low is not None and clip_high is not None  # `check` saw to it
        whole = sequence_log_ratio(scores, old_logps).detach()
        ratio = (whole + scores.logps - scores.logps.detach()).exp()
        return clipped_surrogate(ratio, advantages, clip_low, clip_high)


class ClippedWeight:
    """CISPO: the clipped ratio is a weight of the gradient and not a gate, so that every token keeps one.

        sg(clip(ρ, 1 - clip_low, 1 + clip_high)) A lp,    ρ = exp(lp - lp_old)

    Source: MiniMax-M1, arXiv 2506.13585, eq. 4 and 5. Its experiments have no lower bound on the weight, which is
    clip_low: null here. The value of the term is that of REINFORCE, so loss/policy is no mean of ratios.
    """

    def check(self, switches: Mapping[str, Any]) -> None:
        """Raises ValueError unless clip_high > 0 and clip_low is null or 0 < clip_low <= 1."""
        low, high = switches["clip_low"], switches["clip_high"]
        if high is None or not high > 0 or (low is not None and not 0 < low <= 1):
            raise ValueError(
                "a clipped weight needs clip_high > 0, and clip_low in (0, 1] or null for no lower bound, "
                f"got clip_low={low}, clip_high={high}; set them, or take stage.objective.surrogate.OnPolicyRatio"
            )

    def __call__(
        self,
        *,
        scores: TokenScores,
        old_logps: Tensor,
        advantages: Tensor,
        clip_low: float | None,
        clip_high: float | None,
    ) -> Surrogate:
        """The surrogate of `scores.logps` `[P, G, L]` against `old_logps` `[P, G, L]`."""
        assert clip_high is not None  # `check` saw to it
        ratio = (scores.logps.detach() - old_logps).exp()
        weight = torch.clamp(ratio, None if clip_low is None else 1.0 - clip_low, 1.0 + clip_high)
        return Surrogate(
            values=weight * advantages[..., None] * scores.logps, ratio=ratio, clipped=weight != ratio
        )
