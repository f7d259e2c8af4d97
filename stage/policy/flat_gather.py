"""Sliced parameters made whole, many of them by one collective.

FSDP2 cuts a parameter along its first axis, into as many chunks of equal length as there are processes; the last ones
may be shorter or empty (torch.chunk). Here every process packs its chunks of a group of parameters into one row of
bytes, each in the type that it is wanted in, and one all-gather makes the rows of all processes. While a group is
unpacked, the next one is on its way.

FSDP2's own `unshard()` would gather a layer as well. Departures:
1. Each parameter has a type of its own: adapters are merged in float32, where FSDP2 has one type for all.
2. Weights go from the gathered bytes straight to where they are wanted, not through parameters of FSDP2's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

ALIGNED = 16  # bytes: a chunk of any type may begin there

Wanted = tuple[Tensor, torch.dtype]


@dataclass(frozen=True)
class Place:
    """Where the chunk of a parameter lies in a row: bytes `start` to `stop`; `rows` fit into a chunk."""

    start: int
    stop: int
    rows: int
    dtype: torch.dtype


class FlatGroup:
    """Parameters that are gathered together; those that are not sliced are read as they are.

    A single process has nothing to gather: it reads its slices.

    Raises ValueError for one that is cut along another axis.
    """

    def __init__(self, wanted: Sequence[Wanted]) -> None:
        """`wanted` are parameters with the type that each is wanted in."""
        self._slices = [(parameter, dtype) for parameter, dtype in wanted if isinstance(parameter, DTensor)]
        self._places: dict[int, Place] = {}
        self.row_bytes = 0
        for parameter, dtype in self._slices:
            place = self._placed(parameter, dtype)
            self._places[id(parameter)] = place
            self.row_bytes = -(-place.stop // ALIGNED) * ALIGNED
        self.processes = self._slices[0][0].device_mesh.size() if self._slices else 1
        if self.processes == 1:
            self.row_bytes = 0
        self._rows: Tensor | None = None
        self._work: Any = None

    def _placed(self, parameter: DTensor, dtype: torch.dtype) -> Place:
        if tuple(parameter.placements) != (Shard(0),):
            raise ValueError(
                f"weights must be cut along their first axis over one flat mesh of processes; got "
                f"{parameter.placements}. Shard them with stage.policy.sharded."
            )
        rows = -(-len(parameter) // parameter.device_mesh.size())
        size = rows * prod(parameter.shape[1:]) * dtype.itemsize
        return Place(self.row_bytes, self.row_bytes + size, rows, dtype)

    def start(self, mine: Tensor, everyone: Tensor) -> None:
        """Pack this process's chunks into `mine`, and begin to gather all of them into `everyone`; both are bytes."""
        if self.processes == 1:
            return
        row = mine[: self.row_bytes]
        for parameter, dtype in self._slices:
            place, chunk = self._places[id(parameter)], parameter.to_local().flatten()
            row[place.start : place.stop].view(dtype)[: len(chunk)].copy_(chunk)
        flat = everyone[: self.processes * self.row_bytes]
        self._rows = flat.view(self.processes, -1)
        group = self._slices[0][0].device_mesh.get_group()
        self._work = dist.all_gather_into_tensor(flat, row, group=group, async_op=True)

    def wait(self) -> None:
        """Parameters can be read from here on."""
        if self._work is not None:
            self._work.wait()
            self._work = None

    def read(self, parameter: Tensor, into: Tensor | None = None) -> Tensor:
        """All of a parameter, copied to `into` where that is given."""
        place = self._places.get(id(parameter))
        if place is None:
            return parameter if into is None else into.copy_(parameter)
        if self._rows is None:
            mine = cast(DTensor, parameter).to_local()
            return mine.to(place.dtype) if into is None else into.copy_(mine)
        if into is None:
            into = torch.empty(parameter.shape, dtype=place.dtype, device=self._rows.device)
        chunks = self._rows[:, place.start : place.stop].view(place.dtype)
        chunks = chunks.unflatten(1, (place.rows, *parameter.shape[1:]))
        complete, left = divmod(len(parameter), place.rows)
        cut = complete * place.rows
        into[:cut].unflatten(0, (complete, place.rows)).copy_(chunks[:complete])
        if left:
            into[cut:].copy_(chunks[complete, :left])
        return into


def gathered(groups: Sequence[Sequence[Wanted]], device: torch.device) -> Iterator[FlatGroup]:
    """Groups of parameters, one after the other, to be read before the next is asked for. Every process must do so.

    Two rooms take turns: what is on its way never lands where something is still read, since collectives begin after
    what the device was told before.
    """
    made = [FlatGroup(wanted) for wanted in groups]
    row = max((group.row_bytes for group in made), default=0)
    all_rows = max((group.row_bytes * group.processes for group in made), default=0)
    rooms = [
        tuple(torch.empty(size, dtype=torch.uint8, device=device) for size in (row, all_rows))
        for _ in made[:2]
    ]
    for number, group in enumerate(made):
        if number == 0:
            group.start(*rooms[0])
        if number + 1 < len(made):
            made[number + 1].start(*rooms[(number + 1) % 2])
        group.wait()
        yield group
