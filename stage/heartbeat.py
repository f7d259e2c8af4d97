"""Whether all processes still come along, and the end of all where one hangs or has died.

A thread beside the main one, since a main thread that waits in a collective can do nothing. Each process says what it
does to the first one, a few times a minute and whatever its main thread waits for. The first one ends all of them,
with the reason, when

- a process has died, or torchrun, which is to end them: at once;
- a process has failed and the others do not know of it: at once, with its words;
- nobody has moved for `patience` seconds while somebody waits for the others: it names who is behind.

Whoever works while nobody waits may take as long as it likes. Time counts while this thread runs, at most two rounds at
once: a machine or a job that was suspended finds nobody late when it goes on.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stage.links import Link, meet
from stage.processes import started

ROUND = 2.0  # seconds between two words of a process
ROUNDS = 10  # in the patience, at least
SPARE = 30.0  # seconds by which collectives wait longer, so that the reason is said first
LAST_WORD = 3.0  # seconds for the first process to say why all end
MOST = 16  # processes of which a line names the place
ADVICE = "Resume from the last checkpoint."


@dataclass(frozen=True)
class State:
    """Where a process is: after so many exchanges and `steps` since, in `part` of an update; `waits` for others."""

    exchanges: int = 0
    steps: int = 0
    part: str = "the start"
    update: int = 1
    waits: bool = False

    @property
    def place(self) -> tuple[int, int]:
        """What tells who is behind: all processes go through the same places."""
        return self.exchanges, self.steps

    def __str__(self) -> str:
        return f"{self.part} of update {self.update}"


class Judge:
    """Who hangs, from what processes say. All times are seconds of one clock.

    Args:
        world: processes.
        patience: seconds that somebody may wait while nobody moves.
    """

    def __init__(self, world: int, patience: float) -> None:
        self.patience = patience
        self.states = [State()] * world
        self.lines = [""] * world  # where in the code each was last
        self.heard = [0.0] * world
        self.moved = 0.0

    def hear(self, rank: int, state: State, line: str, now: float) -> None:
        """What process `rank` says of itself at `now`."""
        if state != self.states[rank]:
            self.states[rank], self.moved = state, now
        self.lines[rank], self.heard[rank] = line, now

    def verdict(self, now: float) -> str | None:
        """Who hangs at `now`, in words; None where nobody does."""
        still = now - self.moved
        if still <= self.patience or not any(state.waits for state in self.states):
            return None
        first = min(state.place for state in self.states)
        late = [rank for rank, state in enumerate(self.states) if state.place == first]
        world, rank = len(self.states), late[0]
        where = f"{self.states[rank]}{self._line(rank)}"
        if len(late) == world:
            silent = [r for r in late if now - self.heard[r] > self.patience / 2]
            if not silent:
                lines = ", ".join(f"{r} in {line}" for r, line in enumerate(self.lines[:MOST]))
                part = f"{self.states[0]}: {lines}"
                return f"none of {world} processes has moved for {still:.0f} s, in {part}. {ADVICE}"
            late = silent
        who = f"process {late[0]}" if len(late) == 1 else f"processes {', '.join(map(str, late))}"
        quiet = "" if now - self.heard[late[0]] < self.patience / 2 else ", and says nothing any more"
        return f"{who} of {world} hangs for {still:.0f} s in {where}{quiet}; the others wait. {ADVICE}"

    def died(self, rank: int) -> str:
        """What to say of a process whose connection has ended."""
        who = f"process {rank} of {len(self.states)}"
        return f"{who} has died in {self.states[rank]}; look at what it said last. {ADVICE}"

    def _line(self, rank: int) -> str:
        return f" ({self.lines[rank]})" if self.lines[rank] else ""


class Clock:
    """Seconds in which this thread could run: a gap counts as two rounds at most."""

    def __init__(self, most: float) -> None:
        self._most, self._last, self.now = most, time.monotonic(), 0.0

    def tick(self) -> float:
        """The seconds so far."""
        last, self._last = self._last, time.monotonic()
        self.now += min(self._last - last, self._most)
        return self.now


class Heartbeat:
    """The word that one process gives and takes.

    The main thread says where it is by `does` and `waiting`, and ends it by `stop`, or by `fail` with an error that
    the others do not know of.

    Args:
        rank, world: of this process.
        links: to all others on the first process, to the first on another.
        patience: see `Judge`.
    """

    def __init__(self, rank: int, world: int, links: Mapping[int, Link], patience: float) -> None:
        self.rank, self.world, self.patience = rank, world, patience
        self._links, self._state, self._reason = dict(links), State(), ""
        self._round = min(ROUND, patience / ROUNDS)
        self._clock = Clock(2 * self._round)
        self._judge = Judge(world, patience)
        self._failed: tuple[float, str] | None = None  # when an error was told, and which
        self._over, self._told = threading.Event(), False
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._main = threading.main_thread().ident
        self._torchrun = os.getppid() if started().by == "torchrun" else None
        self._thread = threading.Thread(
            target=self._lead if rank == 0 else self._follow, name="heartbeat", daemon=True
        )

    def start(self) -> Heartbeat:
        """Begin."""
        self._thread.start()
        return self

    def does(self, part: str, *, update: int | None = None, waits: bool = False) -> None:
        """This process begins a part of an update; `waits` where it cannot go on without the others."""
        old = self._state
        number = old.update if update is None else update
        self._state = replace(old, steps=old.steps + 1, part=part, update=number, waits=waits)
        self._stir()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what a process can only leave when all have come to it."""
        old = self._state
        self._state = replace(old, exchanges=old.exchanges + 1, steps=0, waits=True)
        self._stir()
        yield
        self._state = replace(self._state, steps=1, waits=False)

    def fail(self, reason: str) -> bool:
        """End all others with an error of this process; whether the first process has said it."""
        if not self._thread.is_alive():
            return False
        self._reason = reason
        self._stir()
        self._thread.join(LAST_WORD)
        return self._told

    def last_word(self) -> None:
        """Give the first process the time to end all where one has died."""
        self._thread.join(LAST_WORD)

    def stop(self) -> None:
        """Part from the others in good order; more than once is no harm."""
        self._over.set()
        self._stir()
        self._thread.join(2 * LAST_WORD)

    def _stir(self) -> None:
        """Let the thread look up."""
        with suppress(BlockingIOError):  # it has not looked for long, and will
            self._wake.send(b"!")

    def _lead(self) -> None:
        spoken = -self._round
        while not self._over.is_set():
            self._wait()
            now = self._clock.tick()
            for rank in list(self._links):
                self._hear(rank, now)
            self._judge.hear(0, self._state, self._line(), now)
            if self._reason and self._failed is None:
                self._failed = now, ""
            text = self._judge.verdict(now)
            if text is not None:
                self._end(text)
            if self._failed is not None and now - self._failed[0] >= self._round / 2:
                if self._failed[1]:
                    self._end(self._failed[1])
                break  # an error of this process, which its main thread says
            if now - spoken >= self._round:
                spoken = now
                for link in self._links.values():
                    link.send({"here": True})
        self._part({"end" if self._reason else "bye": True})

    def _hear(self, rank: int, now: float) -> None:
        """What process `rank` has said since the last time."""
        messages = self._links[rank].receive()
        if messages is None:
            self._end(self._judge.died(rank))
        for message in messages or []:
            if "bye" in message:
                self._links.pop(rank).close()
            elif "failed" in message:
                # It may have failed because another has died, which is then known in a moment.
                text = f"process {rank} of {self.world} failed: {message['failed']}"
                self._failed = self._failed or (now, text)
            else:
                self._judge.hear(rank, State(**message["state"]), message["line"], now)

    def _follow(self) -> None:
        spoken, heard, told, said = -self._round, 0.0, False, State()
        while not self._over.is_set():
            self._wait()
            now, messages = self._clock.tick(), self._links[0].receive()
            if messages is None:
                self._end(f"process 0 of {self.world} has died; look at what it said last. {ADVICE}")
            if any("end" in message for message in messages or []):
                if self._reason:
                    self._told = True
                    return
                os._exit(1)  # the first process has said why
            if any("bye" in message for message in messages or []):
                return
            heard = now if messages else heard
            if now - heard > self.patience:
                self._end(
                    f"process 0 of {self.world} says nothing any more for {now - heard:.0f} s. {ADVICE}"
                )
            if self._reason and not told:
                told = True
                self._links[0].send({"failed": self._reason})
            elif now - spoken >= self._round or self._state != said:
                spoken, said = now, self._state
                self._links[0].send({"state": vars(said), "line": self._line()})
        self._part({"bye": True})

    def _wait(self) -> None:
        """Until somebody speaks, or a round is over."""
        ends: list[Link | socket.socket] = [*self._links.values(), self._woken]
        ready, _, _ = select.select(ends, [], [], self._round / 2)
        if self._woken in ready:
            self._woken.recv(1 << 12)
        self._leave_orphaned()

    def _leave_orphaned(self) -> None:
        """End without torchrun, or a resumed run would meet this one."""
        if self._torchrun is None or os.getppid() == self._torchrun:
            return
        text = f"torchrun, which started process {self.rank} of {self.world}, has died. {ADVICE}"
        if self.rank == 0:
            self._end(text)
        os.write(2, f"{text}\n".encode())
        os._exit(1)

    def _line(self) -> str:
        """File and line where the main thread is."""
        frame = sys._current_frames().get(self._main or 0)
        return "" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"

    def _part(self, message: Mapping[str, Any]) -> None:
        """Say this and wait a moment until it has been taken."""
        for link in self._links.values():
            link.send(message)
            link.finish()
        until = time.monotonic() + 1.0
        while self._links and time.monotonic() < until:
            for rank, link in list(self._links.items()):
                if link.receive() is None:
                    self._links.pop(rank).close()
            select.select(list(self._links.values()), [], [], 0.05)
        for link in self._links.values():
            link.close()

    def _end(self, text: str) -> None:
        """Say why and end this process, and from the first one all others; the main thread may hang."""
        if self.rank > 1:
            time.sleep(LAST_WORD)  # process 1 says it
        start = "\n" if os.isatty(2) else ""  # a terminal may have a progress bar in this line
        os.write(2, f"{start}error: {text}\n".encode())
        if self.rank == 0:
            self._part({"end": True})
        os._exit(1)


def begin(rank: int, world: int, seconds: float, exchange: Callable[[str], list[str]]) -> Heartbeat:
    """A running heartbeat of this process. Every process must call it; for `exchange` see `stage.links.meet`."""
    return Heartbeat(rank, world, meet(rank, world, exchange), seconds).start()
