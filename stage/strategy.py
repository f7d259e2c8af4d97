"""How a run is spread over processes: conf/strategy/*.yaml.

`single` is Lightning's own for one process. `ddp` gives every process all weights and averages gradients.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import lightning
import torch
import transformers
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy
from torch import nn

from stage.policy.drawing import reasons
from stage.ranks import ALONE, Ranks, connect, divide

IDLE = ("model.model.vision_model.", "model.model.aligner.", "model.model.vqmodel.")
OF_THE_FIRST = (
    "output",
    "trainer",
    "logger",
    "callbacks",
)  # settings with folders, which the first process has alone


class Replicated(DDPStrategy):
    """Every process has all weights; gradients are averaged while the backward pass runs (conf/strategy/ddp.yaml).

    Args:
        timeout_seconds: how long a process waits for another before all of them end.
    """

    def __init__(self, *, timeout_seconds: float) -> None:
        # Buffers are frozen, so alike everywhere.
        super().__init__(
            broadcast_buffers=False, gradient_as_bucket_view=True, timeout=limit(timeout_seconds)
        )
        self.timeout_seconds = timeout_seconds

    def configure_ddp(self) -> None:
        # To look for parameters without a gradient takes time, and a warning where there are none.
        module: Any = self.lightning_module
        self._ddp_kwargs["find_unused_parameters"] = idle(module.policy, reasons(module.sampler))
        super().configure_ddp()


def idle(policy: nn.Module, planning: bool) -> bool:
    """Whether something is trained that the loss does not depend on: what reads or decodes images, or a text head."""
    parts = IDLE if planning else (*IDLE, "model.lm_head.")
    return any(p.requires_grad and name.startswith(parts) for name, p in policy.named_parameters())


def limit(seconds: float) -> timedelta:
    """A time limit. Raises ValueError for none."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
        raise ValueError(f"strategy.timeout_seconds must be a positive number of seconds; got {seconds!r}")
    return timedelta(seconds=seconds)


def connected(strategy: Any, prompts: int, group_size: int, config: Mapping[str, Any]) -> Ranks:
    """The processes of a run, each with its part of `prompts` x `group_size` samples.

    Raises ValueError, on all processes, where samples cannot be dealt out or processes are not alike.
    """
    if not isinstance(strategy, ParallelStrategy) or strategy.world_size == 1:
        return ALONE
    rank, world = strategy.global_rank, strategy.world_size
    span = divide(rank, world, prompts, group_size).span
    ranks = connect(rank, world, span, timedelta(seconds=getattr(strategy, "timeout_seconds", 1800)))
    ranks.agree(versions() | {"configuration": {k: v for k, v in config.items() if k not in OF_THE_FIRST}})
    return ranks


def versions() -> dict[str, str]:
    """What must be alike in all processes."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "transformers": transformers.__version__,
    }
