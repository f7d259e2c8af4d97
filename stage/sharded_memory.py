"""How much device memory a run takes in each process when its weights are sliced over several of them.

Parts that are never there at the same time are not added up: before a rollout the weights are gathered, after its last
use they are given back, and gradients come after that. All sizes in bytes; see `stage.memory` for the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from stage.memory import FLOAT, SLACK, ModelShape, Reference, Workload, activation_bytes, rollout_bytes

AHEAD = 2  # layers that are whole at once: the one that runs, and the next, which is gathered meanwhile


@dataclass(frozen=True)
class Slices:
    """Numbers of weights by what becomes of them.

    replicated: frozen outside of the layers, whole everywhere. frozen: the layers' that are not trained. outside:
    trained outside of the layers. layer: all of one layer.
    """

    replicated: int
    frozen: int
    outside: int
    layer: int


def slices_of(policy: Any) -> Slices:
    """Counted from a policy that is not sliced yet; nothing is read but shapes."""
    layers = policy.language_model.layers
    inside = {id(parameter) for parameter in layers.parameters()}
    outer = [parameter for parameter in policy.parameters() if id(parameter) not in inside]
    return Slices(
        replicated=sum(p.numel() for p in outer if not p.requires_grad),
        frozen=sum(p.numel() for p in layers.parameters() if not p.requires_grad),
        outside=sum(p.numel() for p in outer if p.requires_grad),
        layer=sum(p.numel() for p in layers[0].parameters()),
    )


def sharded_parts(
    shape: ModelShape, slices: Slices, run: Workload, processes: int, *, copied: bool, offload: bool
) -> dict[str, int]:
    """Bytes of each part on the device of one of `processes`.

    Args:
        run: what one process does; its `optimizer_bytes` are those of all processes, for float32 masters.
        copied: whether all weights are gathered for a rollout.
        offload: whether masters, gradients and optimizer are in CPU memory.
    """
    on_device = 0 if offload else 1
    b = shape.width
    masters = on_device * FLOAT * shape.trained // processes
    keys_values = rollout_bytes(replace(shape, rollout_copy=0), run)
    whole = b * (slices.layer * shape.layers + slices.outside)
    return {
        "weights": b * slices.replicated + b * slices.frozen // processes + masters,
        "reference": b * shape.trained // processes if run.reference is Reference.COPY else 0,
        "gradients": masters,
        "optimizer": on_device * run.optimizer_bytes // processes,
        "gathered for the rollout": whole if copied else b * (slices.layer + slices.outside),
        "keys and values": keys_values,
        "layers in use": b * (AHEAD * slices.layer + slices.outside),
        "activations": activation_bytes(shape, run),
    }


def sharded_peak(parts: Mapping[str, int]) -> int:
    """The most that is there at once, with slack: in the rollout, in the replay after it, or in the backward pass."""
    always = parts["weights"] + parts["reference"] + parts["optimizer"]
    forward = parts["layers in use"] + parts["activations"]
    moments = (
        parts["gathered for the rollout"] + parts["keys and values"],
        parts["gathered for the rollout"] + forward,
        parts["gradients"] + forward,
    )
    return round(SLACK * (always + max(moments)))
