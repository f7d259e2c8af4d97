"""A product of few rows with a large weight, as fast as the weight can be read (Triton, CUDA alone).

A decode step multiplies 16 to 256 rows with every weight of the model, so its time is that of reading the weights.
cuBLAS comes within a fifth of it where the weight has many outputs. Where outputs are few and columns many, too few
programs read: here the columns are split as well, and what the split leaves to add up is done by the kernel that reads
the result next (`stage.policy.triton_decode.add_norm`). Measured on an H200: LOG.md.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_ROWS = 64  # with more, cuBLAS is as fast
PROGRAMS = 128  # that should read at once: about one for each multiprocessor of a large GPU
OUTPUTS, COLUMNS, STAGES = 64, 128, 5  # of a program, a tile and the pipeline


@triton.jit
def _linear_parts(
    x,
    weight,
    out,
    rows,
    outputs,
    columns,
    span,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    part = tl.program_id(1)
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    m, k = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    first = part * span
    last = tl.minimum(first + span, columns)
    x_at = x + m[:, None] * columns + k[None, :]
    weight_at = weight + n.to(tl.int64)[:, None] * columns + k[None, :]
    # The weight is the left operand, so that its rows fill the matrix unit and the few rows of x its narrow side.
    total = tl.zeros((OUTPUTS, ROWS), dtype=tl.float32)
    for start in tl.range(first, last, COLUMNS, num_stages=STAGES):
        if EVEN:
            a = tl.load(x_at + start, mask=m[:, None] < rows, other=0.0)
            w = tl.load(weight_at + start)
        else:
            seen = k[None, :] + start < last
            a = tl.load(x_at + start, mask=(m[:, None] < rows) & seen, other=0.0)
            w = tl.load(weight_at + start, mask=(n[:, None] < outputs) & seen, other=0.0)
        total = tl.dot(w, tl.trans(a), total)
    at = out + (part * rows + m[None, :]).to(tl.int64) * outputs + n[:, None]
    tl.store(at, total, mask=(m[None, :] < rows) & (n[:, None] < outputs))


def linear_parts(x: Tensor, weight: Tensor) -> Tensor:
    """Parts float32 `[split, M, N]` whose sum is x `[M, K]` times weight `[N, K]` transposed, for M up to MAX_ROWS."""
    rows, columns = x.shape
    outputs = len(weight)
    tiles = triton.cdiv(outputs, OUTPUTS)
    split = max(1, min(PROGRAMS // tiles, triton.cdiv(columns, COLUMNS)))
    span = triton.cdiv(triton.cdiv(columns, split), COLUMNS) * COLUMNS
    split = triton.cdiv(columns, span)
    out = x.new_empty(split, rows, outputs, dtype=torch.float32)
    kernel: Any = _linear_parts
    kernel[(tiles, split)](
        x,
        weight,
        out,
        rows,
        outputs,
        columns,
        span,
        EVEN=columns % COLUMNS == 0 and outputs % OUTPUTS == 0,
        ROWS=max(16, triton.next_power_of_2(rows)),
        OUTPUTS=OUTPUTS,
        COLUMNS=COLUMNS,
        STAGES=STAGES,
        num_warps=4,
        num_stages=STAGES,
    )
    return out
