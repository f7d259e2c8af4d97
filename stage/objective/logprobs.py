"""Log-probability and entropy of given tokens, without float32 logits of all positions.

Logits of a 7B image model are `[8, 576, 16384]`: 0.3 GB in float32, and a plain `log_softmax` keeps them for the
backward pass and makes more on the way. Here rows (positions) are taken a few at a time, in float32, and the
backward pass computes the softmax of those rows again: `token_scores` from the logits it was given,
`linear_token_scores` from the input of the layer that makes them, so that no logits are kept at all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stage.types import TokenScores

ROWS = 1024  # rows of float32 logits alive at once: 64 MiB for a codebook of 16384


def token_scores(
    logits: Tensor, tokens: Tensor, temperature: float | Tensor, rows: int = ROWS
) -> TokenScores:
    """Scores of `tokens` under `softmax(logits / temperature)`, in nats.

    Args:
        logits: `[..., V]`, any floating dtype; already guided where guidance is wanted.
        tokens: int64 `[...]`, the shape of the logits without their last axis, each in `[0, V)`.
        temperature: above 0; one for all, or a tensor that broadcasts to the tokens.
        rows: positions computed at once; it bounds memory and does not change a value.

    Returns:
        `logps` and `entropy` over the full vocabulary, both `[...]`, float32 (float64 for float64 logits). The
        gradient flows through both; where none comes back to the entropy, none is computed.

    Raises:
        ValueError: shapes that do not match, a temperature that is not positive.
    """
    if logits.shape[:-1] != tokens.shape:
        raise ValueError(
            f"tokens must have the shape of the logits without the vocabulary: logits {tuple(logits.shape)}, "
            f"tokens {tuple(tokens.shape)}; cut both to the image positions"
        )
    flat_logits, at = logits.reshape(-1, logits.shape[-1]), flat_temperature(temperature, tokens)
    logps, entropy = _TokenScores.apply(flat_logits, tokens.reshape(-1), at, rows)
    return TokenScores(logps=logps.view(tokens.shape), entropy=entropy.view(tokens.shape))


def linear_token_scores(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    temperature: float | Tensor,
    rows: int = ROWS,
) -> TokenScores:
    """`token_scores` of the logits `features @ weight.T + bias`, which exist for `rows` positions at a time.

    Products of narrow numbers are summed in float32 and stay there: logits are never rounded to bfloat16.

    Args:
        features: `[..., D]`, the input of the last layer.
        weight, bias: `[V, D]` and `[V]` of the last layer; autocast narrows them as it does for a linear layer.
        tokens, temperature, rows: as in `token_scores`.

    Returns:
        As `token_scores`; the gradient reaches features, weight and bias.

    Raises:
        ValueError: shapes that do not match, a temperature that is not positive.
    """
    if features.shape[:-1] != tokens.shape or features.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"features must be tokens with the width of the layer: features {tuple(features.shape)}, tokens "
            f"{tuple(tokens.shape)}, weight {tuple(weight.shape)}; cut features and tokens to the same positions"
        )
    at = flat_temperature(temperature, tokens)
    features, weight, bias = narrowed(features, weight, bias)
    logps, entropy = _LinearTokenScores.apply(
        features.reshape(-1, features.shape[-1]), weight, bias, tokens.reshape(-1), at, rows
    )
    return TokenScores(logps=logps.view(tokens.shape), entropy=entropy.view(tokens.shape))


def narrowed(features: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three in the type that autocast gives a linear layer, or as they are."""
    device = features.device.type
    if not torch.is_autocast_enabled(device):
        return features, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return features.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)


def flat_temperature(temperature: float | Tensor, tokens: Tensor) -> float | Tensor:
    """One number, or one for each of the n tokens, `[n, 1]`. Raises ValueError unless all are above 0."""
    if not bool((temperature > 0).all() if isinstance(temperature, Tensor) else temperature > 0):
        raise ValueError(f"temperature must be above 0, got {temperature}; 1.0 leaves the logits as they are")
    if isinstance(temperature, Tensor):
        return temperature.expand(tokens.shape).reshape(-1, 1)
    return float(temperature)


def at_rows(temperature: float | Tensor, part: slice) -> float | Tensor:
    """The temperature of some rows."""
    return temperature[part] if isinstance(temperature, Tensor) else temperature


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything narrower is accumulated in float32."""
    return torch.promote_types(dtype, torch.float32)


def log_softmax_of(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """`[n, V]` in any dtype to log-probabilities in the accumulation dtype."""
    return (logits.to(accumulation_dtype(logits.dtype)) / temperature).log_softmax(dim=-1)


def _gather(logits: Tensor, tokens: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `tokens` `[n]` and entropies `[n]` from logits `[n, V]`."""
    log_probs = log_softmax_of(logits, temperature)
    logps = log_probs.gather(1, tokens[:, None])[:, 0]
    # entr is 0 where p is 0, so a token masked by a logit of -inf adds nothing instead of NaN
    return logps, torch.special.entr(log_probs.exp_()).sum(dim=-1)


