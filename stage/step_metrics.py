"""Seconds, shares and memory of an update, who is told of its parts, and which of its metrics are a largest value."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stage.group_draws import Stopwatch
from stage.objective.metrics import is_maximum
from stage.ranks import Ranks
from stage.types import Metrics

ROLLOUT_PARTS = ("sample", "decode", "reference")
GATHERED = (
    "gather",
    "reference",
    "replay",
)  # parts in which processes with slices of the weights wait for one another


class ToldStopwatch(Stopwatch):
    """A stopwatch that tells the other processes which part of an update this one is in.

    Args:
        device: see `Stopwatch`.
        ranks: who is told.
        update: rollouts done.
        gathers: whether weights are gathered from other processes where they are read.
    """

    def __init__(self, device: torch.device, ranks: Ranks, update: int, *, gathers: bool) -> None:
        super().__init__(device)
        self.ranks, self.update, self.gathers = ranks, update, gathers

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        part = "the start" if name == "total" else name
        self.ranks.does(part, update=self.update + 1, waits=self.gathers and name in GATHERED)
        with super().__call__(name):
            yield


def time_metrics(seconds: Metrics, images: int, device: torch.device, *, replayed: bool) -> Metrics:
    """Seconds and shares of gather, rollout, reward and update; images a second; peak memory in bytes.

    The rollout is sample, decode, reference and, unless it was the forward of the update too, replay. Only sharded
    weights are gathered. `images` are those of all processes.
    """
    total = seconds["total"]
    rollout = sum(seconds[part] for part in (*ROLLOUT_PARTS, *(("replay",) if replayed else ())))
    shares = {"rollout": rollout, "reward": seconds["reward"]}
    shares |= {name: seconds[name] for name in ("gather",) if name in seconds}
    shares["update"] = total - sum(shares.values())
    metrics = {f"time/{name}": value for name, value in {**seconds, **shares}.items()}
    metrics |= {f"time/{name}_share": value / total for name, value in shares.items()}
    metrics["time/images_per_second"] = images / total
    metrics["time/peak_memory_bytes"] = float(peak_memory(device))
    return metrics


def is_largest(name: str) -> bool:
    """Whether the largest value of all processes is that of the run, and not their mean."""
    return is_maximum(name) or name == "time/peak_memory_bytes"


def peak_memory(device: torch.device) -> int:
    """Bytes: the most allocated on a CUDA device, elsewhere the largest resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024  # macOS counts bytes, Linux KiB
