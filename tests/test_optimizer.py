"""bfloat16 weights learn as float32 ones do, and a resumed optimizer is the saved one bit for bit."""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stage.optimizer import MasterAdamW, keeps_masters, state_bytes

NUMBERS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def steps(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], gradients: list[list[Tensor]]
) -> None:
    for row in gradients:
        for parameter, gradient in zip(parameters, row, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()


def example(count: int) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Start values that bfloat16 holds exactly, and `count` gradients of each, likewise."""
    shapes = ((5, 3), (7,))
    starts = [torch.randn(shape).bfloat16().float() for shape in shapes]
    return starts, [[torch.randn(shape).bfloat16().float() for shape in shapes] for _ in range(count)]


def test_masters_are_the_weights_of_float32_training() -> None:
    """torch's AdamW on float32 copies, a plain loop over the elements, and the rounded weights beside them."""
    starts, gradients = example(20)
    narrow, wide = (
        [nn.Parameter(x.to(t, copy=True)) for x in starts] for t in (torch.bfloat16, torch.float32)
    )
    optimizer = MasterAdamW(narrow, **NUMBERS)
    steps(optimizer, narrow, gradients)
    steps(torch.optim.AdamW(wide, foreach=False, **NUMBERS), wide, gradients)
    for index, (weight, expected) in enumerate(zip(narrow, wide, strict=True)):
        master = optimizer.state[weight]["master"]
        torch.testing.assert_close(master, expected.detach(), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(
            master.double(), by_hand(starts[index], [g[index] for g in gradients]), atol=2e-6, rtol=0
        )
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, master.bfloat16())


def by_hand(start: Tensor, gradients: list[Tensor]) -> Tensor:
    """AdamW in float64 (arXiv 1711.05101, algorithm 2, decay scaled by the learning rate)."""
    x, m, v = start.double(), torch.zeros_like(start).double(), torch.zeros_like(start).double()
    for t, g in enumerate(gradients, start=1):
        x = x - 1e-3 * 0.1 * x
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        x = x - 1e-3 * (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)).sqrt() + 1e-8)
    return x


def test_small_steps_add_up() -> None:
    """400 steps of 1e-6 from 0.02 end at 0.0196; in bfloat16 alone none of them is felt."""
    found = {}
    for make in (MasterAdamW, torch.optim.AdamW):
        weight = nn.Parameter(torch.full((4,), 0.02, dtype=torch.bfloat16))
        start = weight.detach().clone()
        optimizer = make([weight], lr=1e-6, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
        steps(optimizer, [weight], [[torch.ones(4)]] * 400)
        found[make] = float((start - weight.detach())[0])
    assert found[torch.optim.AdamW] == 0
    assert found[MasterAdamW] == pytest.approx(4e-4, abs=6.2e-5)  # half the spacing of bfloat16 at 0.02


def test_a_float32_weight_is_its_own_master() -> None:
    starts, gradients = example(3)
    weights = [nn.Parameter(x.clone()) for x in starts]
    optimizer = MasterAdamW(weights, **NUMBERS)
    steps(optimizer, weights, gradients)
    assert set(optimizer.state[weights[0]]) == {"step", "exp_avg", "exp_avg_sq"}
    torch.testing.assert_close(
        weights[0].double(), by_hand(starts[0], [g[0] for g in gradients]), atol=2e-6, rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_resumed_optimizer_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    starts, gradients = example(10)
    whole, first = ([nn.Parameter(x.to(dtype, copy=True)) for x in starts] for _ in range(2))
    steps(MasterAdamW(whole, **NUMBERS), whole, gradients)
    optimizer = MasterAdamW(first, **NUMBERS)
    steps(optimizer, first, gradients[:4])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second = [nn.Parameter(x.detach().clone()) for x in first]
    again = MasterAdamW(second, **(NUMBERS | {"lr": 9.0}))
    again.load_state_dict(torch.load(file, weights_only=True))
    assert all(value.dtype == torch.float32 for value in again.state[second[0]].values())
    steps(again, second, gradients[4:])
    for one, two in zip(whole, second, strict=True):
        assert torch.equal(one, two)


def test_a_parameter_without_gradient_stays() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = MasterAdamW([{"params": [used, unused]}], **NUMBERS)
    used.grad = torch.ones(2)
    optimizer.step()
    assert not torch.equal(used, torch.ones(2)) and torch.equal(unused, torch.ones(2))
    assert unused not in optimizer.state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": -1.0}, "lr must not be negative"),
        ({"eps": float("nan")}, "eps"),
        ({"betas": (0.9, 1.0)}, "betas"),
    ],
)
def test_numbers_that_no_adam_can_have(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MasterAdamW([nn.Parameter(torch.ones(1))], **(NUMBERS | change))


def test_what_an_optimizer_keeps() -> None:
    """Bytes a number: two moments of 4, and a master of 4 beside 2-byte weights; torch's moments are of 2 there."""
    ours, torchs = partial(MasterAdamW, **NUMBERS), partial(torch.optim.AdamW, **NUMBERS)
    assert (state_bytes(ours, torch.bfloat16), state_bytes(ours, torch.float32)) == (12, 8)
    assert (state_bytes(torchs, torch.bfloat16), state_bytes(torchs, torch.float32)) == (4, 8)
    assert state_bytes(partial(torch.optim.SGD, lr=0.1), torch.float32) == 0
    assert keeps_masters(ours) and not keeps_masters(torchs)
