"""What torchrun or SLURM tell a process about itself, asked before anything heavy is imported."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

PATIENCE = 10.0  # seconds in which the first process says what ends all, even on a busy machine
SECOND = 1.0  # seconds by which the others come after the first process
INTERACTIVE = ("bash", "interactive")  # names of SLURM jobs in which a person types the commands
# Only the first process writes; Hydra in the others makes neither folder nor log.
SILENT = ("hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none")


@dataclass(frozen=True)
class Started:
    """Process `rank` of `world`, one of `here` on each of `machines`; `by` is what started it, None if by hand."""

    rank: int
    world: int
    here: int
    machines: int
    by: str | None


def started(environment: Mapping[str, str] = os.environ) -> Started:
    """How this process was started. Raises ValueError for numbers that are none."""
    if "TORCHELASTIC_RUN_ID" in environment:
        names, by = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"), "torchrun"
    elif "SLURM_NTASKS" in environment and environment.get("SLURM_JOB_NAME") not in INTERACTIVE:
        names, by = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"), "SLURM"
    else:
        return Started(0, 1, 1, 1, None)
    values = [environment.get(name, "1" if number else "0") for number, name in enumerate(names)]
    if not all(value.isdecimal() for value in values):
        raise ValueError(
            f"{by} sets {', '.join(names)} to whole numbers, got {', '.join(map(repr, values))}; with SLURM state "
            "--ntasks-per-node as a number"
        )
    rank, world, here = map(int, values)
    return Started(rank, world, here, max(1, world // here), by)


def processes(what: str) -> int:
    """`here` or `machines`, for conf/strategy."""
    found = started()
    return {"here": found.here, "machines": found.machines}[what]


def arguments(given: Sequence[str]) -> list[str]:
    """The command line of this process: the one that was given, and silence in all but the first.

    Raises ValueError for a sweep in several processes.
    """
    found = started()
    if found.world > 1 and {"-m", "--multirun"} & set(given):
        raise ValueError(
            f"a sweep starts its jobs one after the other, got --multirun in {found.world} processes; start {found.by} "
            "once for each job"
        )
    return [*given, *(SILENT if found.rank else ())]


def check_strategy(name: str, devices: object) -> None:
    """Raise ValueError where strategy `name` and the processes that were started do not fit."""
    found = started()
    if name == "single" and found.world > 1:
        raise ValueError(
            f"strategy=single is for one process, {found.by} started {found.world}; set strategy=ddp or strategy=fsdp"
        )
    if name != "single" and devices != found.here:
        raise ValueError(
            f"strategy={name} runs one process a device, got trainer.devices={devices} and {found.here} processes; "
            f"start it with `torchrun --nproc-per-node {devices} train.py ...` and leave trainer.devices as it is"
        )


def leave(text: str, *, known_to_all: bool) -> NoReturn:
    """End with an error that is said once: by the first process, or by one of whose error the first does not know."""
    found = started()
    if found.rank == 0:
        sys.exit(text)
    if known_to_all:  # torchrun ends us as soon as the first process has said it and left
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(PATIENCE)  # a mistake of the command line is everybody's, and torchrun ends us meanwhile
    if known_to_all:
        sys.exit(1)
    sys.exit(f"process {found.rank} of {found.world}: {text}")


def reason_first(error: BaseException) -> None:
    """Before the traceback of one of several processes: the reason, once, and said by the first."""
    found = started()
    if found.world == 1 or getattr(error, "reason_said", False):
        return
    error.reason_said = True  # type: ignore[attr-defined]
    if found.rank:
        time.sleep(SECOND)
    else:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"error: {text}", file=sys.stderr, flush=True)
