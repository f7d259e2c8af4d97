"""Scores of images by prompt and sample. torchmetrics holds them: as many as planned, each once, or an error."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric


class PromptScores(Metric):
    """Values of one part of the score, `[P, G]` for P prompts and G images of each.

    Nothing is averaged over what is missing: `compute` refuses gaps, and values that were given twice. Processes meet
    on disk before they are added up, so nothing is gathered here; a caller that has no disk in common sums the states.

    Args:
        prompts, images: P and G.
        name: of what is gathered, for the error.
    """

    full_state_update = False
    values: Tensor
    seen: Tensor

    def __init__(self, prompts: int, images: int, name: str) -> None:
        super().__init__(sync_on_compute=False, compute_with_cache=False)
        self.name = name
        self.add_state("values", torch.zeros(prompts, images, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("seen", torch.zeros(prompts, images, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prompts: Sequence[int], samples: Sequence[int], values: Sequence[float]) -> None:
        """Take n values; entry i is of sample `samples[i]` of prompt `prompts[i]`.

        Raises ValueError for a place that is not planned.
        """
        rows, columns = torch.tensor(prompts), torch.tensor(samples)
        planned = tuple(self.seen.shape)
        outside = [
            place
            for place in zip(prompts, samples, strict=True)
            if not (0 <= place[0] < planned[0] and 0 <= place[1] < planned[1])
        ]
        if outside:
            raise ValueError(
                f"{self.name} has {planned[0]} prompts of {planned[1]} images, {len(outside)} values are of others, "
                f"the first of prompt {outside[0][0]}, sample {outside[0][1]}; score what was planned"
            )
        self.values.index_put_((rows, columns), torch.tensor(values, dtype=torch.float64), accumulate=True)
        self.seen.index_put_((rows, columns), torch.ones_like(rows), accumulate=True)

    def compute(self) -> Tensor:
        """float64 `[P, G]`. Raises ValueError, with counts, unless every image has one value and it is finite."""
        missing, twice = int((self.seen == 0).sum()), int((self.seen > 1).sum())
        odd = int((~self.values.isfinite()).sum())
        if missing or twice or odd:
            raise ValueError(
                f"{self.name} needs one finite value for each of {self.seen.numel()} images: {missing} have none, "
                f"{twice} have several, {odd} are not finite. Nothing was averaged; score the images again"
            )
        return self.values

    def table(self) -> np.ndarray:
        """What `compute` gives, `[P, G]` always: torchmetrics makes a scalar of a single value."""
        return self.compute().reshape(self.seen.shape).numpy()
