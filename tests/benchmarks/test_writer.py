"""Writing beside drawing: overlap, order, bounded backlog, and errors that come out."""

from __future__ import annotations

import threading
from functools import partial

import pytest

from stage.benchmarks.writer import BATCHES, Writer


def test_a_batch_is_reported_when_all_of_it_is_written() -> None:
    written, counts = list[tuple[int, int]](), list[int]()
    with Writer(counts.append) as writer:
        for number in range(5):
            writer.write([partial(written.append, (number, image)) for image in range(3)])
    assert counts == [3] * 5
    assert sorted(written) == [(number, image) for number in range(5) for image in range(3)]


def test_the_caller_goes_on_while_images_are_written_but_not_too_far() -> None:
    gate, order = threading.Event(), list[str]()
    with Writer(lambda count: order.append("written")) as writer:
        for _ in range(BATCHES):
            writer.write([gate.wait])
            order.append("drawn")  # nothing is on disk yet
        assert order == ["drawn"] * BATCHES
        threading.Timer(0.05, gate.set).start()
        writer.write([gate.wait])  # waits for the first
        assert order == ["drawn"] * BATCHES + ["written"]


def test_what_goes_wrong_in_a_thread_is_raised() -> None:
    def full() -> None:
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"), Writer(lambda count: None) as writer:
        for _ in range(BATCHES + 1):
            writer.write([full])
    with pytest.raises(OSError, match="No space left"), Writer(lambda count: None) as writer:
        writer.write([full])


def test_an_error_of_the_caller_is_not_hidden_by_one_of_a_thread() -> None:
    def full() -> None:
        raise OSError("No space left on device")

    with pytest.raises(KeyboardInterrupt), Writer(lambda count: None) as writer:
        writer.write([full])
        raise KeyboardInterrupt
