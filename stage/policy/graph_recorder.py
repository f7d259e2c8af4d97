"""CUDA graphs that are recorded one after the other, in memory that they share.

`torch.cuda.graph` empties the allocator's cache before it records. With a graph a rollout, every part of an update then
asks the driver for its memory anew, over a hundred times (LOG.md). Departures from it:
1. The cache is emptied for the first graph of a kind only, where memory may be held that it needs.
2. Graphs have one pool of memory. A pool goes with the last of its graphs, so a recording of nothing is kept in it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache
from typing import Any

import torch

WARM_UP = 2  # runs before a recording: kernels are compiled and libraries make their handles


class GraphRecorder:
    """Records graphs on one device, of which no two may be needed at once: the next may use the memory of the last."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._known: set[Hashable] = set()
        self._keeper = self._captured(lambda: torch.zeros(1, device=device))

    def record(
        self, step: Callable[[], object], undo: Callable[[], object], kind: Hashable
    ) -> torch.cuda.CUDAGraph:
        """`step` as a graph. Before that it runs a few times, and `undo` after it.

        Graphs of one `kind` need equally much memory.
        """
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UP):
                step()
                undo()
        if kind not in self._known:
            torch.cuda.empty_cache()
            self._known.add(kind)
        graph = self._captured(step, self._keeper.pool())
        current.wait_stream(self._stream)
        return graph

    def _captured(self, step: Callable[[], object], pool: Any = None) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # Other threads, a logger's for one, may use CUDA meanwhile.
            graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                step()
            finally:
                graph.capture_end()
        return graph


@cache
def recorder(device: torch.device) -> GraphRecorder:
    """That of a CUDA device with a number, for the life of the process."""
    return GraphRecorder(device)
