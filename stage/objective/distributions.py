"""How far whole distributions are apart: policy and reference compared over all V tokens at each position, in nats.

An estimator at the sampled token (divergence.py) is noisy, and its gradient that of another divergence than its value.
These sum over the vocabulary: no noise, and the gradient of what they say. They are slots for `Objective.divergence`;
what they sum over is computed while tokens are scored, from the input of the last layer of both models, a thousand
positions at a time, so that logits of all positions never exist. Without such a slot nothing of this is computed.

Distributions are those of policy and reference given the tokens before, which the old policy drew: a divergence of
whole images is the mean over such beginnings, and its gradient through them is left to the policy term.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stage.objective.logprobs import (
    ROWS,
    accumulation_dtype,
    at_rows,
    flat_temperature,
    linear_logits,
    log_softmax_of,
    narrowed,
    row_parts,
    wide_product,
)
from stage.types import TokenScores


class WholeDistribution:
    """What the three have in common as a slot: the divergence that came with the scores."""

    @property
    def compared(self) -> WholeDistribution:
        """What tokens must be scored with: `Objective.compared` finds it here."""
        return self

    def __call__(self, *, scores: TokenScores, reference: TokenScores) -> Tensor:
        """`[P, G, L]`, nats. Raises ValueError where tokens were scored without it, as those of plans are."""
        if scores.divergence is None:
            raise ValueError(
                f"{type(self).__name__} compares whole distributions of image tokens, and these scores hold none; "
                "with reasoning or a policy of your own take algorithm/divergence=k1, k2 or k3"
            )
        return scores.divergence

    def value(self, policy: Tensor, reference: Tensor) -> Tensor:
        """`[n]` of log-probabilities `[n, V]`."""
        raise NotImplementedError

    def slope(self, policy: Tensor, reference: Tensor) -> Tensor:
        """`[n, V]`: the gradient of `value` with respect to the logits behind `policy`."""
        raise NotImplementedError


class ReverseKL(WholeDistribution):
    """`KL(p || r) = Σ_v p_v (log p_v - log r_v)`, p policy, r reference: seeks the modes of the reference.

    What k1, k2 and k3 estimate. With z the logits, `d/dz_v = p_v (log p_v - log r_v - KL)`. Source: S. Kullback and
    R. Leibler, "On Information and Sufficiency", 1951; MiniLLM, arXiv 2306.08543, section 2.1, for the two directions.
    """

    def value(self, policy: Tensor, reference: Tensor) -> Tensor:
        return _relative(policy, policy - reference).sum(dim=-1)

    def slope(self, policy: Tensor, reference: Tensor) -> Tensor:
        return _centred(policy, policy - reference)


class ForwardKL(WholeDistribution):
    """`KL(r || p) = Σ_v r_v (log r_v - log p_v)`: covers all that the reference does.

    `d/dz_v = p_v - r_v`, which is what k3 of a sampled token has in expectation. Source: as `ReverseKL`.
    """

    def value(self, policy: Tensor, reference: Tensor) -> Tensor:
        return _relative(reference, reference - policy).sum(dim=-1)

    def slope(self, policy: Tensor, reference: Tensor) -> Tensor:
        return policy.exp() - reference.exp()


class JensenShannon(WholeDistribution):
    """`JS = KL(p || m) / 2 + KL(r || m) / 2` with `m = (p + r) / 2`: symmetric, and at most log 2.

    `d/dz_v = p_v (log p_v - log m_v - KL(p || m)) / 2`. Source: J. Lin, "Divergence Measures Based on the Shannon
    Entropy", 1991, eq. 4.1 with weights of one half.
    """

    def value(self, policy: Tensor, reference: Tensor) -> Tensor:
        middle = _middle(policy, reference)
        apart = _relative(policy, policy - middle) + _relative(reference, reference - middle)
        return 0.5 * apart.sum(dim=-1)

    def slope(self, policy: Tensor, reference: Tensor) -> Tensor:
        return 0.5 * _centred(policy, policy - _middle(policy, reference))


def _middle(policy: Tensor, reference: Tensor) -> Tensor:
    return torch.logaddexp(policy, reference) - math.log(2.0)


def _relative(log_weights: Tensor, differences: Tensor) -> Tensor:
    """`exp(log_weights) * differences`, 0 where the weight is: a token without probability adds nothing."""
    weights = log_weights.exp()
    return (weights * differences).masked_fill(weights == 0, 0.0)


def _centred(policy: Tensor, differences: Tensor) -> Tensor:
    terms = _relative(policy, differences)
    return terms - policy.exp() * terms.sum(dim=-1, keepdim=True)


@dataclass(frozen=True)
class Comparison:
    """What the distributions of a policy are compared with while its tokens are scored.

    `kind` says how. `features` `[P, G, L, D]` are the inputs of the last layer of the reference at the same positions,
    guided as those of the policy, `weight` `[V, D]` and `bias` `[V]` (or None) that layer. None has a gradient.
    """

    kind: WholeDistribution
    features: Tensor
    weight: Tensor
    bias: Tensor | None

    def part(self, prompts: slice, samples: slice) -> Comparison:
        """That of some prompts and some samples."""
        return replace(self, features=self.features[prompts, samples])


def linear_divergence(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other: Comparison,
    temperature: float | Tensor,
    rows: int = ROWS,
) -> Tensor:
    """`other.kind` of softmax(logits / temperature) at each position, `[...]`, with gradient in the first three.

    Args:
        features: `[..., D]`, the input of the last layer of the policy; `other.features` have as many positions.
        weight, bias: `[V, D]` and `[V]` of that layer; autocast narrows them as it does for a linear layer.
        temperature: as in `logprobs.token_scores`.
        rows: positions computed at once; it bounds memory and does not change a value.

    Raises ValueError for another number of positions or another vocabulary, or a temperature that is not positive.
    """
    if other.features.shape[:-1].numel() != features.shape[:-1].numel() or len(other.weight) != len(weight):
        raise ValueError(
            "distributions are compared position by position over one vocabulary, got features "
            f"{tuple(features.shape)} and {tuple(other.features.shape)}, vocabularies {len(weight)} and "
            f"{len(other.weight)}; cut both alike, and let the reference be a copy of the policy"
        )
    at = flat_temperature(temperature, features[..., 0])
    with torch.no_grad():
        theirs = narrowed(other.features.detach(), other.weight.detach(), other.bias)
    found: Tensor = _LinearDivergence.apply(*narrowed(features, weight, bias), theirs, at, other.kind, rows)
    return found


class _LinearDivergence(torch.autograd.Function):
    """Keeps the inputs of both last layers and makes the logits of some rows when they are needed, twice in all."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        theirs: tuple[Tensor, Tensor, Tensor | None],
        temperature: float | Tensor,
        kind: WholeDistribution,
        rows: int,
    ) -> Tensor:
        flat, other = features.flatten(0, -2), theirs[0].flatten(0, -2)
        found = flat.new_empty(len(flat), dtype=accumulation_dtype(features.dtype))
        with torch.autocast(features.device.type, enabled=False):
            for part in row_parts(len(flat), rows):
                at = at_rows(temperature, part)
                mine = log_softmax_of(linear_logits(flat[part], weight, bias), at)
                reference = log_softmax_of(linear_logits(other[part], theirs[1], theirs[2]), at)
                found[part] = kind.value(mine, reference)
        ctx.save_for_backward(features, weight, bias, *theirs)
        ctx.settings = temperature, kind, rows
        return found.view(features.shape[:-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, weight, bias, *theirs = ctx.saved_tensors
        temperature, kind, rows = ctx.settings
        flat, other, grad = features.flatten(0, -2), theirs[0].flatten(0, -2), grad.flatten()
        wanted, dtype = ctx.needs_input_grad, accumulation_dtype(features.dtype)
        grad_features = torch.empty_like(flat) if wanted[0] else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if wanted[1] else None
        grad_bias = torch.zeros_like(bias, dtype=dtype) if wanted[2] else None
        with torch.autocast(features.device.type, enabled=False):
            for part in row_parts(len(flat), rows):
                at = at_rows(temperature, part)
                mine = log_softmax_of(linear_logits(flat[part], weight, bias), at)
                reference = log_softmax_of(linear_logits(other[part], theirs[1], theirs[2]), at)
                logits = kind.slope(mine, reference) * (grad[part, None] / at)
                narrow = logits.to(features.dtype)
                if grad_features is not None:
                    grad_features[part] = narrow @ weight
                if grad_weight is not None:
                    grad_weight += wide_product(narrow.t(), flat[part])
                if grad_bias is not None:
                    grad_bias += logits.sum(dim=0)
        return (
            grad_features if grad_features is None else grad_features.view_as(features),
            grad_weight if grad_weight is None else grad_weight.to(weight.dtype),
            grad_bias if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )
