"""SIGKILL at random moments: no checkpoint is ever wrong, and a resumed run ends as one that nobody killed, by bits."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hydra.utils import instantiate
from lightning.pytorch import Callback
from omegaconf import OmegaConf

from stage import processes
from stage.checkpoint_folder import GONE
from stage.checkpoints import Checkpoints
from stage.loggers import MetricsFile, read_metrics
from stage.training_checkpoint import read_training_checkpoint
from tests.killed_training import Job, checkpoints, complete, everything, leftovers, rows, start
from tests.tiny_training import ROOT, tiny_base, tiny_module, tiny_trainer, tiny_world

KILLS = 20
TRIES = 20  # to hit a moment before the run is over
SLOW = 0.05  # seconds that a disk takes for a file while a write is to be hit
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

    def __str__(self) -> str:
        return f"{self.timeline[-1]:.1f} s uninterrupted, {self.timeline[0]:.1f} s to the first row"

    def moment(self, share: float) -> tuple[int, float]:
        """Rows before a moment, and seconds after the last of them: on a busy machine a run is as far then as on this.

        The first fifth of the shares is the time to the first row, whatever a start takes. What follows the last row,
        when runs end by themselves, counts half.
        """
        first, end = self.timeline[0], sum(self.timeline[-2:]) / 2
        seconds = 5 * share * first if share < 0.2 else first + (share - 0.2) / 0.8 * (end - first)
        done = bisect(self.timeline, seconds)
        return done, seconds - (self.timeline[done - 1] if done else 0.0)


class Kind(NamedTuple):
    """Who is killed, and whether while a checkpoint is written."""

    ranks: tuple[int, ...]
    writing: bool = False


@dataclass(frozen=True)
class Left:
    """What a kill has left: the update of last.ckpt, that of the last row, 0 for none, and what has no name yet."""

    saved: int
    logged: int
    unfinished: list[str]


def uninterrupted(folder: Path, world: int, arguments: Sequence[str], updates: int) -> Whole:
    """Twice: the second time is timed, and must leave the same."""
    (folder / "copies").mkdir(parents=True)
    copies = (
        "+callbacks.copies._target_=tests.test_kills.Copies",
        f"+callbacks.copies.folder={folder}/copies",
    )
    complete(folder / "first", world, [*arguments, "callbacks.checkpoints.every=1", *copies])
    timeline, left = complete(folder / "second", world, arguments), everything(folder / "second")
    assert left == everything(folder / "first") and not left["unfinished"]
    states = {state["update"]: state for state in checkpoints(folder / "copies").values()}
    states[updates] = left["last.ckpt"]
    assert sorted(states) == [*range(1, updates + 1)] and len(timeline) == updates + 2
    return Whole(left, states, timeline)


def warm(folder: Path) -> None:
    """One update, so that the processes, which are forked, find everything imported and compiled."""
    tiny_trainer(folder).fit(tiny_module(folder / "janus", updates=1))


def between(draw: random.Random, low: float, high: float) -> Iterator[float]:
    """Random numbers."""
    while True:
        yield draw.uniform(low, high)


def reached(job: Job, moment: tuple[int, float]) -> Callable[[], bool]:
    """Whether a run has as many rows, and then that many seconds more."""
    since: list[float] = [] if moment[0] else [job.begun]

    def done() -> bool:
        if not since and job.logged >= moment[0]:
            since.append(time.monotonic())
        return bool(since) and time.monotonic() - since[0] >= moment[1]

    return done


def kill(
    job: Job, whole: Whole, moment: tuple[int, float], ranks: Sequence[int], *, writing: bool
) -> Left | None:
    """Kill a run at a moment, or in the first write after it, and look at what is left; None if it ended before."""
    due = job.wait(reached(job, moment)) and (not writing or job.wait(lambda: job.writing))
    if not due or not job.kill(ranks):
        assert set(job.finish()) == {0}, job.said()
        return None
    found = checkpoints(job.folder / "run" / "checkpoints")
    for name, state in found.items():
        assert state == whole.states[state["update"]], f"{name} of update {state['update']} is wrong"
    logged = max((int(row["update"]) for row in rows(job.folder)), default=0)
    return Left(found["last.ckpt"]["update"] if found else 0, logged, leftovers(job.folder))


def ended(folder: Path, whole: Whole, left: Left) -> dict[str, Any]:
    """All that a run leaves, but for what it was about to remove when it was killed after its last checkpoint.

    Such a run is done and does not start again; what it holds under other names is whole, as `kill` has seen.
    """
    found = everything(folder)
    if left.saved < max(whole.states):
        return found
    spare = found.keys() - whole.left.keys()
    assert all(name.startswith("update_") for name in spare), spare
    assert all(name.endswith(GONE) for name in found["unfinished"]), found["unfinished"]
    return {name: found[name] for name in whole.left} | {"unfinished": []}


def hit(
    folder: Path, world: int, arguments: Sequence[str], whole: Whole, shares: Iterator[float], kind: Kind
) -> Left:
    """A run in an empty folder, killed at the moment of a share, and at others where nothing was hit."""
    for _ in range(TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        moment = whole.moment(next(shares))
        job = start(folder, world, arguments, disk=SLOW if kind.writing else 0.0)
        left = kill(job, whole, moment, kind.ranks, writing=kind.writing)
        if left is not None and (left.unfinished or not kind.writing):
            print(f"{folder.name}: {moment[1]:.3f} s after row {moment[0]}, {kind}: {left}")
            return left
    raise AssertionError(f"nothing was hit in {TRIES} tries of {kind}")


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_moments_ends_as_if_nobody_had(tmp_path: Path) -> None:
    """A run each: every fifth is killed in the first write of a checkpoint after its moment, every fourth once more."""
    updates = 6
    arguments = [*tiny_world(tmp_path), *SETTINGS, f"updates={updates}", "callbacks.checkpoints.every=1"]
    warm(tmp_path)
    whole = uninterrupted(tmp_path, 1, arguments, updates)
    draw = random.Random(SEED)
    print(f"seed {SEED}, {whole}")
    found = []
    for number in range(KILLS):
        folder, kind = tmp_path / str(number), Kind((0,), number % 5 == 0)
        left = hit(folder, 1, arguments, whole, between(draw, number / KILLS, (number + 1) / KILLS), kind)
        assert left.logged - left.saved <= 1
        found.append(left)
        if number % 4 == 1 and left.saved < updates:  # a run that is done does not start again
            moment = 0, 1.5 * whole.timeline[0] * draw.random()
            again = kill(start(folder, 1, arguments), whole, moment, (0,), writing=False)
            print(f"   and again {moment[1]:.3f} s after its start: {again}")
            left = again or left
        complete(folder, 1, arguments)
        assert ended(folder, whole, left) == whole.left
    assert sum(bool(left.unfinished) for left in found) >= KILLS / 5
    assert len({left.saved for left in found}) >= updates / 2


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_processes_of_which_some_are_killed_go_on_as_if_nobody_had(
    tmp_path: Path, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two, the first in a write, and both; who is left has to see it and leave."""
    monkeypatch.setattr(processes, "PATIENCE", 1.0)  # the first process will not speak
    updates, every = 6, 2
    arguments = [*tiny_world(tmp_path), *SETTINGS, f"strategy={strategy}", "trainer.accelerator=cpu"]
    arguments += [f"updates={updates}", f"callbacks.checkpoints.every={every}"]
    warm(tmp_path)
    whole = uninterrupted(tmp_path, 2, arguments, updates)
    draw = random.Random(SEED)
    print(f"seed {SEED}, {whole}")
    for number, kind in enumerate((Kind((1,)), Kind((0,), True), Kind((0, 1)))):
        folder = tmp_path / str(number)
        low, high = (0.2 + 0.8 * third / 3 for third in (number, number + 1))  # once training has begun
        left = hit(folder, 2, arguments, whole, between(draw, low, high), kind)
        assert left.logged - left.saved <= every
        complete(folder, 2, arguments)
        assert ended(folder, whole, left) == whole.left


