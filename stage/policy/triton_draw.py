"""Inverse-CDF sampling of one token a row in one kernel (Triton, CUDA alone)."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _draw(
    logits,
    uniforms,
    step,
    tokens,
    logps,
    codes,
    length,
    inverse_temperature,
    GREEDY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.load(step)
    v = tl.arange(0, BLOCK)
    value = tl.load(logits + row * codes + v, mask=v < codes, other=-float("inf")).to(tl.float32)
    best = tl.max(value, 0)
    broken = tl.max(((value != value) | (value == float("inf"))).to(tl.int32), 0)
    if GREEDY:
        token = tl.min(tl.where(value == best, v, BLOCK), 0)
        logp = 0.0
    else:
        scaled = (value - best) * inverse_temperature
        chance = tl.exp(scaled)
        # Summed in float64: in float32 the tail of a codebook of 16384 would be lost in the rounding of the sum.
        cumulative = tl.cumsum(chance.to(tl.float64), 0)
        total = tl.max(cumulative, 0)
        target = tl.load(uniforms + row * length + at) * total
        token = tl.sum((cumulative <= target).to(tl.int32), 0)
        chosen = tl.sum(tl.where(v == token, scaled, 0.0), 0)
        logp = chosen - tl.log(total).to(tl.float32)
    tl.store(tokens + row * length + at, tl.minimum(token, codes - 1).to(tl.int64))
    tl.store(logps + row * length + at, tl.where(broken == 1, float("nan"), logp))


def draw(logits: Tensor, uniforms: Tensor, step: Tensor, temperature: float, tokens: Tensor, logps: Tensor) -> None:
    """Write column `step` `[1]` of tokens and logps, both `[N, L]`, drawn from softmax(logits / temperature).

    Args:
        logits: `[N, V]`.
        uniforms: float64 `[N, L]` in [0, 1).
        temperature: 0 takes the most likely token, the first of equals, with log-probability 0.
    """
    rows, codes = logits.shape
    kernel: Any = _draw
    kernel[(rows,)](
        logits,
        uniforms,
        step,
        tokens,
        logps,
        codes,
        tokens.shape[1],
        1.0 / temperature if temperature > 0 else 1.0,
        GREEDY=temperature == 0,
        BLOCK=triton.next_power_of_2(codes),
        num_warps=16 if codes > 4096 else 4,
    )
