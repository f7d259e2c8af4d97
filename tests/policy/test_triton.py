"""The Triton kernels compute what plain torch computes: on CUDA, or in Triton's interpreter where there is none."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton", reason="Triton comes with torch's builds for CUDA; this torch has none")
CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined

from stage.policy import triton_decode, triton_draw, triton_linear  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
TYPES = (
    [torch.float32, torch.bfloat16] if CUDA else [torch.float32]
)  # numpy, the interpreter's base, has no bfloat16
EXACT: dict[torch.dtype, Any] = {
    torch.float32: dict(atol=1e-5, rtol=1e-5),
    torch.bfloat16: dict(atol=2e-2, rtol=2e-2),
}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    found = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return found.to(DEVICE, dtype)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.double()
    return (wide * (wide.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight.double()).to(x.dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("rows", "outputs", "columns"), [(16, 128, 512), (5, 48, 96), (33, 70, 300), (64, 64, 1000)]
)
def test_linear_parts(dtype: torch.dtype, rows: int, outputs: int, columns: int) -> None:
    """Also where rows, outputs and columns are no multiples of a tile."""
    x, weight = random(rows, columns, dtype=dtype), random(outputs, columns, dtype=dtype, seed=1)
    parts = triton_linear.linear_parts(x, weight)
    assert parts.dtype == torch.float32 and parts.shape[1:] == (rows, outputs)
    assert len(parts) > 1 or columns < 200
    wanted = x.double() @ weight.double().T
    error = (parts.double().sum(0) - wanted).norm() / wanted.norm()
    assert error < (1e-3 if CUDA else 1e-6)  # on CUDA a float32 product is one of tf32: 10 bits


@pytest.mark.parametrize("dtype", TYPES)
def test_silu_multiply(dtype: torch.dtype) -> None:
    both = random(5, 2 * 1030, dtype=dtype)
    gate, up = both.double().chunk(2, -1)
    torch.testing.assert_close(
        triton_decode.silu_multiply(both), (F.silu(gate) * up).to(dtype), **EXACT[dtype]
    )


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("split", [0, 1, 3])
def test_add_norm(dtype: torch.dtype, split: int) -> None:
    residual, weight = random(6, 72, dtype=dtype), random(72, dtype=dtype, seed=1)
    parts = None if split == 0 else random(split, 6, 72, seed=2)
    wanted = residual if parts is None else (residual.double() + parts.double().sum(0)).to(dtype)
    got = residual.clone()
    normed = triton_decode.add_norm(
        parts[0].to(dtype) if parts is not None and split == 1 else parts, got, weight, 1e-3
    )
    torch.testing.assert_close(got, wanted, **EXACT[dtype])
    torch.testing.assert_close(normed, norm(wanted, weight, 1e-3), **EXACT[dtype])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 16), (4, 2, 24)])
@pytest.mark.parametrize("filled", [0, 1, 37])
def test_attend(dtype: torch.dtype, heads: int, kv_heads: int, size: int, filled: int) -> None:
    """Rows of different prefixes, some longer than the span read at once, against a loop over rows and heads."""
    rows, prefixes, prefix_room, room = 5, 3, 24, 40
    of_row = torch.tensor([0, 0, 2, 1, 2], device=DEVICE)
    lengths, first = torch.tensor([24, 3, 17]), torch.tensor([24, 3, 20])
    qkv = random(rows, (heads + 2 * kv_heads) * size, dtype=dtype)
    shape = prefixes, kv_heads, prefix_room, size
    prefix = random(*shape, dtype=dtype, seed=1), random(*shape, dtype=dtype, seed=2)
    shape = rows, kv_heads, room, size
    cache = random(*shape, dtype=dtype, seed=3), random(*shape, dtype=dtype, seed=4)
    angle = torch.arange(80)[:, None] * torch.linspace(1.0, 0.01, size // 2).repeat(2)
    signs = torch.cat([-torch.ones(size // 2), torch.ones(size // 2)])
    cos, sin = angle.cos().to(DEVICE, dtype), (angle.sin() * signs).to(DEVICE, dtype)
    before = [part.clone() for part in cache]
    out = triton_decode.attend(
        qkv,
        (cos, sin),
        torch.tensor([filled], device=DEVICE),
        prefix,
        of_row,
        lengths.to(DEVICE),
        first.to(DEVICE),
        cache,
        heads,
        0.3,
        16,
    ).view(rows, heads, size)
    parts = qkv.double().view(rows, heads + 2 * kv_heads, size)
    for row in range(rows):
        which = int(of_row[row])
        position = int(first[which]) + filled
        turned = parts[row] * cos[position].double() + parts[row].roll(size // 2, -1) * sin[position].double()
        for head in range(heads):
            kv, many = head // (heads // kv_heads), int(lengths[which])
            key, value = turned[heads + kv], parts[row, heads + kv_heads + kv]
            keys = torch.cat(
                [prefix[0][which, kv, :many].double(), before[0][row, kv, :filled].double(), key[None]]
            )
            values = torch.cat(
                [prefix[1][which, kv, :many].double(), before[1][row, kv, :filled].double(), value[None]]
            )
            wanted = (keys @ turned[head] * 0.3).softmax(0) @ values
            torch.testing.assert_close(out[row, head].float(), wanted.float(), **EXACT[dtype])
            torch.testing.assert_close(cache[0][row, kv, filled].float(), key.float(), **EXACT[dtype])
            torch.testing.assert_close(cache[1][row, kv, filled].float(), value.float(), **EXACT[dtype])
    for part, former in zip(cache, before, strict=True):
        part[:, :, filled] = former[:, :, filled] = 0
        assert torch.equal(part, former)


def drawn(logits: Tensor, uniforms: Tensor, temperature: float, column: int = 0) -> tuple[Tensor, Tensor]:
    tokens = torch.full(uniforms.shape, -1, device=DEVICE)
    logps = torch.full(uniforms.shape, -1.0, device=DEVICE)
    step = torch.tensor([column], device=DEVICE)
    triton_draw.draw(logits, uniforms, step, temperature, tokens, logps)
    others = torch.arange(uniforms.shape[1], device=DEVICE) != column
    assert (tokens[:, others] == -1).all() and (logps[:, others] == -1).all()
    return tokens[:, column], logps[:, column]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("codes", [64, 1000])
def test_draw(temperature: float, codes: int) -> None:
    """The token is the first whose cumulative probability exceeds the uniform number, in float64."""
    logits = random(7, codes, scale=3.0)
    uniforms = torch.rand(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    tokens, logps = drawn(logits, uniforms, temperature, column=1)
    for row in range(7):
        if temperature == 0:
            assert int(tokens[row]) == int(logits[row].argmax()) and float(logps[row]) == 0
            continue
        chance = (logits[row].double() / temperature).softmax(0)
        wanted = int((chance.cumsum(0) <= uniforms[row, 1]).sum())
        assert int(tokens[row]) == wanted
        assert abs(float(logps[row]) - float(chance[wanted].log())) < 1e-5


def test_draw_by_hand() -> None:
    """Probabilities 0, 1/2, 1/4, 1/4, 0 end at 0, 0.5, 0.75, 1, 1; a token is the first whose end exceeds u."""
    logits = torch.tensor([0.0, 0.5, 0.25, 0.25, 0.0]).log().expand(6, 5).contiguous().to(DEVICE)
    draws = torch.tensor([[0.0], [0.4999], [0.5], [0.7499], [0.75], [1 - 2**-53]], dtype=torch.float64)
    assert drawn(logits, draws.to(DEVICE), 1.0)[0].tolist() == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_logits_show(temperature: float, value: float) -> None:
    logits = random(2, 40)
    logits[1, 7] = value
    uniforms: Any = torch.full((2, 1), 0.5, dtype=torch.float64, device=DEVICE)
    _, logps = drawn(logits, uniforms, temperature)
    assert logps[0].isfinite() and logps[1].isnan()
