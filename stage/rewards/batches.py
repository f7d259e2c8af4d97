"""Rows of work in batches that fit the memory of the device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)


class Batches:
    """Calls a function on a few rows at a time, without gradient.

    When CUDA runs out of memory the size is halved, which is said once, and the same rows are tried again. The
    smaller size stays.

    Args:
        size: the most rows of one call.
        name: of the scorer, for messages.
    """

    def __init__(self, size: int, name: str) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"batch_size is a whole number of at least 1, got {size!r} for {name}; set one")
        self.size = size
        self.name = name

    def run(self, function: Callable[..., Tensor], *columns: Sequence[Any] | Tensor) -> Tensor:
        """The results of `function` for all rows, one below the other.

        Args:
            function: takes slices of the columns with N rows each to a tensor `[N, ...]`.
            columns: tensors or lists of the same length, at least 1.

        Raises:
            RuntimeError: a single row does not fit into memory.
        """
        found: list[Tensor] = []
        done, rows = 0, len(columns[0])
        while done < rows:
            size = min(self.size, rows - done)
            try:
                with torch.no_grad():
                    result = function(*(column[done : done + size] for column in columns))
            except torch.OutOfMemoryError as error:
                self._halve(size, error)
                continue
            found.append(result)
            done += size
        return torch.cat(found)

    def _halve(self, size: int, error: Exception) -> None:
        if size == 1:
            raise RuntimeError(
                f"one image must fit into the memory that is left, for {self.name} it does not: {error}; put "
                f"the scorer on another device or use a smaller dtype"
            ) from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.size = size // 2
        log.warning(
            "%s ran out of CUDA memory at %d rows and goes on with batch_size %d", self.name, size, self.size
        )
