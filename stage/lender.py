"""The policy as a sampler reads it, lent to whoever draws: validation, pictures, and the rollout of an update.

Where weights are sliced over processes they are gathered for the first who draws from them and stay for the others,
until the rollout has its tokens: a copy has the size of the model, and everything after that needs the memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from stage.group_draws import Stopwatch
from stage.policy.gathered import Gathered


class Lender:
    """Lends the policy itself, or what is gathered of a sliced one.

    Args:
        sampler: gives its own memory back (`release`) whenever somebody has drawn.
        gathered: None where the policy is whole in every process.
    """

    def __init__(self, policy: Any, sampler: Any, gathered: Gathered | None = None) -> None:
        self._policy, self._sampler, self._gathered = policy, sampler, gathered

    @property
    def sliced(self) -> bool:
        """Whether weights are gathered for a block."""
        return self._gathered is not None

    @property
    def alone(self) -> bool:
        """Whether inside of a block a process can draw without the others."""
        return self._gathered is None or self._gathered.copied

    def to(self, device: torch.device) -> None:
        """Move what is not the policy's own."""
        if self._gathered is not None:
            self._gathered.to(device)

    @contextmanager
    def lend(self) -> Iterator[Any]:
        """The policy with the weights of this moment, for a `with` block. Every process must enter."""
        with nullcontext(self._policy) if self._gathered is None else self._gathered.filled() as policy:
            try:
                yield policy
            finally:
                self._sampler.release()

    @contextmanager
    def lend_last(self, watch: Stopwatch) -> Iterator[Any]:
        """The same for the last who draws from these weights; `watch` learns how long they were gathered."""
        with ExitStack() as stack:
            stack.callback(self.release)
            with watch("gather") if self.sliced else nullcontext():
                policy = stack.enter_context(self.lend())
            yield policy

    def release(self) -> None:
        """Give gathered weights back."""
        if self._gathered is not None:
            self._gathered.release()
