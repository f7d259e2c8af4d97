"""The most bytes that tensors on the CPU take at once, as torch's allocator reports them to its profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.profiler import ProfilerActivity, profile

TRANSPORT = ("c10d::", "gloo:")  # what gloo copies for itself, where a GPU's library copies nothing


def most_bytes(function: Callable[[], Any]) -> int:
    """Beyond what was there before. Tensors made by what moves bytes between processes are not counted."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        function()
    tree: Any = found.profiler
    events = [
        event for root in tree.kineto_results.experimental_event_tree() for event in _allocations(root, False)
    ]
    total = most = 0
    moved: set[int] = set()
    for _, size, address, transport in sorted(events):
        if size > 0 and transport:
            moved.add(address)
        elif size < 0 and address in moved:
            moved.discard(address)
        else:
            total += size
            most = max(most, total)
    return most


def _allocations(event: Any, transport: bool) -> Iterator[tuple[int, int, int, bool]]:
    """(time, bytes, address, whether for transport) of every allocation, and of every release with negative bytes."""
    transport = transport or event.name.startswith(TRANSPORT)
    size = getattr(event.extra_fields, "alloc_size", None)
    if size is not None:
        yield event.start_time_ns, size, event.extra_fields.ptr, transport
    for child in event.children:
        yield from _allocations(child, transport)
