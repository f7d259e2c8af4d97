"""One of two processes hangs, dies, fails or learns NaN: the others end in the stated time, with the reason first."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from stage import processes
from stage.checkpoints import Checkpoints
from stage.data import PromptStream
from stage.heartbeat import Clock, Judge, State
from stage.launch import mistakes_in_one_line, quiet_libraries
from stage.training_checkpoint import read_training_checkpoint
from stage.types import Prompt, Scores
from tests.processes import start
from tests.tiny_training import PROMPTS, Redness, objective, tiny_base, tiny_module, tiny_trainer

PATIENCE = 4.0  # trainer.strategy.timeout_seconds of these runs
STATED = 10.0  # seconds within which all have ended after that, or at once where nobody hangs
DDP = {"_target_": "stage.strategy.Replicated", "timeout_seconds": PATIENCE}
FSDP = {
    "_target_": "stage.strategy.Sharded",
    "checkpoint": "sharded",
    "timeout_seconds": PATIENCE,
    "cpu_offload": False,
    "rollout": "copy",
}
REWARD = State(exchanges=4, steps=2, part="reward", update=3)
WAITING = State(exchanges=5, part="reward", update=3, waits=True)
LEARNING = State(exchanges=5, steps=3, part="learning", update=3, waits=True)


def heard(*words: tuple[float, int, State]) -> Judge:
    """A judge of two processes with a patience of 10 s that has heard (time, process, state), in order."""
    judge = Judge(2, 10.0)
    for now, rank, state in words:
        judge.hear(rank, state, "scorer.py:7", now)
    return judge


def test_who_is_behind_hangs() -> None:
    """The other waits from second 3 on, so that patience ends with second 13, whatever went before."""
    judge = heard((1, 0, REWARD), (2, 1, REWARD), (3, 0, WAITING), (12, 0, WAITING), (12, 1, REWARD))
    assert judge.verdict(13.0) is None
    text = judge.verdict(13.1)
    assert text is not None
    assert text.startswith(
        "process 1 of 2 hangs for 10 s in reward of update 3 (scorer.py:7); the others wait."
    )


def test_who_says_nothing_is_named_so() -> None:
    judge = heard((1, 1, REWARD), (1, 0, WAITING), (14, 0, WAITING))
    assert "of update 3 (scorer.py:7), and says nothing any more; the others" in str(judge.verdict(14.0))
    together = heard((1, 1, LEARNING), (1, 0, LEARNING), (14, 0, LEARNING))
    assert str(together.verdict(14.0)).startswith("process 1 of 2 hangs")


def test_nobody_hangs_while_nobody_waits() -> None:
    """Both score for an hour."""
    assert heard((1, 0, REWARD), (1, 1, REWARD)).verdict(3600.0) is None


def test_all_hang_in_what_they_do_together() -> None:
    judge = heard((1, 0, LEARNING), (2, 1, LEARNING), (12, 0, LEARNING), (12, 1, LEARNING))
    assert judge.verdict(12.0) is None
    assert str(judge.verdict(12.5)).startswith(
        "none of 2 processes has moved for 10 s, in learning of update 3"
    )


def test_who_moves_does_not_hang() -> None:
    judge = heard((1, 0, WAITING), (1, 1, REWARD))
    for now in range(2, 60):
        judge.hear(1, State(exchanges=4, steps=now, part="learning", update=3, waits=True), "", float(now))
        assert judge.verdict(now + 5.0) is None


def test_a_clock_does_not_count_what_was_suspended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of 1 s, then an hour in which the machine slept, counted as 2 s."""
    times = iter([100.0, 101.0, 102.0, 3702.0, 3703.0])
    monkeypatch.setattr("stage.heartbeat.time.monotonic", lambda: next(times))
    clock = Clock(2.0)
    assert [clock.tick() for _ in range(4)] == [1.0, 2.0, 4.0, 5.0]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("janus"))


class Trouble(Redness):
    """In the third update of process `of`: `sleep` without end, `stop` or `kill` the process; `file` says when."""

    def __init__(self, how: str, of: int, file: Path) -> None:
        super().__init__()
        self.file = file
        self.how, self.of, self.calls = how, of, 0

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        self.calls += 1
        if self.calls == 3 and os.environ["RANK"] == str(self.of):
            self.file.touch()
            if self.how == "sleep":
                time.sleep(10_000)
            elif self.how in ("stop", "kill"):
                time.sleep(0.5)  # in which it says where it is
                os.kill(os.getpid(), signal.SIGSTOP if self.how == "stop" else signal.SIGKILL)
        return super().__call__(images, prompts)