class KillsAfterSave(Checkpoints):
    """Kills its process as soon as the checkpoint of update 2 is whole."""

    def save(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        super().save(trainer, pl_module, *args, **kwargs)
        if pl_module.update == 2:
            os.kill(os.getpid(), signal.SIGKILL)


def test_the_row_of_an_update_that_is_saved_is_there(tmp_path: Path) -> None:
    """Nothing would write it any more: the run goes on with the update after it."""
    base = tiny_base(tmp_path / "janus")
    known: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "callbacks" / "default.yaml"))

    def fit(kind: str, resume: Path | None = None) -> None:
        settings = {"_target_": kind, "folder": str(tmp_path / "checkpoints"), "every": 1}
        trainer = tiny_trainer(
            tmp_path, [instantiate({**known["checkpoints"], **settings})], [MetricsFile(tmp_path)]
        )
        trainer.fit(tiny_module(base), ckpt_path=resume, weights_only=True)

    process = multiprocessing.get_context("fork").Process(
        target=fit, args=("tests.test_kills.KillsAfterSave",)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert read_training_checkpoint(last)["update"] == 2
    assert [row["update"] for row in read_metrics(tmp_path / "metrics.csv")] == ["1", "2"]
    fit("stage.checkpoints.Checkpoints", last)
    assert [row["update"] for row in read_metrics(tmp_path / "metrics.csv")] == ["1", "2", "3"]
