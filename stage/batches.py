"""Rows of work in batches that fit the memory of the device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

log = logging.getLogger(__name__)
Result = TypeVar("Result")


def positive(value: int, name: str) -> int:
    """`value`, if it is a whole number above 0. Raises ValueError otherwise, calling it `name`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is a whole number of at least 1, got {value!r}; set one")
    return value


class Batches:
    """Calls a function on a few rows at a time, without gradient.

    When CUDA runs out of memory the size is halved, which is said once, and the same rows are tried again. The
    smaller size stays.

    Args:
        size: the most rows of one call.
        name: of the scorer or detector, for messages.
    """

    def __init__(self, size: int, name: str) -> None:
        self.size = positive(size, f"batch_size of {name}")
        self.name = name

    def run(self, function: Callable[..., Tensor], *columns: Sequence[Any] | Tensor) -> Tensor:
        """The results of `function` for all rows, one below the other.

        Args:
            function: takes slices of the columns with N rows each to a tensor `[N, ...]`.
            columns: tensors or lists of the same length, at least 1.

        Raises:
            RuntimeError: a single row does not fit into memory.
        """

        def part(rows: slice) -> Tensor:
            return function(*(column[rows] for column in columns))

        return torch.cat(list(self.slices(part, len(columns[0]))))

    def slices(self, function: Callable[[slice], Result], rows: int) -> Iterator[Result]:
        """`function` of consecutive slices, `rows` in all. Raises as `run`."""
        done = 0
        while done < rows:
            part = slice(done, min(done + self.size, rows))
            try:
                with torch.no_grad():
                    result = function(part)
            except torch.OutOfMemoryError as error:
                self._halve(part.stop - part.start, error)
                continue
            yield result
            done = part.stop

    def _halve(self, size: int, error: Exception) -> None:
        if size == 1:
            raise RuntimeError(
                f"one image must fit into the memory that is left, for {self.name} it does not: {error}; put "
                f"it on another device or use a smaller dtype"
            ) from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.size = size // 2
        log.warning(
            "%s ran out of CUDA memory at %d rows and goes on with batch_size %d", self.name, size, self.size
        )
