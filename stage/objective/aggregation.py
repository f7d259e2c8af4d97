"""What the sum over the samples and tokens of a group is divided by.

A slot for `Objective.aggregation` is called with keywords `weights` (`[P, G, L]` or None) and `like`
(`[P, G, L]`, whose shape, dtype and device count) and returns `[P]`. It sees the whole batch of a rank, or with a true
`compares_batch` of all ranks, once a rollout, before the batch is cut into micro-batches: that is why cutting does not
change the loss.

All images have the same number of tokens, so without weights the means below are one and the same; with weights
of tokens they part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


class GroupMean:
    """The mean over samples and tokens of a group, weighted where there are weights.

    Without weights the divisor is `G * L`, with weights `sum_it w_it + epsilon`, so weights all 0 give 0.

    Args:
        epsilon: added to a sum of weights.
    """

    def __init__(self, *, epsilon: float) -> None:
        self.epsilon = epsilon

    def __call__(self, *, weights: Tensor | None, like: Tensor) -> Tensor:
        """Divisors `[P]`, one a group."""
        groups, group_size, length = like.shape
        if weights is None:
            return like.new_full((groups,), float(group_size * length))
        return weights.sum(dim=(1, 2)) + self.epsilon


class BatchMean:
    """The mean over all tokens of the batch, as DAPO's "token-level policy gradient loss".

    Every token of weight 1 counts the same, whatever its group: `sum_pit w x / sum_pit w` is the mean over P groups of
    `sum_it w x / d` with `d = mean over groups of sum_it w`. DAPO (arXiv 2503.14476), eq. 8, divides by the tokens of
    a group and verl's `token-mean` by those of the batch, as here; the batch is that of all ranks.

    Args:
        epsilon: added to a sum of weights.
    """

    compares_batch = True

    def __init__(self, *, epsilon: float) -> None:
        self.epsilon = epsilon

    def __call__(self, *, weights: Tensor | None, like: Tensor) -> Tensor:
        """Divisors `[P]`, all equal."""
        groups, group_size, length = like.shape
        if weights is None:
            return like.new_full((groups,), float(group_size * length))
        return (weights.sum(dim=(1, 2)).mean() + self.epsilon).expand(groups)


class FixedLength:
    """Dr.GRPO's divisor: the same for all groups whatever their weights, `G * length`.

    A group whose tokens are weighted down then learns less, where a mean would make up for it. Source: arXiv
    2503.20783, section 3.2, and sail-sg/understand-r1-zero, `masked_sum(...) / constant`.

    Args:
        length: tokens; null is that of the images, L, which leaves the loss of unweighted tokens a mean.
    """

    def __init__(self, *, length: int | None) -> None:
        self.length = length

    def check(self, switches: Mapping[str, Any]) -> None:
        """Raises ValueError for a length below 1."""
        if self.length is not None and (not isinstance(self.length, int) or self.length < 1):
            raise ValueError(
                f"a fixed length is a number of tokens of at least 1, got {self.length!r}; null is that of the images"
            )

    def __call__(self, *, weights: Tensor | None, like: Tensor) -> Tensor:
        """Divisors `[P]`, all equal."""
        groups, group_size, length = like.shape
        return like.new_full((groups,), float(group_size * (self.length or length)))