class Spoilt:
    """An objective whose loss, in the third update of process `of`, raises, or has no number or no gradient."""

    def __init__(self, inner: Any, how: str, of: int) -> None:
        self.inner, self.how, self.of, self.calls = inner, how, of, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def loss(self, scores: Any, credit: Any) -> Any:
        loss, metrics = self.inner.loss(scores, credit)
        self.calls += 1
        if self.calls == 3 and os.environ["RANK"] == str(self.of):
            if self.how == "raise":
                raise RuntimeError("out of memory")
            if self.how == "hang":
                time.sleep(10_000)
            if self.how == "nan loss":
                return loss * float("nan"), metrics
            if self.how == "nan gradient":
                return loss + 0 * (loss - loss.detach()).sqrt(), metrics  # 0 * sqrt'(0) is NaN
        return loss, metrics


def train(how: str, of: int, base: Path, folder: Path, strategy: dict[str, Any]) -> None:
    """A run whose words go to files by process, and end as train.py ends them."""
    rank = os.environ["RANK"]
    with (folder / f"{rank}.err").open("wb") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    quiet_libraries()
    module = tiny_module(
        base,
        scorer=Trouble(how, of, folder / "begun"),
        objective=Spoilt(objective(), how, of),
        prompts=PromptStream(PROMPTS[:4], prompts_per_update=2, seed=0),
        updates=5,
    )
    keep = Checkpoints(
        folder=str(folder / "checkpoints"), every=100, keep=1, beside_training=False, monitor="reward/mean"
    )
    trainer = tiny_trainer(folder, [keep], [], strategy=strategy, devices=2)
    try:
        with mistakes_in_one_line():
            trainer.fit(module)
    except SystemExit as end:  # as Python itself does, which is not how a forked process ends
        print(end.code if isinstance(end.code, str) else "", file=sys.stderr, flush=True)
        os._exit(1)


CASES = [
    ("sleep", 1, DDP, "process 1 of 2 hangs for 4 s in reward of update 3 (test_heartbeat.py:"),
    ("stop", 1, FSDP, "process 1 of 2 hangs for 4 s in reward of update 3 (test_heartbeat.py:"),
    ("stop", 0, DDP, "process 0 of 2 says nothing any more for 4 s"),
    ("hang", 1, FSDP, "none of 2 processes has moved for 4 s, in learning of update 3: 0 in "),
    ("kill", 1, FSDP, "process 1 of 2 has died in reward of update 3; look at what it said last"),
    ("kill", 0, DDP, "process 0 of 2 has died; look"),
    ("raise", 1, FSDP, "process 1 of 2 failed: RuntimeError: out of memory"),
    ("nan loss", 1, DDP, "process 1 of 2 failed: ValueError: the loss must be finite; it is nan in update 3"),
    ("nan gradient", 1, FSDP, "the gradient norm must be finite; it is nan in update 3"),
]
QUICK = ("sleep 1",)


@pytest.mark.parametrize(
    ("how", "of", "strategy", "reason"),
    [
        pytest.param(*case, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for case in CASES
        for name in [f"{case[0]} {case[1]}"]
    ],
)
def test_all_end_with_the_reason_first(
    base: Path, tmp_path: Path, how: str, of: int, strategy: dict[str, Any], reason: str
) -> None:
    found = start(2, tmp_path, train, how, of, base, tmp_path, strategy)
    stopped = found[of] if how == "stop" else None
    living = [process for process in found if process is not stopped]
    for process in living:
        process.join(60)
    seconds = time.time() - (tmp_path / "begun").stat().st_mtime
    codes = [process.exitcode for process in living]
    for process in found:
        process.kill()
        process.join()
    said = {rank: (tmp_path / f"{rank}.err").read_text() for rank in (0, 1)}
    assert None not in codes and 0 not in codes, (codes, said)
    first, other = (said[0], said[1]) if of else (said[1], said[0])
    if how == "hang":
        assert ", 1 in test_heartbeat.py:" in first, said
    errors = [line for line in first.splitlines() if "Error" in line or line.startswith("error: ")]
    assert errors and errors[0].startswith(f"error: {reason}"), said
    assert "error: " not in other, said
    # Without torchrun nobody ends the others of an error that all know of: they wait for the first one's words.
    more = (
        processes.PATIENCE if how.startswith("nan") else PATIENCE if how in ("sleep", "stop", "hang") else 0
    )
    assert seconds < STATED + more
    if how.startswith("nan"):
        assert read_training_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["update"] == 2
