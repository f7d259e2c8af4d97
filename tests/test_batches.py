"""Batches that halve when memory runs out."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from stage.batches import Batches


def test_rows_come_back_in_order() -> None:
    sizes = []

    def double(rows: torch.Tensor, names: list[str]) -> torch.Tensor:
        sizes.append(len(rows))
        assert [f"{int(row)}" for row in rows] == names and not torch.is_grad_enabled()
        return rows * 2

    rows = torch.arange(7.0, requires_grad=True)
    found = Batches(3, "x").run(double, rows, [str(i) for i in range(7)])
    assert found.tolist() == [0, 2, 4, 6, 8, 10, 12] and sizes == [3, 3, 1]


def test_memory_that_runs_out_halves_the_batch_once(caplog: pytest.LogCaptureFixture) -> None:
    sizes = []

    def hungry(rows: torch.Tensor) -> torch.Tensor:
        sizes.append(len(rows))
        if len(rows) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rows

    batches = Batches(10, "hps")
    with caplog.at_level(logging.WARNING):
        assert batches.run(hungry, torch.arange(12)).tolist() == list(range(12))
        assert batches.run(hungry, torch.arange(6)).tolist() == list(range(6))
    assert sizes == [10, 5, 5, 2, 5, 1]
    assert [record.getMessage() for record in caplog.records] == [
        "hps ran out of CUDA memory at 10 rows and goes on with batch_size 5"
    ]


def test_one_row_too_large_is_an_error() -> None:
    def full(rows: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(RuntimeError, match=r"one image must fit.*for orm it does not: CUDA out of memory"):
        Batches(4, "orm").run(full, torch.arange(3))


def test_other_errors_pass() -> None:
    with pytest.raises(ZeroDivisionError):
        Batches(4, "x").run(lambda rows: rows[0] // 0 if 1 // 0 else rows, [1])


def test_slices_give_whatever_the_function_gives() -> None:
    batches = Batches(4, "detector")
    seen = []

    def hungry(rows: slice) -> list[int]:
        if rows.stop - rows.start > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        seen.append(rows)
        return list(range(rows.start, rows.stop))

    found = list(batches.slices(hungry, 5))
    assert found == [[0, 1], [2, 3], [4]] and batches.size == 2 and len(seen) == 3


@pytest.mark.parametrize("size", [0, -1, True, 2.0])
def test_a_size_is_a_whole_number(size: Any) -> None:
    with pytest.raises(ValueError, match="batch_size of x is a whole number of at least 1"):
        Batches(size, "x")
