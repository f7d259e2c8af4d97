"""Log-probability and entropy of given tokens from logits, without a float32 copy of all logits.

Logits of a 7B image model are `[8, 576, 16384]` in bfloat16. A plain `log_softmax` keeps a float32 copy of
them for the backward pass and makes more on the way. Here rows (positions) are taken a few at a time, in
float32, and the backward pass computes the softmax of those rows again from the logits it was given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stage.types import TokenScores

ROWS = 1024  # rows of float32 logits alive at once: 64 MiB for a codebook of 16384


def token_scores(logits: Tensor, tokens: Tensor, temperature: float, rows: int = ROWS) -> TokenScores:
    """Scores of `tokens` under `softmax(logits / temperature)`, in nats.

    Args:
        logits: `[..., V]`, any floating dtype; already guided where guidance is wanted.
        tokens: int64 `[...]`, the shape of the logits without their last axis, each in `[0, V)`.
        temperature: above 0.
        rows: positions computed at once; it bounds memory and does not change a value.

    Returns:
        `logps` and `entropy`, both `[...]`, float32 (float64 for float64 logits). The gradient flows through
        `logps` alone; `entropy`, over the full vocabulary, is detached.

    Raises:
        ValueError: shapes that do not match, a temperature that is not positive.
    """
    if logits.shape[:-1] != tokens.shape:
        raise ValueError(
            f"tokens must have the shape of the logits without the vocabulary: logits {tuple(logits.shape)}, "
            f"tokens {tuple(tokens.shape)}; cut both to the image positions"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}; 1.0 leaves the logits as they are")
    flat_logits = logits.reshape(-1, logits.shape[-1])
    logps, entropy = _TokenScores.apply(flat_logits, tokens.reshape(-1), float(temperature), rows)
    return TokenScores(logps=logps.view(tokens.shape), entropy=entropy.view(tokens.shape))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything narrower is accumulated in float32."""
    return torch.promote_types(dtype, torch.float32)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """`[n, V]` in any dtype to log-probabilities in the accumulation dtype."""
    return (logits.to(accumulation_dtype(logits.dtype)) / temperature).log_softmax(dim=-1)


class _TokenScores(torch.autograd.Function):
    """Keeps the logits it was given; the backward is `(one_hot - softmax) / temperature`, by rows."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tokens: Tensor, temperature: float, rows: int
    ) -> tuple[Tensor, Tensor]:
        logps = logits.new_empty(tokens.shape, dtype=accumulation_dtype(logits.dtype))
        entropy = torch.empty_like(logps)
        for start in range(0, len(tokens), rows):
            part = slice(start, start + rows)
            log_probs = _log_softmax(logits[part], temperature)
            logps[part] = log_probs.gather(1, tokens[part, None])[:, 0]
            # entr is 0 where p is 0, so a token masked by a logit of -inf adds nothing instead of NaN
            entropy[part] = torch.special.entr(log_probs.exp_()).sum(dim=-1)
        ctx.save_for_backward(logits, tokens)
        ctx.temperature, ctx.rows = temperature, rows
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logps: Tensor, _grad_entropy: Tensor) -> tuple[Tensor, None, None, None]:
        logits, tokens = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        for start in range(0, len(tokens), ctx.rows):
            part = slice(start, start + ctx.rows)
            scale = grad_logps[part, None] / ctx.temperature
            grad = _log_softmax(logits[part], ctx.temperature).exp_().mul_(-scale)
            grad.scatter_add_(1, tokens[part, None], scale)
            grad_logits[part] = grad.to(logits.dtype)
        return grad_logits, None, None, None
