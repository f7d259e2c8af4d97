"""What one of several processes does of an update, and what the processes tell one another about it.

Prompts are dealt out in order, equally many to each process. Where there are fewer prompts than processes a group of
samples spans several of them, equally many samples each. Everything random is a function of (seed, update, prompt,
sample), so who draws a sample does not matter.

What is exchanged here is small: numbers, sentences, and the scores of a group that spans processes. It goes through
the CPU, over a process group of its own with a time limit of its own, and as JSON or tensors, never as pickles.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stage.heartbeat import Heartbeat
from stage.types import Metrics


@dataclass(frozen=True)
class Division:
    """Which of the prompts and which samples of each a process has; `span` processes share a group."""

    prompts: slice
    samples: slice
    span: int

    @property
    def num_prompts(self) -> int:
        """Prompts that this process has samples of."""
        return self.prompts.stop - self.prompts.start

    @property
    def group_size(self) -> int:
        """Samples a prompt on this process."""
        return self.samples.stop - self.samples.start


def divide(rank: int, world: int, prompts: int, group_size: int) -> Division:
    """The part of process `rank` of `world`.

    Raises ValueError where prompts or, with fewer prompts than processes, samples cannot be dealt out equally.
    """
    if prompts % world == 0:
        each = prompts // world
        return Division(slice(rank * each, (rank + 1) * each), slice(0, group_size), 1)
    if prompts > world or world % prompts:
        raise ValueError(
            f"each process gets as many prompts, or prompts as many processes; got data.prompts_per_update={prompts} "
            f"for {world} processes. Set it to a multiple or a divisor of {world}."
        )
    span = world // prompts
    if group_size % span:
        raise ValueError(
            f"with {prompts} prompts for {world} processes a group spans {span} of them, equally many samples each; "
            f"got group_size={group_size}. Set it to a multiple of {span}, or data.prompts_per_update to a multiple of "
            f"{world}."
        )
    each, place = group_size // span, rank % span
    prompt = rank // span
    return Division(slice(prompt, prompt + 1), slice(place * each, (place + 1) * each), span)


class PeerError(ValueError):
    """What another process has failed with, by the name of its class; its text says which one and why."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


class LostPeer(OSError):
    """Another process is dead or hangs."""


def known(error: BaseException) -> bool:
    """Whether all processes have raised, so that none waits for another: see `Ranks.together`."""
    return bool(getattr(error, "on_all_ranks", False))


def of_all(error: Exception) -> Exception:
    """The error, said to have been raised by all processes."""
    error.on_all_ranks = True  # type: ignore[attr-defined]
    return error


