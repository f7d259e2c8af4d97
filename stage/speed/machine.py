"""What a measurement ran on, and how it is timed."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime

import torch
import transformers

BANDWIDTH_BYTES = {"cuda": 2**32, "cpu": 2**28}


def describe(device: torch.device) -> dict[str, str]:
    """Hardware, versions and date, as they stand beside every result."""
    cuda = device.type == "cuda"
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that `run` takes, the device's work included."""
    _wait(device)
    begun = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - begun


def bandwidth(device: torch.device) -> float:
    """Bytes a second of memory: a large copy, bytes read and written both counted; the best of five."""
    source = torch.empty(BANDWIDTH_BYTES.get(device.type, 2**28) // 4, device=device).normal_()
    target = torch.empty_like(source)
    target.copy_(source)
    copies = 4

    def copy() -> None:
        for _ in range(copies):
            target.copy_(source)

    return 2 * source.nbytes * copies / min(seconds(copy, device) for _ in range(5))


def peak_gibibytes(run: Callable[[], object], device: torch.device) -> float:
    """The most memory allocated on a CUDA device while `run` runs, weights included; NaN elsewhere."""
    if device.type != "cuda":
        run()
        return float("nan")
    torch.cuda.reset_peak_memory_stats(device)
    run()
    _wait(device)
    return torch.cuda.max_memory_allocated(device) / 2**30


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
