"""Do the gradients of the samples of a group pull against each other, and less so once their tokens are reweighted?

One backward pass a sample, so this is done on request and not in training.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from stage.objective.credit import Credit
from stage.rollout import Distribution, score_part
from stage.types import Rollout


@dataclass(frozen=True)
class Agreement:
    """How the gradients of the samples of one prompt fit together, means over prompts with a task gradient.

    opposite: mean cosine between samples whose advantages have opposite signs, None where there is no such pair.
    alike: the same between samples of equal sign.
    surviving: length of the sum over the sum of lengths, in [0, 1]: 1 where all agree, 0 where they cancel.
    groups: prompts that were counted, those with at least one gradient that is not zero.
    """

    opposite: float | None
    alike: float | None
    surviving: float | None
    groups: int


def chosen_parameters(policy: nn.Module, pattern: str | None) -> list[nn.Parameter]:
    """Trained parameters whose name matches `pattern` anywhere; None takes all. Raises ValueError for none."""
    found = [
        parameter
        for name, parameter in policy.named_parameters()
        if parameter.requires_grad and (pattern is None or re.search(pattern, name))
    ]
    if not found:
        raise ValueError(
            f"no trained parameter has a name that matches {pattern!r}; give another pattern or null"
        )
    return found


def sample_gradients(
    policy: Any,
    objective: Any,
    rollout: Rollout,
    credit: Credit,
    distribution: Distribution,
    parameters: Sequence[nn.Parameter],
    *,
    with_kl: bool,
) -> Tensor:
    """The part of the loss's gradient that each sample brings, float32 `[P, G, D]` on the CPU.

    They add up over samples and prompts to the gradient of the whole rollout.

    Args:
        credit: of the rollout, by the same objective.
        parameters: D is their size.
        with_kl: False leaves out the KL to the reference, and what is left is the policy term alone.
    """
    part = credit if with_kl else replace(credit, beta=0.0)
    groups, samples = rollout.tokens.shape[:2]
    size = sum(parameter.numel() for parameter in parameters)
    found = torch.empty(groups, samples, size)
    for p in range(groups):
        for g in range(samples):
            cell = slice(p, p + 1), slice(g, g + 1)
            scores = score_part(
                policy, rollout.prompt_tokens, rollout.tokens, rollout.plans, *cell, distribution
            )
            loss, _ = objective.loss(scores, part.micro_batch(*cell))
            gradients = torch.autograd.grad(loss, list(parameters), allow_unused=True)
            found[p, g] = torch.cat(
                [
                    torch.zeros(parameter.numel()) if gradient is None else gradient.flatten().float().cpu()
                    for gradient, parameter in zip(gradients, parameters, strict=True)
                ]
            )
    return found


def agreement(gradients: Tensor, advantages: Tensor) -> Agreement:
    """Cosines and what survives the sum, from gradients `[P, G, D]` and advantages `[P, G]`."""
    signs = advantages.sign().cpu()
    opposite: list[float] = []
    alike: list[float] = []
    surviving: list[float] = []
    for group, sign in zip(gradients.double(), signs, strict=True):
        lengths = group.norm(dim=-1)
        if not bool((lengths > 0).any()):
            continue
        surviving.append(float(group.sum(dim=0).norm() / lengths.sum()))
        unit = group / lengths.clamp_min(torch.finfo(group.dtype).tiny)[:, None]
        known = ((lengths > 0)[:, None] & (lengths > 0)[None]).triu(1)
        cosines, product = unit @ unit.T, sign[:, None] * sign[None]
        for found, chosen in ((opposite, known & (product < 0)), (alike, known & (product > 0))):
            if bool(chosen.any()):
                found.append(float(cosines[chosen].mean()))
    return Agreement(_mean(opposite), _mean(alike), _mean(surviving), len(surviving))


def cosine(first: Tensor, second: Tensor) -> float | None:
    """Between two gradients of any equal shape; None where one of them is zero."""
    a, b = first.double().flatten(), second.double().flatten()
    lengths = float(a.norm()) * float(b.norm())
    return None if lengths == 0 else float(a @ b) / lengths


def mean_sample_cosine(first: Tensor, second: Tensor) -> float | None:
    """Mean over samples of the cosine between their gradients in two settings, `[P, G, D]` each."""
    found = [cosine(a, b) for a, b in zip(first.flatten(0, 1), second.flatten(0, 1), strict=True)]
    return _mean([value for value in found if value is not None])


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
