"""The share of the work that one of several processes does: RANK and WORLD_SIZE of torchrun, or a Lightning strategy.

The processes talk to each other through the disk alone. Each draws and scores the images of its own prompts, the first
waits until all verdicts are there and adds them up.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from stage.benchmarks.images import Planned
from stage.types import Prompt

PAUSE = 0.5  # seconds between two looks at the disk


@dataclass(frozen=True)
class Share:
    """Process `rank` of `processes`; prompt n of a list belongs to process n mod `processes`."""

    rank: int
    processes: int

    def __post_init__(self) -> None:
        if self.processes < 1 or not 0 <= self.rank < self.processes:
            raise ValueError(
                f"a process has a rank from 0 to WORLD_SIZE - 1, got RANK={self.rank} and "
                f"WORLD_SIZE={self.processes}; start the program with torchrun, or without both"
            )

    @property
    def first(self) -> bool:
        """Whether this process scores and reports."""
        return self.rank == 0

    def of(self, items: Sequence[Planned]) -> tuple[Planned, ...]:
        """The images that this process draws."""
        return tuple(item for item in items if item.index % self.processes == self.rank)

    def of_prompts(self, prompts: Sequence[Prompt]) -> list[int]:
        """The lines of a prompt list whose images this process scores: those that it draws."""
        return [index for index in range(len(prompts)) if index % self.processes == self.rank]

    def wait(self, missing: Callable[[], int], patience_seconds: float, what: str = "images") -> None:
        """Return when nothing is missing.

        Raises:
            TimeoutError: none appeared for `patience_seconds`.
        """
        left, since = missing(), time.monotonic()
        while left:
            time.sleep(PAUSE)
            now = missing()
            if now < left:
                left, since = now, time.monotonic()
            elif time.monotonic() - since > patience_seconds:
                raise TimeoutError(
                    f"{left} {what} are missing and none appeared for {patience_seconds:g} s: another of the "
                    f"{self.processes} processes has stopped. Give the same command again, with any number of "
                    "processes; finished images are kept."
                )


WHOLE = Share(0, 1)


def join(processes: int, device: str, environment: Mapping[str, str] = os.environ) -> Share:
    """The share of this process; starts the others first where `processes` asks Lightning for them.

    Args:
        processes: of this machine; 1 starts none, and torchrun's count where it started this one.
        device: `cpu`, or where each process has a GPU of its own.

    Raises:
        ValueError: less than one process, or several where torchrun has started them already.
    """
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}; 1 draws and scores here alone")
    if processes == 1:
        return share_of(environment)
    if "RANK" in environment:
        raise ValueError(
            f"torchrun has started the processes already, and processes={processes} asks for more; leave one of the two"
        )
    from lightning.fabric import Fabric  # not for those who ask for help

    fabric = Fabric(accelerator="cpu" if device == "cpu" else "auto", devices=processes, strategy="ddp")
    fabric.launch()
    return Share(fabric.global_rank, fabric.world_size)


def share_of(environment: Mapping[str, str] = os.environ) -> Share:
    """The share of this process; all of the work where torchrun did not start it."""
    rank, processes = environment.get("RANK", "0"), environment.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and processes.isdecimal()):
        raise ValueError(
            f"RANK and WORLD_SIZE are whole numbers, got {rank!r} and {processes!r}; start the program with torchrun"
        )
    return Share(int(rank), int(processes))


def local_device(name: str, environment: Mapping[str, str] = os.environ) -> str:
    """`cuda:N` for `auto` or `cuda` on process N of this machine, where several run and have a GPU each.

    That GPU is also what a scorer on `cuda` then runs on.
    """
    import torch

    local = environment.get("LOCAL_RANK")
    if local is None or name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    index = int(local) % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return f"cuda:{index}"
