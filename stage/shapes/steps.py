"""A training loop that survives being killed: the shared skeleton of the pretraining stages."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch


class Stateful(Protocol):
    """Anything with PyTorch's two state methods."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict, /) -> object: ...


def resumable(
    name: str,
    folder: Path,
    steps: int,
    parts: Mapping[str, Stateful],
    generator: torch.Generator,
    step: Callable[[int], Mapping[str, torch.Tensor]],
    result: str,
    every: int = 250,
) -> None:
    """Calls `step(i)` for i up to `steps`, saving everything to `folder/name.pt` every `every` steps and at the end.

    Run again it continues where the last save was, with the generator's state, so that the result does not depend on
    interruptions. The last save holds the part named `result` alone. Prints the values that `step`
    returns, and the time left.
    """
    path = folder / f"{name}.pt"
    start = 0
    if path.exists():
        state = torch.load(path, map_location="cpu", weights_only=True)
        for key in [result] if state["step"] == steps else parts:
            parts[key].load_state_dict(state[key])
        start = state["step"]
        if start < steps:
            generator.set_state(state["generator"])
        print(f"{name}: {start} of {steps} steps done before", flush=True)
    begun = time.monotonic()
    for i in range(start, steps):
        values = step(i)
        if (i + 1) % every == 0 or i + 1 == steps:
            spent = time.monotonic() - begun
            left = spent / (i + 1 - start) * (steps - i - 1)
            shown = "  ".join(f"{key} {float(value):.4f}" for key, value in values.items())
            print(f"{name}: {i + 1}/{steps}  {shown}  {spent:.0f} s, {left:.0f} s left", flush=True)
            kept = [result] if i + 1 == steps else list(parts)
            state = {key: parts[key].state_dict() for key in kept}
            torch.save({**state, "generator": generator.get_state(), "step": i + 1}, f"{path}.part")
            os.replace(f"{path}.part", path)
