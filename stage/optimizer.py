"""AdamW for weights that are stored in bfloat16.

A bfloat16 number has 8 bits of mantissa: next to 0.02 its neighbours are 1.2e-4 apart, and a step of 1e-6, which is
what Adam takes at that learning rate, is rounded away, every time. So the numbers that are optimised are float32
masters, kept in the state of the optimizer, and the weights of the model are those, rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

PROBE = 64  # side of the weights on which an optimizer shows how much it keeps


class MasterAdamW(torch.optim.Optimizer):
    """AdamW whose masters, moments and arithmetic are float32, whatever the type of the parameters.

    A parameter of 2 bytes takes 12 more here (master and two moments), a float32 one is its own master and takes 8.
    The update is torch's fused AdamW, a parameter at a time, so that no more than one gradient is in float32.

    Args:
        params: parameters, or groups of them.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW.

    Raises ValueError for numbers that AdamW cannot use.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        numbers = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
        for name, value in numbers.items():
            if not value >= 0:
                raise ValueError(f"optimizer.{name} must not be negative; got {value}. Set 0 or more.")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                f"optimizer.betas must lie in [0, 1); got {tuple(betas)}. The usual are 0.9, 0.999."
            )
        super().__init__(params, {**numbers, "betas": tuple(betas)})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: nn.Parameter, gradient: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(_first_state(parameter))
        master = state.get("master", parameter)
        first, second = group["betas"]
        adamw(
            [master],
            [gradient.to(master.dtype)],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            beta1=first,
            beta2=second,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        if master is not parameter:
            parameter.copy_(master)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state bit for bit: torch alone would round it to the type of the parameters."""
        super().load_state_dict(state_dict)
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                self.state[parameter][name] = value.to(parameter.device, copy=True)


def _first_state(parameter: nn.Parameter) -> dict[str, Tensor]:
    """Zero moments, and a float32 copy of a parameter that is narrower."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    state = {
        "step": torch.zeros((), device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, dtype=dtype),
        "exp_avg_sq": torch.zeros_like(parameter, dtype=dtype),
    }
    return state if dtype == parameter.dtype else {**state, "master": parameter.detach().to(dtype, copy=True)}


def state_bytes(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], dtype: torch.dtype) -> float:
    """Bytes that an optimizer keeps for each number of this type, found by one step on a small weight."""
    probe = nn.Parameter(torch.ones(PROBE, PROBE, dtype=dtype))
    probe.grad = torch.ones_like(probe)
    optimizer = make([probe])
    optimizer.step()
    kept = [
        value for value in optimizer.state[probe].values() if isinstance(value, Tensor) and value.ndim > 0
    ]
    return sum(value.nbytes for value in kept) / probe.numel()


def keeps_masters(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> bool:
    """Whether many steps, each far below the spacing of bfloat16, add up: a hundred of 2^-12 beside 1."""
    probe = nn.Parameter(torch.ones(PROBE, PROBE, dtype=torch.bfloat16))
    optimizer = make([probe])
    for group in optimizer.param_groups:
        group["lr"] = 2.0**-12
    for _ in range(100):
        probe.grad = torch.ones_like(probe)
        optimizer.step()
    return bool((probe != 1).any())


def made(name: str, factory: Callable[[Any], Any], target: Any) -> Any:
    """`factory(target)`, where a word in place of a number is a ValueError that names the settings of `name`."""
    try:
        return factory(target)
    except TypeError as error:
        settings = getattr(factory, "keywords", {})
        words = [f"{name}.{key}={value!r}" for key, value in settings.items() if isinstance(value, str)]
        raise ValueError(
            f"{name} must take its settings, and does not: {error}; words among them: {', '.join(words) or 'none'}"
        ) from error


def check_settings(optimizer: Callable[[Any], Any], scheduler: Callable[[Any], Any]) -> None:
    """Raise ValueError where these cannot be made; tried on one small weight, before a model is read."""
    made("scheduler", scheduler, made("optimizer", optimizer, [nn.Parameter(torch.ones(PROBE, PROBE))]))
