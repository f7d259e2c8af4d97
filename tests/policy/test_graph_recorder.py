"""CUDA graphs in shared memory: they compute what was recorded, and neither ask the driver for memory nor keep it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stage.policy.graph_recorder import GraphRecorder, recorder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
SIDE = 512


class Squares:
    """Adds the square of a matrix to a sum, through memory of its own."""

    def __init__(self, device: torch.device) -> None:
        self.matrix, self.sum = torch.ones(2, SIDE, SIDE, device=device)

    def step(self) -> None:
        self.sum += self.matrix @ self.matrix

    def undo(self) -> None:
        self.sum -= self.matrix @ self.matrix


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def replayed(made: GraphRecorder, device: torch.device, times: int) -> Tensor:
    squares = Squares(device)
    graph = made.record(squares.step, squares.undo, "squares")
    for _ in range(times):
        graph.replay()
    return squares.sum


def test_what_was_recorded_runs(device: torch.device) -> None:
    """1 + 3 times the square of a matrix of ones, whose entries are its side; warming up leaves nothing."""
    made = GraphRecorder(device)
    for _ in range(2):
        assert (replayed(made, device, 3) == 1 + 3 * SIDE).all()


def test_graphs_of_one_kind_ask_for_no_memory(device: torch.device) -> None:
    """And what others have freed stays in the allocator's cache from the second on."""
    made = GraphRecorder(device)
    replayed(made, device, 1)
    replayed(made, device, 1)
    cached = torch.empty(64 * 2**20, device=device)
    del cached
    reserved, asked = torch.cuda.memory_reserved(device), torch.cuda.memory_stats(device)["num_device_alloc"]
    for _ in range(5):
        replayed(made, device, 1)
    assert torch.cuda.memory_reserved(device) == reserved
    assert torch.cuda.memory_stats(device)["num_device_alloc"] == asked


def test_a_step_that_fails_leaves_nothing_being_recorded(device: torch.device) -> None:
    made, runs = GraphRecorder(device), iter(range(9))

    def step() -> None:
        if next(runs) == 2:  # after two that warm up
            raise RuntimeError("no third")

    with pytest.raises(RuntimeError, match="no third"):
        made.record(step, lambda: None, "failing")
    assert not torch.cuda.is_current_stream_capturing()
    assert (replayed(made, device, 1) == 1 + SIDE).all()


def test_there_is_one_for_a_device(device: torch.device) -> None:
    assert recorder(device) is recorder(torch.device("cuda", device.index))
