"""What a decode step does between its matrix products, one kernel each (Triton, CUDA alone).

References in plain torch are in tests/policy/test_triton.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _add_norm(
    parts, residual, weight, normed, split, rows, size, eps, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < size
    x = tl.load(residual + row * size + d, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        for part in range(split):
            x += tl.load(parts + (part * rows + row) * size + d, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(residual.dtype.element_ty)
        tl.store(residual + row * size + d, rounded, mask=inside)
        x = rounded.to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, 0) / size + eps)
    scale = tl.load(weight + d, mask=inside, other=0.0)
    kind = normed.dtype.element_ty
    # Rounded before the weight multiplies it, as in transformers' LlamaRMSNorm.
    out = x.to(kind).to(tl.float32) * scale.to(tl.float32)
    tl.store(normed + row * size + d, out.to(kind), mask=inside)


def add_norm(parts: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm `[M, D]` of `residual` `[M, D]` after `parts`, `[M, D]` or `[split, M, D]`, were added to it in place."""
    rows, size = residual.shape
    normed = torch.empty_like(residual)
    split = 1 if parts is None or parts.ndim == 2 else len(parts)
    kernel: Any = _add_norm
    kernel[(rows,)](
        residual if parts is None else parts,
        residual,
        weight,
        normed,
        split,
        rows,
        size,
        eps,
        ADD=parts is not None,
        BLOCK=triton.next_power_of_2(size),
        num_warps=8 if size >= 2048 else 4,
    )
    return normed


@triton.jit
def _silu_multiply(gate_up, out, size, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * 2 * size + d, mask=d < size, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + d, mask=d < size, other=0.0).to(tl.float32)
    tl.store(out + row * size + d, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=d < size)


def silu_multiply(gate_up: Tensor) -> Tensor:
    """silu of the first half times the second half: `[M, 2N]` to `[M, N]`."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, size)
    kernel: Any = _silu_multiply
    kernel[(triton.cdiv(size, 1024), rows)](gate_up, out, size, BLOCK=1024, num_warps=4)
    return out


@triton.jit
def _attend_span(query, keys, values, end, state, size, d, SPAN: tl.constexpr, STAGES: tl.constexpr):
    """Online softmax over keys and values `[end, size]`: the new (largest score, sum of weights, weighted values)."""
    largest, total, mixed = state
    s = tl.arange(0, SPAN)
    for start in tl.range(0, end, SPAN, num_stages=STAGES):
        at = (start + s)[:, None] * size + d[None, :]
        mask = ((start + s) < end)[:, None] & (d < size)[None, :]
        k = tl.load(keys + at, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(values + at, mask=mask, other=0.0).to(tl.float32)
        score = tl.where(start + s < end, tl.sum(k * query[None, :], 1), -float("inf"))
        newest = tl.maximum(largest, tl.max(score, 0))
        decay = tl.exp2(largest - newest)
        weight = tl.exp2(score - newest)
        total = total * decay + tl.sum(weight, 0)
        mixed = mixed * decay + tl.sum(weight[:, None] * v, 0)
        largest = newest
    return largest, total, mixed


@triton.jit
def _rotated(at, cosine, sine, d, size):
    """A head of the token, turned by its position, in float32."""
    x = tl.load(at + d, mask=d < size, other=0.0).to(tl.float32)
    swapped = tl.load(at + (d + size // 2) % size, mask=d < size, other=0.0).to(tl.float32)
    return x * cosine + swapped * sine


@triton.jit
def _attend(
    qkv,
    cos,
    sin,
    step,
    prefix_keys,
    prefix_values,
    prefix_of_row,
    prefix_lengths,
    first_positions,
    keys,
    values,
    out,
    scale,
    heads,
    kv_heads,
    size,
    prefix_room,
    room,
    SIZE: tl.constexpr,
    SPAN: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    head = tl.program_id(0)
    kv_head = head // (heads // kv_heads)
    filled = tl.load(step)
    prefix = tl.load(prefix_of_row + row).to(tl.int64)
    position = tl.load(first_positions + prefix) + filled
    d = tl.arange(0, SIZE)
    inside = d < size
    cosine = tl.load(cos + position * size + d, mask=inside, other=0.0).to(tl.float32)
    sine = tl.load(sin + position * size + d, mask=inside, other=0.0).to(tl.float32)
    kind = keys.dtype.element_ty
    token = qkv + row * (heads + 2 * kv_heads) * size
    q = _rotated(token + head * size, cosine, sine, d, size)
    k = _rotated(token + (heads + kv_head) * size, cosine, sine, d, size).to(kind)
    v = tl.load(token + (heads + kv_heads + kv_head) * size + d, mask=inside, other=0.0).to(kind)
    own = (row * kv_heads + kv_head) * room * size
    if head % (heads // kv_heads) == 0:
        tl.store(keys + own + filled * size + d, k, mask=inside)
        tl.store(values + own + filled * size + d, v, mask=inside)
    # Scores in units of log 2, so that exp2 serves; the token itself begins the softmax.
    query = q.to(kind).to(tl.float32) * (scale * 1.4426950408889634)
    state = (tl.sum(query * k.to(tl.float32), 0), 1.0, v.to(tl.float32))
    shared = (prefix * kv_heads + kv_head) * prefix_room * size
    there = tl.load(prefix_lengths + prefix)
    state = _attend_span(query, prefix_keys + shared, prefix_values + shared, there, state, size, d, SPAN, 1)
    state = _attend_span(query, keys + own, values + own, filled, state, size, d, SPAN, STAGES)
    _, total, mixed = state
    tl.store(out + (row * heads + head) * size + d, (mixed / total).to(out.dtype.element_ty), mask=inside)


def attend(
    qkv: Tensor,
    rope: tuple[Tensor, Tensor],
    step: Tensor,
    prefix: tuple[Tensor, Tensor],
    prefix_of_row: Tensor,
    prefix_lengths: Tensor,
    first_positions: Tensor,
    cache: tuple[Tensor, Tensor],
    heads: int,
    scale: float,
    span: int | None = None,
) -> Tensor:
    """Rotate a new token a row, append its key and value to the cache, and attend to prefix, cache and itself.

    Args:
        qkv: `[R, (heads + 2 kv heads) D]`, query, key and value beside each other.
        rope: cosine and sine `[positions, D]`, the first half of the sine negated.
        step: `[1]`, tokens in the cache so far.
        prefix: keys and values `[U, kv heads, room, D]`, of which the first `prefix_lengths` `[U]` are there.
        prefix_of_row: `[R]`, the prefix of each row.
        first_positions: `[U]`, position of the first token after each prefix.
        cache: keys and values `[R, kv heads, room, D]`.
        scale: of the scores.
        span: positions read at a time; None takes what was fastest on an H200 (LOG.md).

    Returns `[R, heads * D]`.
    """
    keys, values = cache
    rows, kv_heads, room, size = keys.shape
    out = qkv.new_empty(rows, heads * size)
    # Few programs must each have many reads under way; many small ones fill the machine by their number.
    positions, warps, stages = (32, 2, 3) if rows * heads < 1024 else (16, 1, 2)
    kernel: Any = _attend
    kernel[(heads, rows)](
        qkv,
        *rope,
        step,
        *prefix,
        prefix_of_row,
        prefix_lengths,
        first_positions,
        keys,
        values,
        out,
        scale,
        heads,
        kv_heads,
        size,
        prefix[0].shape[2],
        room,
        SIZE=triton.next_power_of_2(size),
        SPAN=span or positions,
        STAGES=stages,
        num_warps=warps,
    )
    return out
