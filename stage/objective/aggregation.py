"""What the sum over the samples and tokens of a group is divided by.

A slot for `Objective.aggregation` is called with keywords `weights` (`[P, G, L]` or None) and `like`
(`[P, G, L]`, whose shape, dtype and device count) and returns `[P]`. It sees the whole batch of a rank, once
a rollout, before the batch is cut into micro-batches: that is why cutting does not change the loss.
"""

from __future__ import annotations

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
