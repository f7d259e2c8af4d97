"""Batches that halve when memory runs out; grids of values with their limits."""

from __future__ import annotations

import logging

import pytest
import torch

from stage.rewards import grid
from stage.rewards.batches import Batches
from stage.score_checks import UnusableScores
from stage.types import Prompt, Scores


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


def test_values_are_held_to_their_limits() -> None:
    images, prompts = torch.zeros(2, 2, 4, 4, 3, dtype=torch.uint8), (Prompt(0, "one"), Prompt(1, "two"))

    def fold(values: list[float], limits: tuple[float, float]) -> Scores:
        return grid.fold(torch.tensor(values), images, prompts, "abcd", limits, "git")

    scores = fold([0.0, 0.5, 1.004, -0.004], (0.0, 1.0))
    # A rounding error of half precision is cut off at the limit.
    assert scores.parts.tolist() == [[[0.0], [0.5]], [[1.0], [0.0]]]
    assert scores.reasons == (("a", "b"), ("c", "d")) and scores.ranges == ((0.0, 1.0),)
    for wrong in (1.5, -0.2, float("nan"), float("inf")):
        with pytest.raises(UnusableScores, match=r"git gave: sample 0 of 'two' got"):
            fold([0.0, 0.5, wrong, 0.1], (0.0, 1.0))
    with pytest.raises(UnusableScores, match="finite"):
        fold([0.0, 0.5, float("inf"), 0.1], (-float("inf"), float("inf")))
