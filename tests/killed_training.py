"""train.py in forked processes, whose start takes a second, killed at a moment; and what is left then."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stage.loggers import read_metrics
from stage.training_checkpoint import read_training_checkpoint
from tests.processes import environment, free_port
from tests.tiny_training import ROOT

STATE = ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "update", "random", "processes")
LIMIT = 90  # seconds that a run may take
PERIOD = 2e-4  # seconds between two looks at a folder


def _child(rank: int, world: int, port: int, folder: Path, arguments: Sequence[str], disk: float) -> None:
    """The program, as its own process would run it, with its output in a file."""
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(disk)
        fsync(descriptor)

    vars(os)["fsync"] = slow
    if world > 1:
        os.environ.update(environment(rank, world, port))
    sys.stdout = sys.stderr = (folder / f"console_{rank}.txt").open("a", buffering=1, encoding="utf-8")
    for number in (1, 2):
        os.dup2(sys.stdout.fileno(), number)
    torch.set_num_threads(1)
    os.chdir(folder)
    sys.argv = [str(ROOT / "train.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


@dataclass(frozen=True)
class Job:
    """The processes of a run in `folder`, which writes into `folder/run`."""

    folder: Path
    processes: Sequence[Any]
    begun: float

    @property
    def logged(self) -> int:
        """Rows of metrics.csv."""
        file = self.folder / "run" / "metrics.csv"
        return max(0, file.read_bytes().count(b"\n") - 1) if file.exists() else 0

    @property
    def running(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    @property
    def writing(self) -> bool:
        """Whether something lies in the folder of checkpoints that has no name yet."""
        return bool(leftovers(self.folder))

    def wait(self, done: Callable[[], bool]) -> bool:
        """Look again and again; False when a process has ended before."""
        while not done():
            if not self.running:
                return False
            time.sleep(PERIOD)
        return self.running

    def timeline(self) -> list[float]:
        """Seconds from the start to each row of metrics.csv, and to the end, of a run that nobody kills."""
        found: list[float] = []
        while self.wait(lambda: self.logged > len(found)):
            found.append(time.monotonic() - self.begun)
        assert set(self.finish()) == {0}, self.said()
        return [*found, time.monotonic() - self.begun]

    def kill(self, ranks: Sequence[int]) -> bool:
        """SIGKILL, and wait until all are gone; False for a run that had ended by itself."""
        for rank in ranks:
            os.kill(self.processes[rank].pid, signal.SIGKILL)
        self.finish()
        return any(self.processes[rank].exitcode == -signal.SIGKILL for rank in ranks)

    def finish(self) -> list[int]:
        """Exit statuses by rank. Raises AssertionError with the output of a process that does not end."""
        for process in self.processes:
            process.join(LIMIT)
        late = [process for process in self.processes if process.is_alive()]
        for process in late:
            process.kill()
            process.join()
        assert not late, self.said()
        return [process.exitcode for process in self.processes]

    def said(self) -> str:
        """The output of all processes."""
        return "\n".join(file.read_text() for file in sorted(self.folder.glob("console_*.txt")))


def start(folder: Path, world: int, arguments: Sequence[str], disk: float = 0.0) -> Job:
    """The run of `folder`: from last.ckpt on if there is one, else from the start, with these arguments.

    Its disk takes `disk` seconds more for every file, so that somebody else sees it being written.
    """
    last = folder / "run" / "checkpoints" / "last.ckpt"
    if last.exists():
        return launch(folder, world, [*arguments[:2], f"resume={last}"], disk)
    return launch(folder, world, [*arguments, f"output={folder / 'run'}"], disk)


def launch(folder: Path, world: int, arguments: Sequence[str], disk: float = 0.0) -> Job:
    """train.py with these arguments alone."""
    folder.mkdir(parents=True, exist_ok=True)
    context, port, begun = multiprocessing.get_context("fork"), free_port(), time.monotonic()
    found = [
        context.Process(target=_child, args=(rank, world, port, folder, arguments, disk))
        for rank in range(world)
    ]
    for process in found:
        process.start()
    return Job(folder, found, begun)


def complete(folder: Path, world: int, arguments: Sequence[str]) -> list[float]:
    """Go on to the end, if anything is left to do; the timeline of that.

    Raises AssertionError with the output when the run does not end well.
    """
    last = folder / "run" / "checkpoints" / "last.ckpt"
    if last.exists():
        saved = read_training_checkpoint(last)
        if saved["update"] == saved["config"]["updates"]:
            return []
    return start(folder, world, arguments).timeline()


def leftovers(folder: Path) -> list[str]:
    """Names of what is not a whole checkpoint in the folder of checkpoints."""
    place = folder / "run" / "checkpoints"
    return [name for name in os.listdir(place) if name.startswith(".")] if place.is_dir() else []


def checkpoints(folder: Path) -> dict[str, dict[str, Any]]:
    """Each checkpoint in a folder, whole in memory, by name. Raises ValueError for one that does not load."""
    found = {path.name: read_training_checkpoint(path) for path in sorted(folder.glob("*.ckpt"))}
    return {
        name: {part: plain(saved[part]) for part in STATE if part in saved} for name, saved in found.items()
    }


def plain(value: Any) -> Any:
    """Mappings and sequences as dicts and lists; a tensor as its type, shape and bytes."""
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().view(-1)
        return str(value.dtype), tuple(value.shape), flat.view(torch.uint8).numpy().tobytes()
    if isinstance(value, Mapping):
        return {str(name): plain(value[name]) for name in value}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def rows(folder: Path) -> list[dict[str, str]]:
    """metrics.csv without times."""
    found = read_metrics(folder / "run" / "metrics.csv")
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in found]


def pictures(folder: Path) -> dict[str, bytes]:
    """The pictures of a run, by name."""
    return {file.name: file.read_bytes() for file in (folder / "run" / "images").glob("*.png")}


def everything(folder: Path) -> dict[str, Any]:
    """All that a run leaves, apart from times."""
    held = checkpoints(folder / "run" / "checkpoints")
    return {"rows": rows(folder), "pictures": pictures(folder), "unfinished": leftovers(folder), **held}
