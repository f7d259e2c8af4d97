"""The loss of the plans before the images: a masked mean over their tokens, with the advantage of the sample.

For one group, with samples i and the tokens r of their plans (mask p), ρ, A and k3 as for the images:

    text  = - Σ_ir p min(ρ A, clip(ρ) A) / Σ_ir p  +  β Σ_ir p k3 / Σ_ir p
    loss  = image loss + weight * mean over groups of text

Reweighting, similarity and entropy reward are about positions of an image and leave plans alone. The divisor is the
number of tokens of the whole group, counted before micro-batches are cut, so a long plan weighs more than a short one
and micro-batches do not change the value.
"""

from __future__ import annotations

from torch import Tensor


def plan_loss(
    surrogate: Tensor,
    divergence: Tensor | None,
    mask: Tensor,
    divisors: Tensor,
    *,
    beta: float,
    num_groups: int,
) -> Tensor:
    """This part's share of the plans' term, 0-d, before its weight.

    Args:
        surrogate: `[P, G, R]`, to be maximised.
        divergence: `[P, G, R]`, None where there is no KL term.
        mask: `[P, G, R]`, 1 on a plan's own tokens.
        divisors: `[P]`, tokens of all plans of a group, those of other micro-batches included.
        beta: coefficient of the KL term.
        num_groups: of the whole rollout.
    """
    cost = -surrogate if divergence is None else beta * divergence - surrogate
    return ((mask * cost).sum(dim=(1, 2)) / divisors).sum() / num_groups


def plan_metrics(
    *,
    entropy: Tensor,
    ratio: Tensor,
    clipped: Tensor,
    divergence: Tensor | None,
    mask: Tensor,
    total: Tensor,
    num_samples: int,
) -> dict[str, Tensor]:
    """This part's share of means over all plans, detached 0-d tensors; plan/ratio_max is a maximum.

    Args:
        entropy, ratio, clipped, divergence, mask: `[P, G, R]`; entropy in nats, over the text vocabulary.
        total: 0-d, tokens of all plans of the rollout.
        num_samples: P * G of the rollout.

    Returns:
        plan/length in tokens a plan, the end token counted; plan/entropy, plan/clip_fraction, plan/ratio_max and,
        with a divergence, plan/kl of their tokens.
    """

    def mean(values: Tensor) -> Tensor:
        return (mask * values.detach()).sum() / total

    found = {
        "plan/length": mask.sum().to(ratio.dtype) / num_samples,
        "plan/entropy": mean(entropy),
        "plan/ratio_max": ratio.detach().masked_fill(mask == 0, 0.0).amax(),
        "plan/clip_fraction": mean(clipped.to(ratio.dtype)),
    }
    return found if divergence is None else found | {"plan/kl": mean(divergence)}
