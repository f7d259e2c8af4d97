"""How the metrics of the parts of an update become those of the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stage.types import Metrics

TensorMetrics = dict[str, Tensor]


def is_maximum(name: str) -> bool:
    """Whether a metric is a largest value (`policy/ratio_max`, `advantage/max`) and not a mean or a sum."""
    return name.endswith(("/max", "_max"))


def merge_metrics(
    parts: Sequence[Mapping[str, Tensor]], whole: Mapping[str, Tensor] | None = None
) -> Metrics:
    """Metrics of a whole update from those that `loss` returned for its micro-batches, and `whole` ones as they are.

    Contributions add up; the largest counts where `is_maximum` says so. It is the one device sync of these
    metrics. Raises ValueError without parts.
    """
    if not parts:
        raise ValueError(
            "an update has at least one micro-batch, got none; pass what loss() returned for each"
        )
    merged = {}
    for name in parts[0]:
        values = torch.stack([part[name] for part in parts])
        merged[name] = values.amax() if is_maximum(name) else values.sum()
    return to_floats(merged | dict(whole or {}))


def to_floats(metrics: Mapping[str, Tensor]) -> Metrics:
    """0-d tensors to floats with one transfer from the device."""
    values = torch.stack([value.double() for value in metrics.values()]).tolist()
    return dict(zip(metrics, values, strict=True))
