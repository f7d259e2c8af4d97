"""The named parts that a scorer can report, and those of them that a configuration weighs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stage.types import Scores


class Parts:
    """The parts that are reported, in the order of `weights`. A part of weight 0 is logged only.

    Args:
        weights: name to weight, of at least one part.
        known: the parts that there are.

    Raises:
        ValueError: no part, one that there is not, or a weight that is not finite.
    """

    def __init__(self, weights: Mapping[str, float], known: Sequence[str]) -> None:
        if not weights or not set(weights) <= set(known):
            raise ValueError(
                f"weights name at least one of {', '.join(known)}, got {list(weights)}; choose some"
            )
        if not all(math.isfinite(weight) for weight in weights.values()):
            raise ValueError(f"weights are finite numbers, got {dict(weights)}; use 0 to log a part only")
        self.names = tuple(weights)
        self.weights = tuple(float(weight) for weight in weights.values())

    def scores(
        self,
        images: Tensor,
        values: Sequence[Mapping[str, float]],
        reasons: Sequence[str],
        ranges: Mapping[str, tuple[float, float]],
    ) -> Scores:
        """Parts `[P, G, R]` on the device of `images` `[P, G, H, W, 3]`.

        Args:
            values, reasons: one an image, in the order of `images`. Each has a value for every part there is.
            ranges: lowest and highest value of every part there is.
        """
        prompts, group = images.shape[:2]
        found = torch.tensor([[value[name] for name in self.names] for value in values])
        return Scores(
            parts=found.float().reshape(prompts, group, len(self.names)).to(images.device),
            names=self.names,
            weights=self.weights,
            reasons=tuple(tuple(reasons[p * group : (p + 1) * group]) for p in range(prompts)),
            ranges=tuple(ranges[name] for name in self.names),
        )
