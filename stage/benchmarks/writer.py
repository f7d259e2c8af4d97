"""Images are compressed and written while the next ones are drawn."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

THREADS = 8  # Pillow leaves Python's lock while it compresses; 16 of 384 pixels take a second on one core
BATCHES = 2  # that wait for the disk at most: memory stays bounded where it is slower than the model


class Writer:
    """Runs the writing of whole batches beside the caller, in order of their arrival.

    Use it as a context: leaving it waits for all that is left, or after an error only for files that are being written.
    What goes wrong in a thread is raised by the next `write`, or on leaving.

    Args:
        written: called with the number of images of a batch once all of them are on disk.
    """

    def __init__(self, written: Callable[[int], None]) -> None:
        self.written = written
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="image-writer")
        self._waiting: deque[list[Future[object]]] = deque()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            while error is None and self._waiting:
                self._finish()
        finally:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def write(self, batch: Sequence[Callable[[], object]]) -> None:
        """Take a batch, one function for each image; waits while `BATCHES` others are not on disk."""
        while len(self._waiting) >= BATCHES:
            self._finish()
        self._waiting.append([self._threads.submit(save) for save in batch])

    def _finish(self) -> None:
        batch = self._waiting.popleft()
        for one in batch:
            one.result()
        self.written(len(batch))
