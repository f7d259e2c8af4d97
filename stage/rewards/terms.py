"""When a scorer of a combination counts, and how much it counts as training goes on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Above:
    """A gate: open in the images whose part `part`, named as in the combination, is above `threshold`.

    "Only if geneval > 0" is `part: geneval/partial`, `threshold: 0`.
    """

    part: str
    threshold: float

    def __call__(self, values: Tensor) -> Tensor:
        """Values of the part `[P, G]` to bool `[P, G]`."""
        return values > self.threshold


@dataclass(frozen=True)
class Linear:
    """The weight's factor goes in a straight line from `start` at update `first` to `end` at update `last`."""

    start: float
    end: float
    first: int
    last: int

    def __post_init__(self) -> None:
        _finite(self.start, self.end)
        if not 0 <= self.first < self.last:
            raise ValueError(
                f"a line goes from an update to a later one, got first {self.first} and last {self.last}; raise last"
            )

    def __call__(self, update: int) -> float:
        """The factor at `update`, counted from 0."""
        done = min(max((update - self.first) / (self.last - self.first), 0.0), 1.0)
        return self.start + done * (self.end - self.start)


@dataclass(frozen=True)
class Step:
    """The weight's factor is `before` until update `at`, and `after` from it on."""

    before: float
    after: float
    at: int

    def __post_init__(self) -> None:
        _finite(self.before, self.after)
        if self.at < 0:
            raise ValueError(f"updates are counted from 0, got {self.at}; choose a later one")

    def __call__(self, update: int) -> float:
        """The factor at `update`, counted from 0."""
        return self.before if update < self.at else self.after


def _finite(*factors: float) -> None:
    if not all(math.isfinite(factor) for factor in factors):
        raise ValueError(
            f"factors of a weight are finite numbers, got {factors}; use 0 for a part that rests"
        )
