"""Reading text in several processes: an engine computes on one core, and pictures do not depend on each other."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # a worker imports this file, and torch with stage.types would be 200 MB in each of them
    from stage.types import TextReader

# Of a worker: how to make its reader, and the reader once it is made.
_make: Callable[[], TextReader] | None = None
_reader: TextReader | None = None


def _begin(make: Callable[[], TextReader]) -> None:
    global _make
    _make = make
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; training finishes its update
    threading.Thread(target=_follow_the_parent, daemon=True).start()


def _follow_the_parent() -> None:
    """End this worker when training was killed; it would wait for pictures forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _read(image: np.ndarray) -> tuple[str, ...]:
    """The lines of one picture `[H, W, 3]`, in a worker, whose reader is made for its first picture."""
    return _own().read(image[None])[0]


def _provenance() -> dict[str, Any]:
    return dict(_own().provenance)


def _own() -> TextReader:
    global _reader
    if _reader is None:
        assert _make is not None  # set by `_begin`
        _reader = _make()
    return _reader


class TextPool:
    """A `TextReader` that hands its pictures to `processes` workers, each with a reader of its own.

    Workers are started fresh (`spawn`), since a forked one would inherit locks of threads and a CUDA context that
    it cannot use. They end with this process.

    Args:
        make: makes a reader; it goes to the workers, so it is a picklable callable, such as a `functools.partial` of
            a class.
        processes: workers, at least 1.
    """

    def __init__(self, make: Callable[[], TextReader], processes: int) -> None:
        if processes < 1:
            raise ValueError(f"a pool needs at least 1 process, got {processes}; raise it")
        self.processes = processes
        self._pool = ProcessPoolExecutor(
            processes, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(make,)
        )
        # Asked of all at once, so that all of them start now and not in the first rollout.
        asked = [self._pool.submit(_provenance) for _ in range(processes)]
        self.provenance: Mapping[str, Any] = self._answer(lambda: next(answer.result() for answer in asked))

    def read(self, images: np.ndarray) -> list[tuple[str, ...]]:
        """Lines of each picture `[N, H, W, 3]`, in the order of the pictures.

        Raises:
            ChildProcessError: a worker died. What a reader raises is raised as it is.
        """
        return self._answer(lambda: list(self._pool.map(_read, images)))

    def close(self) -> None:
        """End the workers."""
        self._pool.shutdown(cancel_futures=True)

    def _answer(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except BrokenProcessPool as error:
            raise ChildProcessError(
                f"every picture must be read, but one of the {self.processes} processes that read text died ({error}); "
                f"free memory or lower reward.processes, and resume from the last checkpoint"
            ) from error
