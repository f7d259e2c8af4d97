"""A token from logits and a uniform number."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_cdf(logits: Tensor, draws: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """Tokens `[N]` of softmax(logits / temperature) and their log-probabilities `[N]`.

    Args:
        logits: float32 `[N, V]`.
        draws: uniform numbers `[N]` in [0, 1).
        temperature: 0 takes the most likely token, with log-probability 0; a tensor has one above 0 for each row.
    """
    if isinstance(temperature, Tensor):
        logits, temperature = logits / temperature.view(-1, 1), 1.0
    if temperature == 0:
        best, token = logits.max(-1)
        return token, best - best  # zero, or NaN where the logits are
    logps = (logits / temperature).log_softmax(-1)
    # Summed in float64: in float32 the tail of a codebook of 16384 would be lost in the rounding of the sum.
    cumulative = logps.exp().cumsum(-1, dtype=torch.float64)
    # The first token whose sum exceeds the target: a token of probability 0 is never it.
    target = draws.double().unsqueeze(1) * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, target, right=True).clamp(max=logits.shape[1] - 1)
    return token.squeeze(1), logps.gather(1, token).squeeze(1)
