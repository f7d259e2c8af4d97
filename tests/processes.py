"""Real processes for tests: forked, connected by gloo over the loopback, as torchrun would start them."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

LIMIT = 120  # seconds that processes of a test may take


def free_port() -> int:
    """A port of the loopback that nobody has at the moment."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    more = {"GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    return {name: str(value) for name, value in {**ranks, **more}.items()}


def _child(rank: int, world: int, port: int, folder: Path, function: Any, arguments: Any) -> None:
    os.environ.update(environment(rank, world, port))
    torch.set_num_threads(1)
    try:
        result = function(*arguments)
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc(), encoding="utf-8")
        sys.exit(1)
    torch.save(result, folder / f"{rank}.pt")


def start(world: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Processes that run `function(*arguments)`; see `finish`."""
    folder.mkdir(parents=True, exist_ok=True)
    context, port = multiprocessing.get_context("fork"), free_port()
    found = [
        context.Process(target=_child, args=(rank, world, port, folder, function, arguments))
        for rank in range(world)
    ]
    for process in found:
        process.start()
    return found


def finish(processes: list[Any], limit: float = LIMIT) -> None:
    """Wait for processes, and kill those that are left after `limit` seconds."""
    for process in processes:
        process.join(limit)
        if process.is_alive():
            process.kill()
            process.join()


def run(world: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(*arguments)`, tensors and plain containers, gives in each of `world` processes, by rank.

    Raises AssertionError with the traceback of each process that failed.
    """
    finish(start(world, folder, function, *arguments))
    errors = "\n".join(f"process {file.stem}:\n{file.read_text()}" for file in sorted(folder.glob("*.error")))
    assert not errors, errors
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]
