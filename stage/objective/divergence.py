"""How far the policy is from the reference, estimated at the sampled tokens, in nats.

A slot for `Objective.divergence` is called with keywords `scores` and `reference`, both `TokenScores`, and
returns `[P, G, L]`. It gets the whole records, so a divergence of more than log-probabilities needs no other
interface.
"""

from __future__ import annotations

from torch import Tensor

from stage.types import TokenScores


def k3(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """`exp(lr - lp) - (lr - lp) - 1`: unbiased for KL(policy || reference), never negative, low variance.

    Source: J. Schulman, "Approximating KL divergence"; DeepSeekMath, arXiv 2402.03300, eq. 4. `expm1` is the
    same value without the cancellation that costs float32 all its digits while policy and reference are still
    close.

    Args:
        logps: lp, `[P, G, L]`, with gradient.
        reference_logps: lr, `[P, G, L]`.

    Returns:
        `[P, G, L]`, nats.
    """
    difference = reference_logps - logps
    return difference.expm1() - difference


class K3:
    """The k3 estimator as a slot."""

    def __call__(self, *, scores: TokenScores, reference: TokenScores) -> Tensor:
        """`k3` of each token, `[P, G, L]`."""
        return k3(scores.logps, reference.logps)
