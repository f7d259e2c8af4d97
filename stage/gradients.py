"""Norm and clipping of gradients, whole or sliced over processes, and no number that is none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


@torch.no_grad()  # where a graph might be wanted, a DTensor gives its slice through autograd, which takes its time
def gradient_norm(gradients: Sequence[Tensor], total: Callable[[Tensor], Tensor]) -> Tensor:
    """The 2-norm of all gradients together, 0-d.

    `total` sums a number over the processes, each of which has a slice of every gradient that is a DTensor.
    """
    if not any(isinstance(gradient, DTensor) for gradient in gradients):
        return torch.nn.utils.get_total_norm(gradients)
    squares = torch.nn.utils.get_total_norm([local(gradient) for gradient in gradients]).double().square()
    return total(squares).sqrt()


@torch.no_grad()
def clip(gradients: Sequence[Tensor], norm: Tensor, limit: float) -> None:
    """Scale gradients of norm `norm` in place, so that it is at most `limit` (torch.nn.utils.clip_grads_with_norm_)."""
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    slices: dict[torch.device, list[Tensor]] = {}
    for gradient in map(local, gradients):
        slices.setdefault(gradient.device, []).append(gradient)
    for device, mine in slices.items():
        torch._foreach_mul_(mine, factor.to(device))


def local(tensor: Any) -> Tensor:
    """This process's slice, or all of a tensor that is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def check_finite(value: float, name: str, update: int) -> None:
    """Raise ValueError for NaN or infinity, before it reaches the weights."""
    if not math.isfinite(value):
        raise ValueError(
            f"the {name} must be finite; it is {value} in update {update + 1}. Resume from the last "
            "checkpoint with trainer.precision=32-true, or start again with a lower optimizer.lr."
        )
