"""`python train.py -m ...`: each job of a sweep in a process of its own, none twice, and none in the way of another.

Hydra's sweeper chooses the jobs and its launcher where they run (conf/hydra/): one after the other, several at once
with joblib, on SLURM with submitit. What they call is `job`, which starts `python train.py` with the overrides of that
job, under torchrun where the strategy wants several processes. So a crash ends that job alone, memory of the device is
given back, and whatever starts a program again for each of its processes starts a single run and never the sweep.

The folder of a job is named after its overrides and lies in `hydra.sweep.dir`, so the same sweep finds what it did
before. A run is complete when its last checkpoint has the configuration of the job and all its updates; one that was
stopped goes on from there.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from stage import launch, mistakes, processes
from stage.code_version import CODE, code_record
from stage.paths import quoted

RECORD, LOG, LOCK = "job.json", "job.log", ".lock"
DONE, THERE, DIED = "done", "there already", "died"
LAST_LINES = 3  # of the log of a job that died, in the summary


class Task(NamedTuple):
    """One job: what its configuration says and how it is started.

    `alone`: no other runs beside it, so its output is shown. `sought`: a sweeper waits for its score.
    """

    folder: Path
    config: DictConfig
    overrides: Sequence[str]
    flags: Sequence[str]
    alone: bool
    sought: bool
    strategy: str

    @classmethod
    def of(cls, config: DictConfig) -> Task:
        """The job that Hydra runs at this moment."""
        hydra = HydraConfig.get()
        own = [item.path for item in hydra.runtime.config_sources if item.provider == "command-line"]
        return cls(
            folder=Path(hydra.runtime.output_dir),
            config=config,
            overrides=[str(item) for item in hydra.overrides.task],
            flags=[word for path in own for word in ("--config-dir", path)],
            alone=hydra.runtime.choices["hydra/launcher"] == "basic",
            sought=hydra.runtime.choices["hydra/sweeper"] != "basic",
            strategy=hydra.runtime.choices["strategy"],
        )

    @property
    def name(self) -> str:
        return " ".join(self.overrides) or "no overrides"

    def settings(self, output: str | None = None) -> dict[str, Any]:
        """All settings of the run, as if its folder were `output`."""
        wanted = self.config.copy()
        wanted.output, wanted.resume = output or str(self.folder), None
        return launch.plain(wanted)


def sweeping() -> bool:
    """Whether this is a job of a sweep, which its own process is to run."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def job(config: DictConfig, script: Path) -> float:
    """Run one job of a sweep with `script`, as far as it is not done, and give its last validation score.

    What happens is kept in job.json, its output in job.log. A job that dies gives NaN, and its siblings go on;
    `Summary` tells at the end. To a sweeper that searches it raises RuntimeError, which such a one takes as a failed
    trial; Hydra's own would tell of the first error alone.
    """
    task, started = Task.of(config), time.time()
    if processes.started().rank > 0:  # SLURM starts all processes of a run; the first keeps the books
        return _run(command(task, script), task, log=None) and math.nan
    try:
        with locked(task.folder):
            resume, reason = remaining(task), ""
            state = THERE if resume is None else DONE
            if resume is None:
                reason = other_code(task.folder, script)
            if resume is not None:
                print(
                    f"{task.name}: {'goes on in' if resume else 'in'} {launch.short(task.folder)}", flush=True
                )
                log = task.folder / LOG
                before = log.stat().st_size if log.is_file() else 0
                code = _run(command(task, script, resume), task, log)
                if code != 0:
                    state, reason = DIED, f"exit status {code}: {last_words(log, before)}"
    except (ValueError, OSError) as error:
        state, reason = DIED, mistakes.explain(error) or str(error)
    score = math.nan if state == DIED else last_score(task)
    record = {
        "job": task.name,
        "state": state,
        "reason": reason,
        "score": None if math.isnan(score) else score,
    }
    _write(task.folder / RECORD, {**record, "started": started, "seconds": round(time.time() - started, 1)})
    print(f"{task.name}: {state}{f' ({reason})' if reason else ''}", flush=True)
    if state == DIED and task.sought:
        raise RuntimeError(reason)
    return score


def remaining(task: Task) -> str | None:
    """What is left of a job: None where it is complete, the checkpoint it goes on from, or "" for all of it.

    Raises ValueError where the folder holds a run of other settings, or a damaged checkpoint.
    """
    settings = task.settings()
    checkpoints = settings["callbacks"].get("checkpoints")
    last = Path(checkpoints["folder"]) / "last.ckpt" if checkpoints else None
    if last is None or not last.exists():
        return ""
    from stage.training_checkpoint import read_training_checkpoint  # torch takes seconds

    found = read_training_checkpoint(last)
    # A folder that was moved is still the same run.
    changes = dict(launch.differences(found["config"], task.settings(found["config"]["output"])))
    if changes:
        name = next(iter(changes))
        raise ValueError(
            f"{launch.short(task.folder)} holds a run with other settings, {name} {changes[name]}: two runs would have "
            "one name. Move it away, or set hydra.sweep.dir to another folder"
        )
    return None if found["update"] >= settings["updates"] else str(last)


