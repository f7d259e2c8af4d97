"""Work in batches that fit the memory of the device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

log = logging.getLogger(__name__)
Result = TypeVar("Result")


def positive(value: int, name: str) -> int:
    """`value`, if it is a whole number above 0. Raises ValueError otherwise, calling it `name`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is a whole number of at least 1, got {value!r}; set one")
    return value


def halving(function: Callable[[slice], Result], rows: int, size: int) -> Iterator[Result]:
    """`function` of consecutive slices of at most `size` rows, `rows` in all.

    When CUDA runs out of memory the size is halved, which is said, and the same rows are tried again.

    Raises:
        RuntimeError: a single row does not fit into memory.
    """
    done = 0
    while done < rows:
        part = slice(done, min(done + size, rows))
        try:
            result = function(part)
        except torch.OutOfMemoryError as error:
            tried = part.stop - part.start
            if tried == 1:
                raise RuntimeError(
                    f"one picture must fit into the memory that is left, and does not: {error}; use another "
                    f"device or a smaller dtype"
                ) from error
            size = tried // 2
            log.warning("out of CUDA memory at %d pictures: going on with %d at a time", tried, size)
            continue
        yield result
        done = part.stop
