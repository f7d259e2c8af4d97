"""Reading in several processes: order, errors, dead workers, and what it gains."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest

from stage.detectors.text_pool import TextPool
from stage.types import TextReader


class Corner:
    """Reads the value of the upper left pixel; 255 ends its process, 254 is an error, and 253 takes a while."""

    def __init__(self, prefix: str) -> None:
        self.prefix, self.provenance = prefix, {"engine": prefix}

    def read(self, images: np.ndarray) -> list[tuple[str, ...]]:
        found: list[tuple[str, ...]] = []
        for image in images:
            value = int(image[0, 0, 0])
            if value == 255:
                os._exit(9)
            if value == 254:
                raise ValueError("cannot read 254")
            if value == 253:
                time.sleep(0.3)
            found.append((f"{self.prefix}{value}", str(os.getpid())))
        return found


def pictures(*values: int) -> np.ndarray:
    return np.stack([np.full((2, 2, 3), value, dtype=np.uint8) for value in values])


def test_results_come_in_order_from_other_processes() -> None:
    pool = TextPool(partial(Corner, "v"), 2)
    assert isinstance(pool, TextReader) and pool.provenance == {"engine": "v"}
    workers: set[str] = set()
    while len(workers) < 2:  # a worker may be late to start
        lines = pool.read(pictures(253, *range(20)))
        assert [line[0] for line in lines] == ["v253", *(f"v{value}" for value in range(20))]
        workers |= {line[1] for line in lines}
    pool.close()
    assert str(os.getpid()) not in workers


def test_an_error_of_the_reader_is_raised_and_the_pool_goes_on() -> None:
    pool = TextPool(partial(Corner, "v"), 1)
    with pytest.raises(ValueError, match="cannot read 254"):
        pool.read(pictures(1, 254))
    assert pool.read(pictures(7))[0][0] == "v7"
    pool.close()


def test_a_dead_worker_is_an_error_and_no_reward() -> None:
    pool = TextPool(partial(Corner, "v"), 1)
    with pytest.raises(ChildProcessError, match="one of the 1 processes that read text died"):
        pool.read(pictures(1, 255, 2))
    pool.close()


def test_a_reader_that_cannot_be_made_says_so_at_once() -> None:
    with pytest.raises(TypeError, match="prefix"):
        TextPool(Corner, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1 process, got 0"):
        TextPool(partial(Corner, "v"), 0)


def _arithmetic(_: int) -> float:
    started = time.perf_counter()
    sum(i * i for i in range(2_000_000))
    return time.perf_counter() - started


def fastest(function: Callable[[], Any], times: int) -> float:
    """Seconds of the fastest of several calls."""
    found = []
    for _ in range(times):
        started = time.perf_counter()
        function()
        found.append(time.perf_counter() - started)
    return min(found)


@pytest.mark.slow
def test_two_processes_read_nearly_twice_as_fast() -> None:
    """32 pictures of 384 pixels, the same engine with one thread in this process and in two others."""
    pytest.importorskip("rapidocr", reason="the extra `ocr` is not installed")
    from stage.detectors.rapid_ocr import RapidReader

    make = partial(
        RapidReader, detector_side=256, box_threshold=0.5, unclip_ratio=1.6, text_score=0.5, threads=1
    )
    images = np.random.default_rng(0).integers(0, 60, (32, 384, 384, 3), dtype=np.uint8)
    images[:, 100:160, 60:320] = 255
    serial, pool = make(), TextPool(make, 2)
    assert pool.read(images) == serial.read(images)  # and everything is warm
    with ProcessPoolExecutor(2, get_context("spawn")) as two:
        list(two.map(_arithmetic, range(4)))
        capacity = fastest(lambda: [_arithmetic(i) for i in range(4)], 3) / fastest(
            lambda: list(two.map(_arithmetic, range(4))), 3
        )
    gain = fastest(lambda: serial.read(images), 3) / fastest(lambda: pool.read(images), 3)
    pool.close()
    print(f"two processes: {capacity:.2f} times one on plain arithmetic, {gain:.2f} times one on reading")
    if capacity < 1.9:
        pytest.skip(f"two processes do {capacity:.2f} times the arithmetic of one here: no two free cores")
    assert gain >= 1.7
