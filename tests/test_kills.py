"""SIGKILL at random moments: no checkpoint is ever wrong, and the resumed run ends as the uninterrupted one, bit for bit."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback

from stage.checkpoints import Checkpoints
from stage.loggers import MetricsFile, read_metrics
from stage.training_checkpoint import read_training_checkpoint
from tests.killed_training import Job, checkpoints, complete, leftovers, pictures, rows, start
from tests.tiny_training import tiny_base, tiny_module, tiny_trainer, tiny_world

KILLS = 20
UPDATES = 8
TRIES = 20  # to hit a moment before the run is over, or a write before it is done
SEED = 1  # of the moments; what a process is doing then differs from machine to machine
SETTINGS = (
    "seed=4",
    "self_check=false",
    "callbacks.validation.every=3",
    "callbacks.images.every=4",
    "callbacks.images.count=1",
    "callbacks.images.samples=2",
)


class Copies(Callback):
    """Keeps the checkpoint of each update of a run that nobody kills, as the next update begins."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        last = trainer.checkpoint_callback.last
        if trainer.is_global_zero and last.exists():
            copy = shutil.copytree if last.is_dir() else shutil.copyfile
            copy(last, self.folder / f"after_{pl_module.update}.ckpt")


@dataclass(frozen=True)
class Whole:
    """A run that nobody killed: all it leaves, its state after each update, and when its rows came, seconds."""

    left: dict[str, Any]
    states: dict[int, dict[str, Any]]
    timeline: list[float]

    def moment(self, share: float) -> tuple[int, float]:
        """Rows before a moment at `share` of the run, and seconds after the last of them: on a busy machine a run is
        as far then as on this one.
        """
        seconds = share * self.timeline[-1]
        done = bisect(self.timeline, seconds)
        return done, seconds - (self.timeline[done - 1] if done else 0.0)


@dataclass(frozen=True)
class Left:
    """What a kill has left: the update of last.ckpt, that of the last row, 0 for none, and what has no name yet."""

    saved: int
    logged: int
    unfinished: list[str]


def everything(folder: Path) -> dict[str, Any]:
    """All that a run leaves, apart from times."""
    held = checkpoints(folder / "run" / "checkpoints")
    return {"rows": rows(folder), "pictures": pictures(folder), "unfinished": leftovers(folder), **held}


def uninterrupted(folder: Path, world: int, arguments: Sequence[str], updates: int) -> Whole:
    """Twice: the second time is timed, and must leave the same."""
    (folder / "copies").mkdir(parents=True)
    copies = ("+callbacks.copies._target_=tests.test_kills.Copies", f"+callbacks.copies.folder={folder}/copies")
    complete(folder / "first", world, [*arguments, "callbacks.checkpoints.every=1", *copies])
    timeline, left = complete(folder / "second", world, arguments), everything(folder / "second")
    assert left == everything(folder / "first") and not left["unfinished"]
    states = {state["update"]: state for state in checkpoints(folder / "copies").values()}
    states[updates] = left["last.ckpt"]
    assert sorted(states) == [*range(1, updates + 1)] and len(timeline) == updates + 2
    return Whole(left, states, timeline)


def reached(job: Job, moment: tuple[int, float]) -> Callable[[], bool]:
    """Whether a run has as many rows, and then that many seconds more."""
    since: list[float] = [] if moment[0] else [job.begun]

    def done() -> bool:
        if not since and job.logged >= moment[0]:
            since.append(time.monotonic())
        return bool(since) and time.monotonic() - since[0] >= moment[1]

    return done


def kill(job: Job, whole: Whole, moment: tuple[int, float], ranks: Sequence[int], *, writing: bool) -> Left | None:
    """Kill a run at a moment, or in the first write after it, and look at what is left; None if it ended before."""
    hit = job.wait(reached(job, moment)) and (not writing or job.wait(lambda: job.writing))
    if not hit or not job.kill(ranks):
        assert set(job.finish()) == {0}, job.said()
        return None
    found = checkpoints(job.folder / "run" / "checkpoints")
    for name, state in found.items():
        assert state == whole.states[state["update"]], f"{name} of update {state['update']} is wrong"
    logged = max((int(row["update"]) for row in rows(job.folder)), default=0)
    return Left(found["last.ckpt"]["update"] if found else 0, logged, leftovers(job.folder))


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_moments_ends_as_if_nobody_had(tmp_path: Path) -> None:
    """A run each: every fifth is killed in the first write of a checkpoint after its moment, every third once more."""
    arguments = [*tiny_world(tmp_path), *SETTINGS, f"updates={UPDATES}", "callbacks.checkpoints.every=1"]
    tiny_trainer(tmp_path).fit(tiny_module(tmp_path / "janus", updates=1))  # compiled once, and not in each process
    whole = uninterrupted(tmp_path, 1, arguments, UPDATES)
    draw, found = random.Random(SEED), []
    print(f"seed {SEED}, {whole.timeline[-1]:.1f} s uninterrupted")
    for number in range(KILLS):
        left, folder = None, tmp_path / str(number)
        writing = number % 5 == 0
        for _ in range(TRIES):
            moment = whole.moment((number + draw.random()) / KILLS)
            shutil.rmtree(folder, ignore_errors=True)
            left = kill(start(folder, 1, arguments), whole, moment, [0], writing=writing)
            if left is not None and (left.unfinished or not writing):
                break
        assert left is not None and left.logged - left.saved <= 1
        found.append(left)
        print(f"kill {number}: {moment[1]:.3f} s after row {moment[0]}, {left}")
        if number % 3 == 0:
            again = kill(start(folder, 1, arguments), whole, (0, draw.random()), [0], writing=False)
            print(f"        and again: {again}")
        complete(folder, 1, arguments)
        assert everything(folder) == whole.left
    assert sum(bool(left.unfinished) for left in found) >= KILLS / 5
    assert len({left.saved for left in found}) >= UPDATES / 2
