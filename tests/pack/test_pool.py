"""A pool on programs that stand in for the real ones: failures, kills, the end of the time, and doing it again."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from stage.pack.plan import PackedRun, read_record
from stage.pack.pool import CONSOLE, Outcome, Pool, last_line
from tests.pack.programs import write_programs

UPDATES = 6


def runs_of(root: Path, *behave: str) -> list[PackedRun]:
    return [
        PackedRun(f"{number}-{how}", 1, root / f"{number}-{how}" / "seed_1", UPDATES, (f"behave={how}",), ())
        for number, how in enumerate(behave)
    ]


def pool(root: Path, runs: list[PackedRun], said: list[str] | None = None, **changes: Any) -> Pool:
    settings: dict[str, Any] = {"processes": 2, "threads": 1, "say_every": 60}
    settings |= {"limit_seconds": None, "grace_seconds": 2}
    programs = (
        root / "programs" if (root / "programs").is_dir() else write_programs(root / "programs", UPDATES)
    )
    say = (said if said is not None else []).append
    return Pool(runs, programs=programs, say=say, **(settings | changes))


def commands(run: PackedRun) -> list[str]:
    """Which programs were started for a run, in order."""
    lines = (run.folder / CONSOLE).read_text().splitlines()
    return [line.partition(".py")[0].rpartition("/")[2] for line in lines if line.startswith("$ ")]


def test_all_are_trained_and_evaluated_and_not_again(tmp_path: Path) -> None:
    runs, said = runs_of(tmp_path, "well", "well", "well"), list[str]()
    outcome = pool(tmp_path, runs, said).work()
    assert (
        sorted(outcome.done) == [run.name for run in runs] and not outcome.failed and not outcome.unfinished
    )
    assert all(commands(run) == ["train", "evaluate"] for run in runs)
    assert said[-1].startswith("3 of 3 runs done, 0 going; update 18 of 18, ")
    seconds = read_record(runs[0].folder)["seconds"]
    assert set(seconds) == {"train", "evaluate"}
    again = pool(tmp_path, runs).work()
    assert sorted(again.done) == sorted(outcome.done)
    assert all(commands(run) == ["train", "evaluate"] for run in runs)


def test_one_that_dies_stops_no_other_and_is_done_again(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, "die", "well", "well")
    outcome = pool(tmp_path, runs, processes=1).work()
    assert outcome.done == [runs[1].name, runs[2].name]
    assert outcome.failed == {runs[0].name: "train ended with status 1: error: the reward servers are gone"}
    (tmp_path / "programs" / "mended").touch()
    outcome = pool(tmp_path, runs).work()
    assert sorted(outcome.done) == [run.name for run in runs]
    assert commands(runs[0]) == ["train", "train", "evaluate"] and commands(runs[1]) == ["train", "evaluate"]


def test_at_most_so_many_at_once(tmp_path: Path) -> None:
    working = pool(tmp_path, runs_of(tmp_path, *["slow"] * 3), processes=2)
    most: list[int] = []

    def watch() -> None:
        while not most or most[-1] >= 0:
            most.append(len(working._active))
            if len(most) > 20 and not most[-1]:
                return
            time.sleep(0.05)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    working.work()
    watcher.join(5)
    assert max(most) == 2


def test_when_the_time_is_over_runs_save_and_the_same_again_goes_on(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, "slow", "slow", "well")
    started = time.monotonic()
    outcome = pool(tmp_path, runs, limit_seconds=4, grace_seconds=2).work()
    assert time.monotonic() - started < 6
    assert sorted(outcome.unfinished) == [run.name for run in runs] and not outcome.failed
    saved = int((runs[0].folder / "at.txt").read_text())
    assert 0 < saved < UPDATES
    (tmp_path / "programs" / "mended").touch()
    outcome = pool(tmp_path, runs).work()
    assert sorted(outcome.done) == [run.name for run in runs]
    assert "resume=" in (runs[0].folder / CONSOLE).read_text()
    rows = (runs[0].folder / "metrics.csv").read_text().splitlines()
    assert [row.partition(",")[0] for row in rows] == ["update", *(str(n + 1) for n in range(UPDATES))]


def test_one_that_is_deaf_is_killed_in_time(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, "hang")
    started = time.monotonic()
    outcome = pool(tmp_path, runs, limit_seconds=2.0, grace_seconds=1).work()
    assert time.monotonic() - started < 6
    assert outcome.unfinished == [runs[0].name]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    runs = runs_of(tmp_path, "slow", "slow")
    before = signal.getsignal(number)
    threading.Timer(2.0, os.kill, (os.getpid(), number)).start()
    outcome = pool(tmp_path, runs).work()
    assert outcome.signal_number == number and len(outcome.unfinished) == 2
    assert all((run.folder / "checkpoints" / "last.ckpt").is_file() for run in runs)
    assert signal.getsignal(number) is before


def test_one_that_was_killed_from_outside_is_a_failure_with_its_signal(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, "hang", "well")
    working = pool(tmp_path, runs)

    def kill() -> None:
        process = next(item.process for item in working._active if item.run is runs[0])
        os.kill(process.pid, signal.SIGKILL)

    threading.Timer(1.0, kill).start()
    outcome = working.work()
    assert outcome.done == [runs[1].name]
    assert outcome.failed == {runs[0].name: "train ended with status -9: nothing"}


def test_a_damaged_checkpoint_is_the_failure_of_its_run_alone(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, "well", "well")
    last = runs[0].folder / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    last.write_bytes(b"half a checkpoint")
    outcome = pool(tmp_path, runs).work()
    assert outcome.done == [runs[1].name] and "is damaged" in outcome.failed[runs[0].name]


def test_the_time_must_leave_room_for_stopping(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="room for grace_seconds; got 40 and 40"):
        pool(tmp_path, [], limit_seconds=40, grace_seconds=40)


def test_the_line_counts_what_evaluations_will_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 of 400 updates in 50 s: 150 s for the others, and three evaluations of 20 s, two at a time."""
    runs = [PackedRun(str(n), 1, tmp_path / str(n), 100, (), ()) for n in range(4)]
    runs[0].folder.mkdir()
    working = pool(tmp_path, runs)
    (runs[0].folder / "metrics.csv").write_text("update,a\n100,1\n")
    working._started, working._evaluations, working.outcome = 1000.0, [20.0], Outcome(done=["0/seed_1"])
    monkeypatch.setattr(time, "monotonic", lambda: 1050.0)
    assert working.line() == "1 of 4 runs done, 0 going; update 100 of 400, 2.0 a second; 0:03:00 left"


def test_the_last_telling_line(tmp_path: Path) -> None:
    file = tmp_path / "console.log"
    file.write_text("$ python train.py\nerror: first\nupdate 3\n(HYDRA_FULL_ERROR=1 shows where)\n")
    assert last_line(file) == "error: first"
    file.write_text("$ python train.py\nTraceback\nRuntimeError: x\n\n")
    assert last_line(file) == "RuntimeError: x"