def other_code(folder: Path, script: Path) -> str:
    """What to say of a run that another version of the program made; empty for this one, or where it is not known."""
    file = folder / CODE
    made = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    if not made or made[-1]["sha256"] == code_record(script.parent)["sha256"]:
        return ""
    version = made[-1]["sha256"][:8]
    return f"made by another version of the code, {version}; move {launch.short(folder)} away to repeat it"


def command(task: Task, script: Path, resume: str = "") -> list[str]:
    """The command line of a job on its own."""
    words = [*starter(task), str(script), *task.flags, *task.overrides, f"output={quoted(str(task.folder))}"]
    return [*words, f"resume={quoted(resume)}"] if resume else words


def starter(task: Task) -> list[str]:
    """What starts the processes of a run: Python, or torchrun where the strategy wants several and SLURM has not.

    Raises ValueError for such a strategy without their number.
    """
    devices = task.config.trainer.devices
    if task.strategy == "single" or processes.started().world > 1:
        return [sys.executable]
    if not isinstance(devices, int) or devices < 2:
        raise ValueError(
            f"a sweep starts the processes of each run, got strategy={task.strategy} and trainer.devices={devices}; "
            "set trainer.devices to their number, at least 2"
        )
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}"]


def _run(words: Sequence[str], task: Task, log: Path | None) -> int:
    """Start a job, keep what it says (and show it where it runs alone), and give its exit status.

    It sees W&B's group of the sweep, unless one is set. Signals that end this process reach it as well.
    """
    environment = {"WANDB_RUN_GROUP": task.folder.parent.name, **os.environ}
    if not launch.WANTS_TRACEBACK:
        environment.pop(launch.FULL_ERROR, None)  # this process's own, see `launch.run`
    pipe = None if log is None else subprocess.PIPE
    child = subprocess.Popen(words, stdout=pipe, stderr=subprocess.STDOUT if pipe else None, env=environment)
    with _passing_on(child):
        if log is not None and child.stdout is not None:
            with log.open("ab") as file:
                for line in child.stdout:
                    file.write(line)
                    file.flush()
                    if task.alone:
                        sys.stdout.write(line.decode(errors="replace"))
                        sys.stdout.flush()
        return child.wait()


@contextmanager
def _passing_on(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """SIGTERM ends the job before this process; Ctrl-C, which it got from the terminal, waits until it has saved."""

    def stop(number: int, _: Any) -> None:
        child.send_signal(number)
        child.wait()
        sys.exit(launch.exit_status(number))

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        child.wait()
        raise
    except BaseException:
        child.terminate()
        child.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a run folder for this process. Raises ValueError where another one has it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"another process is at work in {launch.short(folder)}: two runs would have one name. Wait for it, or "
                "set hydra.sweep.dir to another folder"
            ) from error
        yield


def last_words(log: Path, start: int) -> str:
    """The error line of what a log holds from a byte on, or else its last lines, in one line."""
    text = log.read_bytes()[start:].decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return errors[-1] if errors else " | ".join(lines[-LAST_LINES:])


def last_score(task: Task) -> float:
    """The last value of what best.ckpt is chosen by, for a sweeper that searches; NaN where there is none."""
    checkpoints = task.settings()["callbacks"].get("checkpoints")
    metrics = task.folder / "metrics.csv"
    if not checkpoints or not metrics.is_file():
        return math.nan
    from stage.loggers import best_by, read_metrics  # torch takes seconds

    scores = [best_by(row, checkpoints["monitor"]) for row in read_metrics(metrics)]
    found = [float(score) for score in scores if score is not None]
    return found[-1] if found else math.nan


def _write(file: Path, record: Mapping[str, Any]) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)


class Summary(Callback):
    """The last words of a sweep: what ran, what was there, what died; exit status 1 where anything did."""

    def __init__(self) -> None:
        self.started = 0.0

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        self.started = time.time()

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Ends the program with one text where a job died."""
        folder = Path(str(config.hydra.sweep.dir))
        records = [
            json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob(f"*/{RECORD}"))
        ]
        text, died = summary([item for item in records if item["started"] >= self.started], folder)
        print(text, flush=True)
        if died:
            sys.exit(f"error: {died}. The same command runs what is missing: {again()}")


def summary(records: Sequence[Mapping[str, Any]], folder: Path) -> tuple[str, str]:
    """The line of a sweep, and what to say of the jobs that died, empty where none did."""
    counts = {state: sum(item["state"] == state for item in records) for state in (DONE, THERE, DIED)}
    told = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    other = sum(item["state"] == THERE and bool(item["reason"]) for item in records)
    told += f", {other} of them by another version of the code" if other else ""
    words = [item["job"].split() for item in records]
    common = set(words[0]).intersection(*words[1:]) if len(words) > 1 else set()
    dead = [
        f"{' '.join(word for word in own if word not in common)} ({item['reason']})"
        for own, item in zip(words, records, strict=True)
        if item["state"] == DIED
    ]
    line = f"{len(records)} runs in {launch.short(folder)}: {told}"
    return line, f"{len(dead)} of {len(records)} runs died: {'; '.join(dead)}" if dead else ""


def again() -> str:
    """This command line as one types it."""
    return shlex.join(["python", launch.short(sys.argv[0]), *sys.argv[1:]])