@dataclass(frozen=True)
class Ranks:
    """Process `rank` of `world`.

    `everyone` is a process group of all of them on the CPU, None for one process alone; `sharing` are those that share
    this one's group of samples, None where none does. `heart` tells the others what this process does, if it has one.
    """

    rank: int
    world: int
    everyone: Any = None
    sharing: Any = None
    heart: Heartbeat | None = None

    @property
    def first(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def divide(self, prompts: int, group_size: int) -> Division:
        """See `divide`."""
        return divide(self.rank, self.world, prompts, group_size)

    def exchange(self, text: str) -> list[str]:
        """The texts of all processes, by rank. Every process must call it."""
        if self.world == 1:
            return [text]
        with self._meeting():
            return self._exchange(text)

    @contextmanager
    def _meeting(self) -> Iterator[None]:
        """Around what a process leaves when others have come to it; raises LostPeer where one does not."""
        try:
            with nullcontext() if self.heart is None else self.heart.waiting():
                yield
        except RuntimeError as error:
            if self.heart is not None:
                self.heart.last_word()
            reason = str(error).splitlines()[0].rpartition("] ")[2].split(". ")[0]
            raise LostPeer(
                f"every process must come to each exchange in time; one has died or let process {self.rank} wait: "
                f"{reason}. Look at what the others said, and resume from the last checkpoint."
            ) from error

    def _exchange(self, text: str) -> list[str]:
        mine = (
            torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else torch.empty(0).byte()
        )
        lengths = [torch.zeros(1, dtype=torch.long) for _ in range(self.world)]
        dist.all_gather(lengths, torch.tensor([len(mine)]), group=self.everyone)
        longest = max(int(length) for length in lengths)
        if longest == 0:
            return [""] * self.world
        rows = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world)]
        padded = torch.nn.functional.pad(mine, (0, longest - len(mine)))
        dist.all_gather(rows, padded, group=self.everyone)
        return [
            bytes(row[: int(length)].tolist()).decode() for row, length in zip(rows, lengths, strict=True)
        ]

    def does(self, part: str, *, update: int | None = None, waits: bool = False) -> None:
        """This process begins a part of an update; see `Heartbeat.does`."""
        if self.heart is not None:
            self.heart.does(part, update=update, waits=waits)

    def gathered(self, value: Any) -> list[Any]:
        """Plain JSON values of all processes, by rank."""
        return [json.loads(text) for text in self.exchange(json.dumps(value))]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Leave the block on all processes or on none: where one fails in it, all raise once they have come to its end.

        Nothing in the block may wait for another process after the place where one can fail. The error has
        `on_all_ranks` then, so that whoever handles it knows that the others do too.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as found:
            error = found
        if self.world > 1:
            error = self._shared(error)
        if error is not None:
            raise error

    def _shared(self, error: Exception | None) -> Exception | None:
        """This process's error, else that of the first that has one."""
        said = self.exchange("" if error is None else f"{type(error).__name__}: {error}")
        failed = [rank for rank, text in enumerate(said) if text]
        if not failed:
            return None
        if error is None:
            reason = said[failed[0]]
            kind = reason.partition(":")[0]
            error = PeerError(f"process {failed[0]} of {self.world} failed: {reason}", kind)
        return of_all(error)

    def mean(self, metrics: Mapping[str, float], is_maximum: Callable[[str], bool]) -> Metrics:
        """Each metric's mean over the processes that have it, or the largest where `is_maximum(name)`."""
        if self.world == 1:
            return dict(metrics)
        found: dict[str, list[float]] = {}
        for row in self.gathered(dict(metrics)):
            for name, value in row.items():
                found.setdefault(name, []).append(value)
        return {n: max(v) if is_maximum(n) else sum(v) / len(v) for n, v in found.items()}

    def whole_group(self, tensor: Tensor) -> Tensor:
        """A part `[P, g, ...]` of a group that spans processes to all of it, `[P, G, ...]`, on the same device."""
        if self.sharing is None:
            return tensor
        mine = tensor.detach().cpu().contiguous().view(torch.uint8)  # not every type can be sent
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.sharing))]
        with self._meeting():
            dist.all_gather(parts, mine, group=self.sharing)
        return torch.cat([part.view(tensor.dtype) for part in parts], dim=1).to(tensor.device)

    def whole_batch(self, tensor: Tensor) -> Tensor:
        """Rows `[P, ...]` of each process to those of all, in order, on the same device.

        Processes that share a group have the same rows, which count once.
        """
        mine = tensor.detach().cpu().contiguous().view(torch.uint8)
        parts = [torch.empty_like(mine) for _ in range(self.world)]
        with self._meeting():
            dist.all_gather(parts, mine, group=self.everyone)
        span = 1 if self.sharing is None else dist.get_world_size(self.sharing)
        return torch.cat([part.view(tensor.dtype) for part in parts[::span]]).to(tensor.device)

    def hand_over(self, tensor: Tensor, source: int, target: int) -> Tensor:
        """The tensor of process `source` in process `target`, whose own has its shape, type and device and gives way.

        Every process must call it, and the others get back what they give.
        """
        sent = tensor.detach().cpu().contiguous()
        carried = sent.view(torch.uint8)  # not every type can be sent
        with self._meeting():  # also of those who only look on, so that all count as many
            if self.rank not in (source, target) or source == target:
                return tensor
            if self.rank == source:
                dist.send(carried, target, group=self.everyone)
                return tensor
            dist.recv(carried, source, group=self.everyone)
        return sent.to(tensor.device)

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Raise ValueError on all processes unless these are the same on each, naming the first that is not."""
        rows = self.gathered(dict(facts))
        for name in dict.fromkeys(name for row in rows for name in row):
            value = rows[0].get(name)
            for rank, row in enumerate(rows):
                if row.get(name) != value:
                    raise of_all(
                        ValueError(
                            f"all processes must run the same; {name} is {value} in process 0 and {row.get(name)} in "
                            f"process {rank}. Start them from one environment with one command line."
                        )
                    )


ALONE = Ranks(0, 1)


def connect(rank: int, world: int, span: int, timeout: timedelta) -> Ranks:
    """Process groups for `Ranks` where torch.distributed runs; whoever does not come in `timeout` is an error."""
    if world == 1:
        return ALONE
    make: Any = dist.new_group
    everyone = make(backend="gloo", timeout=timeout)
    sharing = None
    if span > 1:
        for members in blocks(world, span):
            found = make(members, backend="gloo", timeout=timeout)  # all processes make all groups
            sharing = found if rank in members else sharing
    return Ranks(rank, world, everyone, sharing)


def blocks(world: int, span: int) -> Sequence[list[int]]:
    """The processes that share a group, for each group."""
    return [list(range(start, start + span)) for start in range(0, world, span)]
