"""How far the policy is from the reference, estimated at the sampled tokens, in nats.

A slot for `Objective.divergence` is called with keywords `scores` and `reference`, both `TokenScores`, and
returns `[P, G, L]`. It gets the whole records, so a divergence of more than log-probabilities needs no other
interface.

The three estimators of J. Schulman, "Approximating KL divergence" (joschu.net/blog/kl-approx.html), for tokens drawn
from the policy, differ most in their gradient when they stand in a loss, on policy and in expectation:

    k1    value unbiased, gradient 0: it constrains nothing, and adds noise
    k2    value biased, gradient that of KL(policy || reference)
    k3    value unbiased, gradient that of KL(reference || policy)

Divergences of whole distributions, without this noise, are in distributions.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

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


class K1:
    """`lp - lr`: the log-ratio itself, unbiased and of either sign.

    On policy its expected gradient is 0, since `E[∇ lp] = 0`; it is here for comparison, and for what it says in
    `policy/kl`.
    """

    def __call__(self, *, scores: TokenScores, reference: TokenScores) -> Tensor:
        """`[P, G, L]`, nats."""
        return scores.logps - reference.logps


class K2:
    """`(lp - lr)^2 / 2`: half the squared log-ratio, never negative; the gradient `(lp - lr) ∇ lp` is that of
    KL(policy || reference) in expectation."""

    def __call__(self, *, scores: TokenScores, reference: TokenScores) -> Tensor:
        """`[P, G, L]`, nats."""
        return 0.5 * (scores.logps - reference.logps).square()


class K3:
    """The k3 estimator as a slot."""

    def __call__(self, *, scores: TokenScores, reference: TokenScores) -> Tensor:
        """`k3` of each token, `[P, G, L]`."""
        return k3(scores.logps, reference.logps)


class Clipped:
    """Another divergence, cut to `[-most, most]` a token: a token beyond that has no gradient of the KL left.

    Source: verl, verl/trainer/ppo/core_algos.py, `kl_penalty`: `torch.clamp(kld, min=-10, max=10)` of k3.

    Args:
        of: the divergence that is cut.
        most: nats, above 0.
    """

    def __init__(self, *, of: Callable[..., Tensor], most: float) -> None:
        self.of, self.most = of, most

    def check(self, switches: Mapping[str, Any]) -> None:
        """Raises ValueError for a bound that is not positive."""
        if not (math.isfinite(self.most) and self.most > 0):
            raise ValueError(
                f"a clipped divergence needs a bound above 0 nats, got {self.most}; verl's is 10"
            )

    @property
    def compared(self) -> Any:
        """What tokens must be scored with for the divergence that is cut (distributions.py), or None."""
        return getattr(self.of, "compared", None)

    def __call__(self, *, scores: TokenScores, reference: TokenScores) -> Tensor:
        """`[P, G, L]`, nats."""
        return self.of(scores=scores, reference=reference).clamp(-self.most, self.most)