def _gradient(
    logits: Tensor,
    tokens: Tensor,
    temperature: float | Tensor,
    grad_logps: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor:
    """The gradient of logits `[n, V]` from those `[n]` of log-probabilities and of entropies, None where there is none.

    `(one_hot - p) / temperature` and `(-p log p - p H) / temperature` each times its own.
    """
    if grad_logps is None:
        if grad_entropy is None:
            return torch.zeros_like(logits, dtype=accumulation_dtype(logits.dtype))
        return _entropy_gradient(logits, temperature, grad_entropy)
    scale = grad_logps[:, None] / temperature
    grad = log_softmax_of(logits, temperature).exp_().mul_(-scale)
    grad = grad.scatter_add_(1, tokens[:, None], scale)
    return grad if grad_entropy is None else grad.add_(_entropy_gradient(logits, temperature, grad_entropy))


def _entropy_gradient(logits: Tensor, temperature: float | Tensor, grad_entropy: Tensor) -> Tensor:
    probabilities = log_softmax_of(logits, temperature).exp_()
    terms = torch.special.entr(probabilities)
    entropy = terms.sum(dim=-1, keepdim=True)
    return (terms - probabilities * entropy) * (grad_entropy[:, None] / temperature)


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` in the accumulation dtype, never rounded to a narrower one."""
    dtype = accumulation_dtype(left.dtype)
    if left.dtype != dtype and left.is_cuda:
        return torch.mm(left, right, out_dtype=dtype)  # on the matrix units, which sum in float32
    return left.to(dtype) @ right.to(dtype)


def linear_logits(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Logits `[n, V]` of features `[n, D]` in the accumulation dtype."""
    logits = wide_product(features, weight.t())
    return logits if bias is None else logits.add_(bias)


def row_parts(length: int, rows: int) -> list[slice]:
    """Slices of at most `rows` that cover a length."""
    return [slice(start, start + rows) for start in range(0, length, rows)]


def _cut(grads: tuple[Tensor | None, ...], part: slice) -> tuple[Tensor | None, ...]:
    return tuple(None if grad is None else grad[part] for grad in grads)


class _TokenScores(torch.autograd.Function):
    """Keeps the logits it was given and goes through them by rows, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tokens: Tensor, temperature: float | Tensor, rows: int
    ) -> tuple[Tensor, Tensor]:
        logps = logits.new_empty(tokens.shape, dtype=accumulation_dtype(logits.dtype))
        entropy = torch.empty_like(logps)
        for part in row_parts(len(tokens), rows):
            logps[part], entropy[part] = _gather(logits[part], tokens[part], at_rows(temperature, part))
        ctx.save_for_backward(logits, tokens)
        ctx.temperature, ctx.rows = temperature, rows
        ctx.set_materialize_grads(False)
        return logps, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None, None]:
        logits, tokens = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        for part in row_parts(len(tokens), ctx.rows):
            grad_logits[part] = _gradient(
                logits[part], tokens[part], at_rows(ctx.temperature, part), *_cut(grads, part)
            )
        return grad_logits, None, None, None


class _LinearTokenScores(torch.autograd.Function):
    """Keeps the input of the last layer and makes the logits of some rows when they are needed, twice in all."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        temperature: float | Tensor,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        logps = features.new_empty(tokens.shape, dtype=accumulation_dtype(features.dtype))
        entropy = torch.empty_like(logps)
        with torch.autocast(features.device.type, enabled=False):
            for part in row_parts(len(tokens), rows):
                logits = linear_logits(features[part], weight, bias)
                logps[part], entropy[part] = _gather(logits, tokens[part], at_rows(temperature, part))
        ctx.save_for_backward(features, weight, bias, tokens)
        ctx.temperature, ctx.rows = temperature, rows
        ctx.set_materialize_grads(False)
        return logps, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        features, weight, bias, tokens = ctx.saved_tensors
        dtype = accumulation_dtype(features.dtype)
        wanted = ctx.needs_input_grad
        grad_features = torch.empty_like(features) if wanted[0] else None
        # Summed over the parts, so wider than the weights they belong to.
        grad_weight = torch.zeros_like(weight, dtype=dtype) if wanted[1] else None
        grad_bias = torch.zeros_like(bias, dtype=dtype) if wanted[2] else None
        with torch.autocast(features.device.type, enabled=False):
            for part in row_parts(len(tokens), ctx.rows):
                logits = linear_logits(features[part], weight, bias)
                grad = _gradient(logits, tokens[part], at_rows(ctx.temperature, part), *_cut(grads, part))
                narrow = grad.to(features.dtype)
                if grad_features is not None:
                    grad_features[part] = narrow @ weight
                if grad_weight is not None:
                    grad_weight += wide_product(narrow.t(), features[part])
                if grad_bias is not None:
                    grad_bias += grad.sum(dim=0)
        return (
            grad_features,
            grad_weight if grad_weight is None else grad_weight.to(weight.dtype),
            grad_bias if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )
