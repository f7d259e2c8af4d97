"""A pool of processes that works off the runs of a pack, stops in time, and lets no failure stop another run."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stage.pack.plan import PackedRun, Step, begin, finish, next_step, updates_done

CONSOLE = "console.log"
PROMPT = "$ "  # before the command of a step
POLL = 0.2  # seconds between looks at the processes


@dataclass
class Outcome:
    """What became of the runs: names of those that are done or unfinished, and the reasons of those that failed."""

    done: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    signal_number: int | None = None


@dataclass(frozen=True)
class _Active:
    run: PackedRun
    step: Step
    process: subprocess.Popen[bytes]
    started: float


class Pool:
    """Keeps `processes` runs going until all are done or the time is over.

    Args:
        runs: in the order in which they are started.
        programs: folder of train.py and evaluate.py, and the working directory of the processes.
        processes, threads: runs at once, and CPU threads of each.
        limit_seconds, grace_seconds: wall time of `work`, None for no limit, and what is kept of it for stopping. A
            training that is asked to stop finishes its update and saves it; what has not ended in time is killed.
        say: called with each line of progress, every `say_every` seconds.
    """

    def __init__(
        self,
        runs: Sequence[PackedRun],
        *,
        programs: Path,
        processes: int,
        threads: int,
        limit_seconds: float | None,
        grace_seconds: float,
        say_every: float,
        say: Callable[[str], None],
    ) -> None:
        if limit_seconds is not None and not 0 <= grace_seconds < limit_seconds:
            raise ValueError(
                f"limit_seconds must leave room for grace_seconds; got {limit_seconds} and {grace_seconds}. Raise it."
            )
        self.runs, self.programs, self.processes = list(runs), programs, processes
        self.environment = _environment(threads)
        self.limit_seconds, self.grace_seconds = limit_seconds, grace_seconds
        self.say_every, self.say = say_every, say
        self.outcome = Outcome()
        self._active: list[_Active] = []
        self._stopped: float | None = None  # when the processes were asked to stop
        self._started = 0.0
        self._evaluations: list[float] = []  # seconds of each
        self._before = 0  # updates that were done before this pool began

    def work(self) -> Outcome:
        """Run everything that is missing. Ctrl-C and SIGTERM stop the runs as the end of the time does."""
        self._started, said = time.monotonic(), time.monotonic()
        self._before = sum(min(updates_done(run.folder), run.updates) for run in self.runs)
        waiting = deque(self.runs)
        handlers = {n: signal.signal(n, self._on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            while waiting or self._active:
                self._look_at_time()
                while waiting and self._stopped is None and len(self._active) < self.processes:
                    self._go_on(waiting.popleft(), None)
                if self._stopped is not None:
                    self.outcome.unfinished += [run.name for run in waiting]
                    waiting.clear()
                self._collect()
                if time.monotonic() - said >= self.say_every:
                    said = time.monotonic()
                    self.say(self.line())
                time.sleep(POLL)
        finally:
            for active in self._active:  # only after an error of this program
                _kill(active.process)
            for number, handler in handlers.items():
                signal.signal(number, handler)
        self.say(self.line())
        return self.outcome

    def line(self) -> str:
        """`12 of 40 runs done, 16 going, 1 failed; update 3421 of 8000, 10.2 a second; 0:07:28 left`."""
        done, total = self._updates(), sum(run.updates for run in self.runs)
        seconds = time.monotonic() - self._started
        speed = (done - self._before) / seconds if seconds else 0.0
        parts = [f"{len(self.outcome.done)} of {len(self.runs)} runs done, {len(self._active)} going"]
        if self.outcome.failed:
            parts.append(f"{len(self.outcome.failed)} failed")
        left = "time left unknown"
        if speed > 0:
            whole = int((total - done) / speed + self._evaluations_left())
            left = f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d} left"
        return f"{', '.join(parts)}; update {done} of {total}, {speed:.1f} a second; {left}"

    def _evaluations_left(self) -> float:
        """Seconds that the evaluations to come will add, as long as the average of those that were made."""
        if not self._evaluations:
            return 0.0
        ahead = len(self.runs) - len(self.outcome.done) - len(self.outcome.failed)
        return ahead * sum(self._evaluations) / len(self._evaluations) / self.processes

    def _updates(self) -> int:
        return sum(min(updates_done(run.folder), run.updates) for run in self.runs)

    def _look_at_time(self) -> None:
        now = time.monotonic()
        limit = self.limit_seconds
        if self._stopped is None and limit is not None and now - self._started >= limit - self.grace_seconds:
            self._stop("the time is over")
        if self._stopped is not None and now - self._stopped >= self.grace_seconds:
            for active in self._active:
                _kill(active.process)

    def _on_signal(self, number: int, frame: Any) -> None:
        self.outcome.signal_number = number
        if self._stopped is None:
            self._stop(signal.Signals(number).name)

    def _stop(self, reason: str) -> None:
        """Ask every process to save and end. An evaluation listens to Ctrl-C alone, and keeps its images."""
        self._stopped = time.monotonic()
        os.write(1, f"{reason}: stopping {len(self._active)} runs, which save what they have\n".encode())
        for active in self._active:
            evaluating = active.step.kind == "evaluate"
            active.process.send_signal(signal.SIGINT if evaluating else signal.SIGTERM)

    def _go_on(self, run: PackedRun, before: Step | None) -> None:
        """Start the next step of a run, whose step `before` ended well; a folder that cannot be read is a failure."""
        try:
            step = next_step(run, self.programs)
            if step is None:
                self.outcome.done.append(run.name)
            elif step == before:
                self.outcome.failed[run.name] = f"{step.kind} ended well and left the run as it was"
            else:
                begin(run, step)
                self._active.append(_Active(run, step, self._start(run, step), time.monotonic()))
        except (OSError, ValueError) as error:
            self.outcome.failed[run.name] = " ".join(str(error).split())

    def _start(self, run: PackedRun, step: Step) -> subprocess.Popen[bytes]:
        with (run.folder / CONSOLE).open("ab") as console:
            console.write(f"\n{PROMPT}{' '.join(step.command)}\n".encode())
            console.flush()
            return subprocess.Popen(
                step.command,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                cwd=self.programs,
                env=self.environment,
                start_new_session=True,  # Ctrl-C reaches this program alone, which passes it on once
            )

    def _collect(self) -> None:
        for active in [item for item in self._active if item.process.poll() is not None]:
            self._active.remove(active)
            run, status = active.run, active.process.returncode
            if status == 0:
                seconds = time.monotonic() - active.started
                finish(run, active.step, seconds)
                self._evaluations += [seconds] if active.step.kind == "evaluate" else []
            if self._stopped is not None:
                over = status == 0 and next_step(run, self.programs) is None
                (self.outcome.done if over else self.outcome.unfinished).append(run.name)
            elif status == 0:
                self._go_on(run, active.step)
            else:
                reason = last_line(run.folder / CONSOLE)
                self.outcome.failed[run.name] = f"{active.step.kind} ended with status {status}: {reason}"


def last_line(file: Path) -> str:
    """What a program said last that is more than its command or a hint where to look; at most 300 characters."""
    lines = [line.strip() for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
    telling = [line for line in lines if line and not line.startswith(("(HYDRA_FULL_ERROR", PROMPT))]
    errors = [line for line in telling if line.startswith("error:")]
    return (errors or telling or ["nothing"])[-1][:300]


def _environment(threads: int) -> Mapping[str, str]:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    fixed = {name: str(threads) for name in names}
    return {**os.environ, **fixed, "TOKENIZERS_PARALLELISM": "false"}


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and whatever it started; it may be gone already."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
